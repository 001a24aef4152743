"""How documents become rows of one length, on arrays: documents are [tokens] and rows [3, context_length], int64.

The three lines of a row are its input_ids, position_ids and labels. position_ids restart at every piece of a document,
which is how Transformers recognises packing (it also needs a forward without attention_mask and without a cache). The
first token of a piece is not a target, having nothing to be predicted from.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

IGNORED_LABEL = -100  # what the loss of Transformers and PyTorch skips


def packed_rows(documents: Iterable[np.ndarray], context_length: int) -> Iterator[np.ndarray]:
    """Documents end to end, cut where a row ends."""
    row = np.empty((3, context_length), dtype=np.int64)
    filled = 0
    for ids in documents:
        start = 0
        while start < len(ids):
            piece = ids[start : start + context_length - filled]
            row[:, filled : filled + len(piece)] = _lines(piece)
            start += len(piece)
            filled += len(piece)
            if filled < context_length:
                continue
            if row[1].any():  # a second token of some piece
                yield row
                row = np.empty_like(row)
            elif start < len(ids):
                start = 0
            filled = 0


def windowed_rows(documents: Iterable[np.ndarray], context_length: int) -> Iterator[np.ndarray]:
    """Whole windows, each inside one document."""
    for ids in documents:
        for window in ids[: len(ids) // context_length * context_length].reshape(-1, context_length):
            yield _lines(window)


def best_fit_rows(documents: Sequence[np.ndarray], context_length: int, pad_token_id: int) -> Iterator[np.ndarray]:
    """Documents that fit a row whole, by best-fit decreasing; rows come in the order of their first documents.

    Longer documents give whole rows, and their rest as one more piece. What no piece fits into is padding, a piece of
    its own without targets. Rests and documents of one token are left out.
    """
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    rows = best_fit_bins(lengths % context_length, context_length)
    rows.sort(key=lambda row: row[0])
    position = 0
    for index, ids in enumerate(documents):
        yield from windowed_rows([ids], context_length)
        while position < len(rows) and rows[position][0] == index:
            pieces = (documents[item] for item in rows[position])
            rests = [ids[len(ids) // context_length * context_length :] for ids in pieces]
            yield _row(rests, context_length, pad_token_id)
            position += 1


def best_fit_bins(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of pieces that go into one bin each: the longest first, each where it leaves the least free.

    After "Fewer Truncations Improve Language Modeling" (Ding et al., 2024). Bins are kept by what is free in them, so
    that N pieces take a time of N log N. Pieces of fewer than two tokens go nowhere.

    Args:
        lengths: [N] int64, each below or equal to `capacity`.

    Returns:
        Bins with their items in ascending order.
    """
    bins: list[list[int]] = []
    by_free: dict[int, list[int]] = {}
    frees: list[int] = []  # the keys of by_free, sorted
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length < 2:
            break
        at = bisect_left(frees, length)
        if at == len(frees):
            number, free = len(bins), capacity
            bins.append([])
        else:
            free = frees[at]
            number = by_free[free].pop()
            if not by_free[free]:
                del by_free[free], frees[at]
        bins[number].append(item)
        free -= length
        if free not in by_free:
            by_free[free] = []
            insort(frees, free)
        by_free[free].append(number)
    return [sorted(items) for items in bins]


def _row(pieces: list[np.ndarray], context_length: int, pad_token_id: int) -> np.ndarray:
    free = context_length - sum(map(len, pieces))
    padding = np.stack([np.full(free, pad_token_id), np.arange(free), np.full(free, IGNORED_LABEL)])
    return np.concatenate([*map(_lines, pieces), padding], axis=1)


def _lines(piece: np.ndarray) -> np.ndarray:
    labels = np.concatenate([[IGNORED_LABEL], piece[1:]])
    return np.stack([piece, np.arange(len(piece)), labels]).astype(np.int64, copy=False)
