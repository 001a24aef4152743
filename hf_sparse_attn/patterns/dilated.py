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
    """`dilated_window_size`, `dilation`: the keys at p - i * dilation for i = 1 .. dilated_window_size."""

    num_keys: int
    dilation: int

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> Dilated | None:
        return cls(config.dilated_window_size, config.dilation) if config.dilated_window_size else None

    def keys(self, position: Tensor, num_tokens: int | None = None) -> Tensor:
        return position[:, None] - torch.arange(1, self.num_keys + 1, device=position.device) * self.dilation

    def admits(self, row: int, position: Tensor, num_tokens: int | None = None) -> Tensor:
        older = row - position
        return (older % self.dilation == 0) & (older > 0) & (older <= self.num_keys * self.dilation)
