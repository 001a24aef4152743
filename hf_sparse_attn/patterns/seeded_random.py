"""Random keys of each row (BigBird, Zaheer et al. 2020), drawn from a hash of the seed and the row's position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


def mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, of the lowest 32 bits of each number: int64 in, int64 under 2**32 out."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


@dataclass(frozen=True)
class SeededRandom:
    """`num_random_keys`, `seed`: so many draws from 0 .. p for the row at position p: `seeded_draws` of p modulo p + 1;
    where attention is not causal, from the whole document.

    They are the same on every device and however the rows are computed.
    """

    num_keys: int
    seed: int
    num_tokens: int | None

    @classmethod
    def of(cls, config: SparseAttentionConfig, num_tokens: int | None = None) -> SeededRandom | None:
        return cls(config.num_random_keys, config.seed, num_tokens) if config.num_random_keys else None

    def keys(self, position: Tensor) -> Tensor:
        draws = seeded_draws(position, self.num_keys, self.seed)
        return draws % (position[:, None] + 1 if self.num_tokens is None else self.num_tokens)

    def admits(self, row: int, position: Tensor) -> Tensor:
        return torch.isin(position, self.keys(torch.tensor([row], device=position.device)))


def seeded_draws(number: Tensor, num_draws: int, seed: int) -> Tensor:
    """Hashes [R, num_draws], 32 bits each as int64, of seed, number [R] and draw."""
    draw = torch.arange(num_draws, device=number.device)
    return mix(number[:, None] * 0x9E3779B1 + draw * 0x85EBCA77 + (seed * 0xC2B2AE3D & 0xFFFFFFFF))
