"""The first keys of a document (attention sinks; Xiao et al. 2023, StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


@dataclass(frozen=True)
class Leading:
    """`num_global_tokens`: the keys at positions under `num_keys`."""

    num_keys: int

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> Leading | None:
        return cls(config.num_global_tokens) if config.num_global_tokens else None

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        return torch.arange(start, max(start, min(stop, self.num_keys)), device=device)

    def admits(self, position: Tensor) -> Tensor:
        return position < self.num_keys
