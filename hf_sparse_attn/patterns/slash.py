"""Keys at fixed distances (the slashes of MInference's vertical-slash heads, Jiang et al. 2024, arXiv 2407.02490).

Its verticals are the static pattern of `explicit.py`. MInference estimates both from the last queries of a prompt,
which is not causal; here they are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


@dataclass(frozen=True)
class Slash:
    """`slash_distances`: the keys at p - d for each distance d; where attention is not causal, also at p + d."""

    distances: tuple[int, ...]

    @classmethod
    def of(cls, config: SparseAttentionConfig, num_tokens: int | None = None) -> Slash | None:
        older = config.slash_distances
        newer = () if num_tokens is None else tuple(-distance for distance in older)
        return cls(older + newer) if older else None

    @property
    def num_keys(self) -> int:
        return len(self.distances)

    def keys(self, position: Tensor) -> Tensor:
        return torch.stack([position - distance for distance in self.distances], 1)

    def admits(self, row: int, position: Tensor) -> Tensor:
        return (position[:, None] + torch.tensor(self.distances, device=position.device) == row).any(-1)
