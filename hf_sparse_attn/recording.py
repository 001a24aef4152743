"""What the rows of a forward pass really read: for density, pictures and measures of kept attention mass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_sparse_attn.routing import LayerPattern


class Recorder(Protocol):
    """Receives every row's keys; put in place by `integration.record`."""

    def add(
        self, pattern: LayerPattern, head: int, position: Tensor, attended: Tensor, keys: Callable[[], Tensor]
    ) -> None:
        """Rows at `position` [R] of one head read the keys at positions `keys()` [R, K] where `attended` [R, K]."""

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        """Rows at positions start .. stop - 1 of the heads read everything admissible."""


class DensityRecorder:
    """Counts attended and admissible (row, key) pairs."""

    def __init__(self) -> None:
        self.attended = 0
        self.admissible = 0

    @property
    def density(self) -> float:
        """Attended over admissible pairs; NaN before any forward."""
        return self.attended / self.admissible if self.admissible else float("nan")

    def add(
        self, pattern: LayerPattern, head: int, position: Tensor, attended: Tensor, keys: Callable[[], Tensor]
    ) -> None:
        self.attended += int(attended.sum())
        self.admissible += _admissible(position, pattern.sliding_window)

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        pairs = len(heads) * _admissible(torch.arange(start, stop), pattern.sliding_window)
        self.attended += pairs
        self.admissible += pairs


def _admissible(position: Tensor, sliding_window: int | None) -> int:
    pairs = position + 1 if sliding_window is None else (position + 1).clamp(max=sliding_window)
    return int(pairs.sum())
