"""Attention dropout without a generator: which weights are dropped is a hash of numbers that the caller knows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_sparse_attn.patterns.seeded_random import mix

_DRAWS = 2**32


@dataclass(frozen=True)
class Dropout:
    """Each attention weight is dropped with probability `p`, independently; the others are divided by 1 - p.

    The draw of a (row, key) pair is a 32-bit integer hash (the finaliser of MurmurHash3) of the seed, the batch row,
    the query head and the positions of row and key: the same on every device, in a recompute, however the rows are
    computed.

    Args:
        p: at least 0 and under 1.
        seed: at least 0 and under 2**63.
        batch: index of the batch row.
        first_head: index of the query head that counts as 0.
    """

    p: float
    seed: int
    batch: int = 0
    first_head: int = 0

    def factors(self, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        """What weights are multiplied by, 0 or 1 / (1 - p), float64.

        Args:
            head: indices of query heads, int64; the three are broadcast.
            row, key: positions, int64.
        """
        stream = mix((head + self.first_head) * 0x9E3779B1 + self.seed)
        stream = mix(stream + (self.seed >> 32) * 0xC2B2AE3D % _DRAWS + self.batch * 0x27D4EB2F)
        draw = mix(mix(stream + row * 0x9E3779B1) + key * 0x85EBCA77)
        return (draw >= round(self.p * _DRAWS)).double() / (1 - self.p)
