"""Rows of tokens that a training reads: documents packed into them, or windows inside documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from hf_sparse_attn.data.packing import IGNORED_LABEL, best_fit_rows, packed_rows, windowed_rows
from hf_sparse_attn.data.tables import CHUNK, temporary_dataset
from hf_sparse_attn.errors import check_integer

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("input_ids", "position_ids", "labels")


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
        Columns "input_ids", "position_ids", "labels", each `context_length` ints a row, in a temporary file.

    Raises:
        ValueError: all documents together are shorter than one row, or fill no row that has a target.
    """
    check_context_length(context_length)
    return _checked(dataset_of_rows(packed_rows(_token_ids(tokens), context_length)), tokens, context_length)


def best_fit(tokens: Dataset, context_length: int, pad_token_id: int = 0) -> Dataset:
    """Rows of exactly `context_length` tokens with documents that fit into one whole, by best-fit decreasing.

    Longer documents give whole rows and one more piece, their rest. The tail of a row into which no piece fits is
    filled with `pad_token_id`: a piece of its own, whose position_ids restart and whose labels are all
    `IGNORED_LABEL`. Rests and documents of one token, which have no target, are left out. Rows are the same each time
    and come in the order of their first documents.

    Args:
        tokens: what `tokenize` returns.
        pad_token_id: any token, at least 0; nothing sees padding.

    Returns:
        Columns as those of `packed`.

    Raises:
        ValueError: pad_token_id is none, all documents together are shorter than one row, or are single tokens.
    """
    check_context_length(context_length)
    check_integer("pad_token_id", pad_token_id, 0)
    documents = list(_token_ids(tokens))
    total = sum(map(len, documents))
    rows = best_fit_rows(documents if total >= context_length else [], context_length, pad_token_id)
    return _checked(dataset_of_rows(rows), tokens, context_length)


def windowed(tokens: Dataset, context_length: int) -> Dataset:
    """Windows of exactly `context_length` tokens, each inside one document; incomplete last windows are dropped.

    Args:
        tokens: what `tokenize` returns.

    Returns:
        Columns "input_ids", "position_ids", "labels", each `context_length` ints a row, in a temporary file.

    Raises:
        ValueError: every document is shorter than one window.
    """
    check_context_length(context_length)
    rows = dataset_of_rows(windowed_rows(_token_ids(tokens), context_length))
    if len(rows) == 0:
        raise ValueError(
            f"dataset has no document of {context_length} tokens: the longest has {max(lengths(tokens), default=0)}"
        )
    return rows


def lengths(tokens: Dataset) -> list[int]:
    """Number of tokens of each document."""
    return [len(ids) for ids in _token_ids(tokens)]


def targets(rows: Dataset) -> np.ndarray:
    """Number of tokens of each row that the loss is computed for: [rows] int64."""
    batches = rows.select_columns("labels").with_format("arrow").iter(batch_size=64)
    labels = (np.asarray(row.values) for batch in batches for row in batch["labels"])
    return np.fromiter((np.count_nonzero(row != IGNORED_LABEL) for row in labels), dtype=np.int64)


def check_context_length(context_length: int) -> None:
    """Make sure that a row can have a target.

    Raises:
        ValueError: it cannot.
    """
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (a token and its target), got {context_length}")


def _checked(rows: Dataset, tokens: Dataset, context_length: int) -> Dataset:
    if len(rows) > 0:
        return rows
    found = lengths(tokens)
    total = sum(found)
    if total < context_length:
        raise ValueError(f"dataset has {total} tokens in all, fewer than one row of {context_length}")
    raise ValueError(
        f"dataset has {total} tokens in all, which fill no row of {context_length} with a target: "
        f"{found.count(1)} of its documents are single tokens, with nothing to be predicted from"
    )


def _token_ids(tokens: Dataset) -> Iterator[np.ndarray]:
    # As Arrow arrays, whose values need not be copied: a list of Python's ints takes five times the memory.
    for batch in tokens.select_columns("input_ids").with_format("arrow").iter(batch_size=64):
        for ids in batch["input_ids"]:
            yield np.asarray(ids.values)


def dataset_of_rows(rows: Iterable[np.ndarray]) -> Dataset:
    """Rows of input_ids, position_ids and labels, each [3, context_length], as a dataset in a temporary file."""
    import pyarrow as pa

    schema = pa.schema({name: pa.list_(pa.int32()) for name in COLUMNS})

    def batches() -> Iterator[pa.RecordBatch]:
        remaining = iter(rows)
        for first in remaining:
            chunk = np.stack([first, *islice(remaining, CHUNK // len(first[0]))], axis=1).astype(np.int32)
            offsets = np.arange(chunk.shape[1] + 1, dtype=np.int32) * chunk.shape[2]
            columns = [pa.ListArray.from_arrays(offsets, line.reshape(-1)) for line in chunk]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return temporary_dataset(batches(), schema)
