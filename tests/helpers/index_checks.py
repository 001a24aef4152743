"""Checks of the index of a cached document, for the implementation whose index it is.

Rows that go on where the last call stopped read what they read in one shot.
"""

from dataclasses import dataclass
from typing import Any

import torch

from helpers.cases import FEATURES, LENGTH, inputs, pattern_of
from helpers.operation import KeyMask, attend
from hf_sparse_attn.ops.numba import index as numba_index

SIZES = (60, 1, 1, 5, 1, 17, 1)  # the last one is repeated
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@dataclass(frozen=True)
class Implementation:
    """Where an index comes from, and how many tokens its tests have time for."""

    name: str
    module: Any
    length: int = LENGTH
    device: str = "cpu"

    def index(self, pattern):
        return self.module.Index(pattern, len(pattern.budgets), 0)

    def pattern(self, fields, **others):
        return pattern_of(fields, device=self.device, **others)

    def inputs(self, **others):
        return inputs(self.length, self.length, device=self.device, **others)

    def go_on(self, pattern, query, key, value, index, start, stop, **others):
        """Rows start .. stop - 1 over the keys before `stop`."""
        rows = query[:, start:stop], key[:, :stop], value[:, :stop]
        return attend(*rows, pattern, self.name, index=index, **others)


NUMBA = Implementation("numba", numba_index)


def in_steps(implementation, pattern, tensors, sizes=SIZES, **others):
    index, pieces, start = implementation.index(pattern), [], 0
    length = tensors[1].shape[1]
    for size in (*sizes, *[sizes[-1]] * length):
        stop = min(start + size, length)
        if stop > start:
            pieces.append(implementation.go_on(pattern, *tensors, index, start, stop, **others))
        start = stop
    return torch.cat(pieces, 1)


def check_steps(name="everything at once", sizes=SIZES, implementation=NUMBA, **others):
    """Output and the keys that are read."""
    pattern, tensors = implementation.pattern(FEATURES[name]), implementation.inputs()
    ours, expected = (KeyMask(4, implementation.length, implementation.length) for _ in range(2))
    output = in_steps(implementation, pattern, tensors, sizes, recorder=ours, **others)
    specified = attend(*tensors, pattern, "reference", recorder=expected, **others)
    torch.testing.assert_close(output, specified, **EXACT)
    assert torch.equal(ours.mask, expected.mask)


def check_taken_back(start=70, wrong=7, name="defaults of this file", steps=20, implementation=NUMBA):
    """Tokens are appended, taken back, and others follow, as in assisted generation: over the start of a page too."""
    pattern, tensors = implementation.pattern(FEATURES[name]), implementation.inputs()
    others, go_on = implementation.inputs(seed=1), implementation.go_on
    expected = attend(*tensors, pattern, "reference")
    index = implementation.index(pattern)
    go_on(pattern, *tensors, index, 0, start)
    for row in range(start, start + steps):
        tried = [torch.cat([x[:, :row], y[:, : wrong + 1]], 1) for x, y in zip(tensors, others, strict=True)]
        middle = row + wrong // 2
        go_on(pattern, *tried, index, row, middle + 1)
        for later in range(middle + 1, row + wrong + 1):
            go_on(pattern, *tried, index, later, later + 1)
        index.crop(row)
        output = go_on(pattern, *tensors, index, row, row + 1)
        torch.testing.assert_close(output, expected[:, row : row + 1], **EXACT)


def check_same_rows_again(implementation=NUMBA):
    """A row is computed twice, without a word to the index."""
    pattern, tensors, length = implementation.pattern({}), implementation.inputs(), implementation.length
    index = implementation.index(pattern)
    implementation.go_on(pattern, *tensors, index, 0, length)
    for start in (length - 1, length - 9, length - 1, length - 40):
        output = implementation.go_on(pattern, *tensors, index, start, length)
        torch.testing.assert_close(output, attend(*tensors, pattern, "reference")[:, start:], **EXACT)


def check_copies(implementation=NUMBA, start=100):
    """Two go on from the same keys with others."""
    pattern, tensors = implementation.pattern({}), implementation.inputs()
    others = zip(tensors, implementation.inputs(seed=1), strict=True)
    others = [torch.cat([x[:, :start], y[:, start:]], 1) for x, y in others]
    first = implementation.index(pattern)
    implementation.go_on(pattern, *tensors, first, 0, start)
    second = first.copy()
    for i in range(start, implementation.length):
        for index, tried in ((first, tensors), (second, others)):
            output = implementation.go_on(pattern, *tried, index, i, i + 1)
            expected = attend(*(x[:, : i + 1] for x in tried), pattern, "reference")[:, i:]
            torch.testing.assert_close(output, expected, **EXACT)


def check_any_steps(steps, name, implementation=NUMBA):
    """(tokens appended, tokens taken back) in any order."""
    pattern, tensors = implementation.pattern(FEATURES[name]), implementation.inputs()
    expected = attend(*tensors, pattern, "reference")
    index, length = implementation.index(pattern), 0
    for appended, removed in [*steps, (implementation.length, 0)]:
        stop = min(length + appended, implementation.length)
        if stop > length:
            output = implementation.go_on(pattern, *tensors, index, length, stop)
            torch.testing.assert_close(output, expected[:, length:stop], **EXACT)
        length = max(stop - removed, 0)
        index.crop(length)
        assert index.length <= length
