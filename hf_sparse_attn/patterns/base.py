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
    """Keys of a row's own, chosen by its position and, where attention is not causal, the document's length alone."""

    @classmethod
    def of(cls, config: SparseAttentionConfig, num_tokens: int | None = None) -> RowPattern | None:
        """The pattern that a config asks for; None: it asks for none.

        Args:
            config: the config.
            num_tokens: of the document, where attention is not causal; None: rows read nothing after them.
        """

    @property
    def num_keys(self) -> int:
        """The most keys that a row has."""

    def keys(self, position: Tensor) -> Tensor:
        """Positions [R, num_keys] (int64) of the keys of the rows at positions [R]. Those outside the document count
        for nothing, and some may repeat."""

    def admits(self, row: int, position: Tensor) -> Tensor:
        """Whether the keys at these positions [N] are the row's: [N] bool. The specification reads this rule."""
