"""The two kinds of patterns, and what each must say of itself."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig


class StaticKeys(Protocol):
    """Keys that every row at or after their position attends to; where attention is not causal, every row."""

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Sorted positions from `start` to `stop` - 1 of its keys, int64. The fast paths read these."""

    def admits(self, position: Tensor) -> Tensor:
        """Whether the keys at these positions [N] are its own: [N] bool. The specification reads this rule."""


class StaticPattern(StaticKeys, Protocol):
    """Static keys that a config names by itself."""

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> StaticPattern | None:
        """The pattern that a config asks for; None: it asks for none."""


class RowPattern(Protocol):
    """Keys of a row's own, chosen by nothing but the row's position and, where attention is not causal, the number of
    the document's tokens, `num_tokens`; None: attention is causal."""

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> RowPattern | None:
        """The pattern that a config asks for; None: it asks for none."""

    @property
    def num_keys(self) -> int:
        """The most keys that a row has."""

    def keys(self, position: Tensor, num_tokens: int | None = None) -> Tensor:
        """Positions [R, num_keys] (int64) of the keys of the rows at positions [R]; negative: none. May repeat."""

    def admits(self, row: int, position: Tensor, num_tokens: int | None = None) -> Tensor:
        """Whether the keys at these positions [N] are the row's: [N] bool. The specification reads this rule."""
