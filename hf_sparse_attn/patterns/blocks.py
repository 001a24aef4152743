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
    """`block_size`, `block_offset`, `num_neighbouring_blocks`: the row's block up to the row, and so many before it;
    where attention is not causal, the whole block and so many on either side."""

    size: int
    offset: int
    num_neighbours: int
    both_sides: bool

    @classmethod
    def of(cls, config: SparseAttentionConfig, num_tokens: int | None = None) -> Blocks | None:
        if not config.block_size:
            return None
        return cls(config.block_size, config.block_offset, config.num_neighbouring_blocks, num_tokens is not None)

    @property
    def num_keys(self) -> int:
        return self.size * (1 + (2 if self.both_sides else 1) * self.num_neighbours)

    def keys(self, position: Tensor) -> Tensor:
        position = position[:, None]
        place = (position - self.offset) % self.size  # in the row's block
        keys = position - place - self.size * self.num_neighbours + torch.arange(self.num_keys, device=position.device)
        return keys if self.both_sides else keys.masked_fill_(keys > position, -1)

    def admits(self, row: int, position: Tensor) -> Tensor:
        before = (row - self.offset) // self.size - (position - self.offset) // self.size
        if self.both_sides:
            return before.abs() <= self.num_neighbours
        return (before <= self.num_neighbours) & (position <= row)
