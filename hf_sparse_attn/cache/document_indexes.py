"""The hash indexes of the documents in a cache layer: what lets a call go on where the last one stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

from torch import Tensor

from hf_sparse_attn import ops
from hf_sparse_attn.masks.documents import Document
from hf_sparse_attn.patterns import LayerPattern, Marked


class FixedStep(NamedTuple):
    """A step of one token for each row over a cache whose layers stay where they are, with room for more.

    All that changes between such steps is the values of tensors, so that they can be recorded and replayed.

    Args:
        slot: [1] int64, the token's slot, on the cache's device.
        padding: slots of padding before the first token of each row.
    """

    slot: Tensor
    padding: list[int]

    def documents(self, num_slots: int) -> list[Document]:
        """One for each row, as if all of the slots were in use."""
        return [
            Document(row, slice(0, 1), slice(first, num_slots), num_slots - first - 1, 0)
            for row, first in enumerate(self.padding)
        ]

    def newest(self, row: int) -> Tensor:
        """The index of a row's newest key among those of its document, [1]."""
        return self.slot - self.padding[row] if self.padding[row] else self.slot


class KeyIndexes:
    """One index for each row of a batch, of the document that its last keys belong to.

    The attention function finds it at the key tensor of a `SparseCache` or `SparseStaticCache`. An index is started
    anew where anything does not fit: another document, other padding, another configuration.
    """

    def __init__(self) -> None:
        # By batch row and layer: the layer's slot of the document's first key, the layer's pattern, and the index.
        self._of_row: dict[tuple[int, int], tuple[int, LayerPattern, ops.Index]] = {}
        self.step: FixedStep | None = None  # that is being computed

    def of(
        self, document: Document, pattern: LayerPattern, key: Tensor, marked: Marked | None = None
    ) -> ops.Index | None:
        """The index of a document, or None where there can be none.

        Args:
            document: which slots of the layer are its keys; padding between them is too much.
            pattern: the layer's pattern.
            key: [num_key_value_heads, N, head_dim], the document's keys.
            marked: which of them are global by their tokens.
        """
        if not isinstance(document.keys, slice):
            return None
        place, first = (document.batch, pattern.layer_idx), document.keys.start
        start, of_layer, index = self._of_row.get(place, (first, pattern, None))
        known = start == first and of_layer is pattern
        if self.step is not None and not known:
            raise RuntimeError("the pattern of a layer changed while a step of fixed shapes was prepared")
        if index is None or not known or index.key_offset != document.key_offset or index.length > key.shape[1]:
            index = ops.new_index(pattern, key, document.key_offset)
            if index is None:
                return None
            self._of_row[place] = first, pattern, index
        if self.step is None:
            self.take_back(document, pattern.layer_idx)
        if marked is not None:  # those of keys that the index has yet to take in, too
            index.pattern = dataclasses.replace(pattern, marked=marked)
        return index

    def take_back(self, document: Document, layer_idx: int) -> None:
        """Forget what stood where a document's queries have their own keys now, which have overwritten it."""
        if (document.batch, layer_idx) in self._of_row:
            index = self._of_row[document.batch, layer_idx][2]
            index.crop(max(document.query_offset - index.key_offset, 0))

    def is_ready(self, num_slots: int, room: int, padding: list[int], layers: Iterable[int]) -> bool:
        """Whether all indexes are ready for a `FixedStep`; they make room for it.

        Args:
            num_slots: filled slots.
            room: slots that there are.
            padding: see `FixedStep`.
            layers: indices of the model's layers that have an index.
        """
        for layer in layers:
            for row, first in enumerate(padding):
                start, _, index = self._of_row.get((row, layer), (-1, None, None))
                if index is None or start != first or index.key_offset or not index.has_fixed_steps:
                    return False
                fixed = cast("ops.FixedStepIndex", index)
                fixed.reserve(room - first)
                if not fixed.is_ready(num_slots - first, room - first):
                    return False
        return True

    def advance(self, room: int) -> None:
        """Count on after a `FixedStep`."""
        for start, index in self._fixed():
            index.advance(room - start)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that a `FixedStep` reads and writes in place."""
        return [x for _, index in self._fixed() for x in index.tensors]

    def _fixed(self) -> Iterator[tuple[int, ops.FixedStepIndex]]:
        for start, _, index in self._of_row.values():
            if index.has_fixed_steps:  # others are of an earlier configuration
                yield start, cast("ops.FixedStepIndex", index)

    def crop(self, num_slots: int) -> None:
        """Forget the keys after the layer's first `num_slots`."""
        for place, (start, _, index) in list(self._of_row.items()):
            if num_slots <= start:
                del self._of_row[place]
            else:
                index.crop(num_slots - start)

    def select(self, rows: list[int]) -> None:
        """Row i becomes a copy of what row rows[i] was."""
        self._of_row = {
            (i, layer): (start, pattern, index.copy())
            for i, chosen in enumerate(rows)
            for (row, layer), (start, pattern, index) in self._of_row.items()
            if row == chosen
        }

    def clear(self) -> None:
        self._of_row.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes."""
        return sum(index.nbytes for _, _, index in self._of_row.values())
