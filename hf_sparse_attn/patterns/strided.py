"""Every so many-th key (the fixed pattern of Sparse Transformers, Child et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


@dataclass(frozen=True)
class Strided:
    """`stride`: the keys at multiples of it."""

    stride: int

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> Strided | None:
        return cls(config.stride) if config.stride else None

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        first = -(-start // self.stride) * self.stride
        return torch.arange(first, max(first, stop), self.stride, device=device)

    def admits(self, position: Tensor) -> Tensor:
        return position % self.stride == 0
