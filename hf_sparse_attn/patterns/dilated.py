"""A window with gaps (the dilated window of Longformer, Beltagy, Peters and Cohan 2020, arXiv 2004.05150, section 3.1).

With a gap of one stride it is the second half of the strided pattern of Sparse Transformers (Child et al. 2019, arXiv
1904.10509, section 4.3) for documents of up to `dilated_window_size` strides: theirs has no end, but a row's own keys
are written out, so their number must have one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


@dataclass(frozen=True)
class Dilated:
    """`dilated_window_size`, `dilation`: the keys at p - i * dilation for i = 1 .. dilated_window_size; where attention
    is not causal, also at p + i * dilation."""

    size: int
    dilation: int
    both_sides: bool

    @classmethod
    def of(cls, config: SparseAttentionConfig, num_tokens: int | None = None) -> Dilated | None:
        if not config.dilated_window_size:
            return None
        return cls(config.dilated_window_size, config.dilation, num_tokens is not None)

    @property
    def num_keys(self) -> int:
        return 2 * self.size if self.both_sides else self.size

    def keys(self, position: Tensor) -> Tensor:
        steps = torch.arange(1, self.size + 1, device=position.device)
        if self.both_sides:
            steps = torch.cat([steps, -steps])
        return position[:, None] - steps * self.dilation

    def admits(self, row: int, position: Tensor) -> Tensor:
        older = row - position
        distance = older.abs() if self.both_sides else older
        return (older % self.dilation == 0) & (distance > 0) & (distance <= self.size * self.dilation)
