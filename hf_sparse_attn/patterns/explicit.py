"""Keys named by their position (the global tokens of Longformer, Beltagy, Peters and Cohan 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


@dataclass(frozen=True)
class Explicit:
    """`global_token_indices`: the keys at these positions."""

    indices: tuple[int, ...]

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> Explicit | None:
        return cls(config.global_token_indices) if config.global_token_indices else None

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        inside = sorted({index for index in self.indices if start <= index < stop})
        return torch.tensor(inside, dtype=torch.int64, device=device)

    def admits(self, position: Tensor) -> Tensor:
        return (position[:, None] == torch.tensor(self.indices, device=position.device)).any(-1)
