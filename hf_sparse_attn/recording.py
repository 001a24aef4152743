"""What the rows of a forward pass really read: for density, pictures and measures of kept attention mass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_sparse_attn.patterns import LayerPattern


class Recorder(Protocol):
    """Receives every row's keys; put in place by `integration.record`."""

    def add(
        self,
        pattern: LayerPattern,
        head: int,
        position: Tensor,
        num_attended: int,
        num_scored: int,
        read: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        """Rows at `position` [R] of one head read `num_attended` keys in all, and scored `num_scored` to choose them.

        `read()` tells which, until this returns: (attended [R, K] bool, keys [R, K]); a row reads the keys at those
        positions `keys` where it has `attended`.
        """

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        """Rows at positions start .. stop - 1 of the heads read everything admissible."""


def at_hand(attended: Tensor, keys: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The `read` of `Recorder.add` for tensors that are there already."""
    return lambda: (attended, keys)


class Recorders:
    """Several recorders that are told the same."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self.recorders = recorders

    def add(self, *rows: Any) -> None:
        for recorder in self.recorders:
            recorder.add(*rows)

    def add_dense(self, *rows: Any) -> None:
        for recorder in self.recorders:
            recorder.add_dense(*rows)


def together(recorders: Sequence[Recorder]) -> Recorder | None:
    """One recorder for all; None if there is none."""
    return recorders[0] if len(recorders) == 1 else Recorders(recorders) if recorders else None


class HeadsFrom:
    """Tells a recorder of some of a layer's heads, from `first` on, that count from 0 themselves."""

    def __init__(self, recorder: Recorder, first: int) -> None:
        self._recorder, self._first = recorder, first

    def add(self, pattern: LayerPattern, head: int, *rows: Any) -> None:
        self._recorder.add(pattern, self._first + head, *rows)

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        own = range(self._first + heads.start, self._first + heads.stop)
        self._recorder.add_dense(pattern, own, start, stop)


class DensityRecorder:
    """Counts (row, key) pairs: attended, scored with the row's own query, and admissible.

    Pairs of local layers, which the model's own small window keeps dense, are counted apart, in `local`: sparsity
    cannot change them.
    """

    def __init__(self) -> None:
        self.attended = 0
        self.scored = 0
        self.admissible = 0
        self.local = 0

    @property
    def density(self) -> float:
        """Attended over admissible pairs; 1 if all layers are local, and NaN before any forward."""
        return self._share(self.attended)

    @property
    def scored_density(self) -> float:
        """Scored over admissible pairs, products of queries and keys that were formed; 1 and NaN as for `density`."""
        return self._share(self.scored)

    def _share(self, pairs: int) -> float:
        if not self.admissible:
            return 1.0 if self.local else float("nan")
        return pairs / self.admissible

    def add(
        self,
        pattern: LayerPattern,
        head: int,
        position: Tensor,
        num_attended: int,
        num_scored: int,
        read: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self.attended += num_attended
        self.scored += num_scored
        self.admissible += admissible_pairs(position, pattern.sliding_window, pattern.num_tokens)

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        position = torch.arange(start, stop)
        pairs = len(heads) * admissible_pairs(position, pattern.sliding_window, pattern.num_tokens)
        if pattern.is_local:
            self.local += pairs
            return
        self.attended += pairs
        self.scored += pairs
        self.admissible += pairs


def admissible_pairs(position: Tensor, sliding_window: int | None, num_tokens: int | None = None) -> int:
    """(row, key) pairs of one head's rows at the given positions [R] that the model itself admits.

    Args:
        num_tokens: of the document, where attention is not causal; None: rows read nothing after them.
    """
    pairs = position + 1 if sliding_window is None else (position + 1).clamp(max=sliding_window)
    total = int(pairs.sum())
    if num_tokens is not None:
        total += admissible_pairs(num_tokens - 1 - position, sliding_window) - len(position)
    return total
