"""Rows of tokens that a training reads: documents packed one after the other, or windows inside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from hf_sparse_attn.data.local_files import CHUNK

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED_LABEL = -100  # what the loss of Transformers and PyTorch skips


def packed(tokens: Dataset, context_length: int) -> Dataset:
    """Rows of exactly `context_length` tokens, documents one after the other; the incomplete last row is dropped.

    `position_ids` restart at every document, which is how Transformers recognises packing (it also needs a forward
    without attention_mask and without a cache). A document that continues in the next row restarts there too: its
    earlier part is out of sight. The first token of each piece is not a target, having nothing to be predicted from.

    Every row has a target: one of nothing but pieces of a single token is dropped. A document whose first token would
    end such a row starts the next one instead, so that what is dropped are documents of one token and last tokens
    that were alone at the beginning of the row.

    Args:
        tokens: what `tokenize` returns.

    Returns:
        Columns "input_ids", "position_ids", "labels", each `context_length` ints a row.

    Raises:
        ValueError: all documents together are shorter than one row, or fill no row that has a target.
    """
    _check_context_length(context_length)
    rows = _dataset_of_rows(_packed_rows(_token_ids(tokens), context_length))
    if len(rows) == 0:
        lengths = [len(ids) for ids in _token_ids(tokens)]
        total = sum(lengths)
        if total < context_length:
            raise ValueError(f"dataset has {total} tokens in all, fewer than one row of {context_length}")
        raise ValueError(
            f"dataset has {total} tokens in all, which fill no row of {context_length} with a target: "
            f"{lengths.count(1)} of its documents are single tokens, with nothing to be predicted from"
        )
    return rows


def windowed(tokens: Dataset, context_length: int) -> Dataset:
    """Windows of exactly `context_length` tokens, each inside one document; incomplete last windows are dropped.

    Args:
        tokens: what `tokenize` returns.

    Returns:
        Columns "input_ids", "position_ids", "labels", each `context_length` ints a row.

    Raises:
        ValueError: every document is shorter than one window.
    """
    _check_context_length(context_length)
    positions = np.arange(context_length)
    rows = _dataset_of_rows(
        np.stack([window, positions, _labels(window)])
        for ids in _token_ids(tokens)
        for window in ids[: len(ids) // context_length * context_length].reshape(-1, context_length)
    )
    if len(rows) == 0:
        longest = max((len(ids) for ids in _token_ids(tokens)), default=0)
        raise ValueError(f"dataset has no document of {context_length} tokens: the longest has {longest}")
    return rows


def _packed_rows(documents: Iterable[np.ndarray], context_length: int) -> Iterator[np.ndarray]:
    row = np.empty((3, context_length), dtype=np.int64)
    filled = 0
    for ids in documents:
        start = 0
        while start < len(ids):
            piece = ids[start : start + context_length - filled]
            row[:, filled : filled + len(piece)] = piece, np.arange(len(piece)), _labels(piece)
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


def _labels(piece: np.ndarray) -> np.ndarray:
    return np.concatenate([[IGNORED_LABEL], piece[1:]])


def _token_ids(tokens: Dataset) -> Iterator[np.ndarray]:
    # As Arrow arrays, whose values need not be copied: a list of Python's ints takes five times the memory.
    for batch in tokens.select_columns("input_ids").with_format("arrow").iter(batch_size=8):
        for ids in batch["input_ids"]:
            yield np.asarray(ids.values, dtype=np.int64)


def _dataset_of_rows(rows: Iterator[np.ndarray]) -> Dataset:
    """Rows of input_ids, position_ids and labels, each [3, context_length], as a dataset."""
    from datasets import Dataset, concatenate_datasets

    chunks = [Dataset.from_dict({"input_ids": [], "position_ids": [], "labels": []})]
    for first in rows:
        chunk = np.stack([first, *islice(rows, CHUNK // len(first[0]))], axis=1)  # [3, rows, context_length]
        chunks.append(Dataset.from_dict(dict(zip(("input_ids", "position_ids", "labels"), chunk, strict=True))))
    return concatenate_datasets(chunks[1:] or chunks)


def _check_context_length(context_length: int) -> None:
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (a token and its target), got {context_length}")
