"""Random blocks of each block of rows (BigBird, Zaheer et al. 2020, arXiv 2007.14062, section 2 and appendix D)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.patterns.seeded_random import seeded_draws


@dataclass(frozen=True)
class RandomBlocks:
    """`num_random_blocks`, `block_size`, `block_offset`, `seed`: so many draws from the blocks before the row's own;
    where attention is not causal, from all blocks of the document.

    Blocks are numbered from 0, and all rows of block b read the same ones: `seeded_draws` of b modulo b, or modulo the
    number of blocks. Draws may coincide, and fall on neighbouring blocks.
    """

    num_blocks: int
    size: int
    offset: int
    seed: int
    num_tokens: int | None

    @classmethod
    def of(cls, config: SparseAttentionConfig, num_tokens: int | None = None) -> RandomBlocks | None:
        if not config.num_random_blocks:
            return None
        return cls(config.num_random_blocks, config.block_size, config.block_offset, config.seed, num_tokens)

    @property
    def num_keys(self) -> int:
        return self.num_blocks * self.size

    @property
    def _missing(self) -> int:
        """How many keys the first block lacks to be whole."""
        return -self.offset % self.size

    def _drawn(self, block: Tensor) -> Tensor:
        """Numbers [R, num_blocks] of the blocks that the rows in the blocks [R] read; negative: none."""
        drawn = seeded_draws(block, self.num_blocks, self.seed)
        if self.num_tokens is not None:
            return drawn % ((self.num_tokens - 1 + self._missing) // self.size + 1)
        return (drawn % block[:, None].clamp(min=1)).masked_fill_(block[:, None] == 0, -1)

    def keys(self, position: Tensor) -> Tensor:
        drawn = self._drawn((position + self._missing) // self.size)
        inside = torch.arange(self.size, device=position.device) - self._missing
        return (drawn[:, :, None] * self.size + inside).masked_fill_(drawn[:, :, None] < 0, -1).flatten(1)

    def admits(self, row: int, position: Tensor) -> Tensor:
        row_block = torch.tensor([(row + self._missing) // self.size], device=position.device)
        return torch.isin((position + self._missing) // self.size, self._drawn(row_block))
