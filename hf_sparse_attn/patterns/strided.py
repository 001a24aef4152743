"""Keys at the same places of every stride (the fixed pattern of Sparse Transformers, Child et al. 2019).

arXiv 1904.10509, section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


@dataclass(frozen=True)
class Strided:
    """`stride`, `stride_offset`, `stride_width`: of every `stride` keys, so many from the offset on."""

    stride: int
    offset: int = 0
    width: int = 1

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> Strided | None:
        return cls(config.stride, config.stride_offset, config.stride_width) if config.stride else None

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        position = torch.arange(start, max(start, stop), device=device)
        return position[(position - self.offset) % self.stride < self.width]

    def admits(self, position: Tensor) -> Tensor:
        place = position % self.stride
        return (place >= self.offset) & (place < self.offset + self.width)
