"""A row's own block and blocks right before it (the blocked window of BigBird, Zaheer et al. 2020, arXiv 2007.14062).

Alone, with `block_offset` for half of the heads, these are the shifted groups of LongLoRA (Chen et al. 2023, arXiv
2309.12307, section 3.2), but that none reads from the document's end at its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


@dataclass(frozen=True)
class Blocks:
    """`block_size`, `block_offset`, `num_neighbouring_blocks`: the row's block up to the row, and so many before it."""

    size: int
    offset: int
    num_neighbours: int

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> Blocks | None:
        if not config.block_size:
            return None
        return cls(config.block_size, config.block_offset, config.num_neighbouring_blocks)

    @property
    def num_keys(self) -> int:
        return self.size * (1 + self.num_neighbours)

    def keys(self, position: Tensor, num_tokens: int | None = None) -> Tensor:
        position = position[:, None]
        place = (position - self.offset) % self.size  # in the row's block
        older = torch.arange(self.num_keys, device=position.device)
        return (position - older).masked_fill_(older > place + self.size * self.num_neighbours, -1)

    def admits(self, row: int, position: Tensor, num_tokens: int | None = None) -> Tensor:
        before = (row - self.offset) // self.size - (position - self.offset) // self.size
        return (before <= self.num_neighbours) & (position <= row)
