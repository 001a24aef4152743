"""Long documents: where they come from, their tokens, and the rows that fine-tuning reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse_attn.demo import demo_documents
from hf_sparse_attn.local_files import CHUNK, check_text, document_name, local_path, no_column, read_local

if TYPE_CHECKING:
    from datasets import Dataset

PROGRESS_FROM = 200  # documents
IGNORED_LABEL = -100  # what the loss of Transformers and PyTorch skips


def load_documents(dataset: str, split: str = "train") -> Dataset:
    """Documents of a dataset: a `datasets.Dataset` with the columns "name" and "text".

    `dataset` is one of
    - `demo`: the documents of `hf_sparse_attn.demo`;
    - a .txt or .md file (one document), a .jsonl or .parquet file (one document a line or row, in its "text" column
      or in the one named by `FILE:column`), or a directory of such files, searched recursively and read in order of
      path; links to directories are not followed, and pipes, devices and links to nothing are passed over. Text is
      UTF-8, with or without a byte order mark. Local data has no splits: all of it is returned whatever `split` is;
    - a Hub id with optional parts, `id:config:split:column`; an empty part keeps its default, and a split given
      here goes before the `split` argument.

    Names come from the column "name" where a row has one. Nulls in the column are documents without text, which are
    left out. Local documents wait in a temporary file (under TMPDIR), of which memory holds what is being read.

    Raises:
        FileNotFoundError: a local file or directory does not exist.
        OSError: a file or directory cannot be opened; the message names it.
        ValueError: the dataset is empty, or a file of it lacks the column, holds something else than text in it, or
            cannot be read; the message starts with the dataset and names the file, and the line of a .jsonl file.
    """
    from datasets import Dataset

    if dataset == "demo":
        return Dataset.from_list(demo_documents(split))
    local = local_path(dataset)
    documents = _read_hub(dataset, split) if local is None else read_local(dataset, *local)
    with _progress(documents):
        documents = documents.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if len(documents) == 0:
        raise ValueError(f"dataset {dataset!r} is empty: it holds no document with any text")
    return documents


def tokenize(documents: Dataset, tokenizer: Any) -> Dataset:
    """Documents with their tokens: the columns "name" and "input_ids" (a list of ints per document, maybe empty)."""
    from datasets import Features, Sequence, Value

    # Told, not inferred: the first documents may have no tokens, and an empty list has no type.
    features = Features({"name": Value("string"), "input_ids": Sequence(Value("int64"))})
    with _progress(documents):
        return documents.map(
            _tokenize_batch,
            batched=True,
            batch_size=8,
            remove_columns=documents.column_names,
            features=features,
            fn_kwargs={"tokenizer": tokenizer},
            desc="tokenizing",
        )


def long_documents(
    documents: Dataset, tokenizer: Any, num_tokens: int, max_documents: int | None = None
) -> list[dict[str, Any]]:
    """The first `max_documents` documents of at least `num_tokens` tokens, each cut to its first `num_tokens`.

    Documents are tokenised as they are needed, so a large dataset is read only as far as it must be.

    Returns:
        Dicts with "name" and "input_ids" (a list of `num_tokens` ints).

    Raises:
        ValueError: no document is long enough; the message says how long the longest one is.
    """
    stream = documents.to_iterable_dataset().map(
        _tokenize_batch,
        batched=True,
        batch_size=1,
        remove_columns=documents.column_names,
        fn_kwargs={"tokenizer": tokenizer},
    )
    chosen: list[dict[str, Any]] = []
    longest = 0
    for document in stream:
        longest = max(longest, len(document["input_ids"]))
        if len(document["input_ids"]) >= num_tokens:
            chosen.append({"name": document["name"], "input_ids": document["input_ids"][:num_tokens]})
        if max_documents is not None and len(chosen) >= max_documents:
            break
    if not chosen:
        raise ValueError(
            f"dataset has no document of at least {num_tokens} tokens: the longest of its {len(documents)} "
            f"documents has {longest}"
        )
    return chosen


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


@contextmanager
def _progress(documents: Dataset) -> Iterator[None]:
    """Keep the progress bars of `datasets` to long work: for a few documents they are noise among the messages."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = len(documents) < PROGRESS_FROM and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


def _check_context_length(context_length: int) -> None:
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (a token and its target), got {context_length}")


def _tokenize_batch(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, list[Any]]:
    # verbose=False: the tokenizer's warning about its maximum length says nothing new about long documents.
    return {"name": batch["name"], "input_ids": tokenizer(batch["text"], verbose=False)["input_ids"]}


def _read_hub(dataset: str, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    parts = dataset.split(":")
    if len(parts) > 4:
        raise ValueError(f"dataset {dataset!r}: expected at most id:config:split:column")
    hub_id, config, own_split, column = parts + [""] * (4 - len(parts))
    try:
        table = load_dataset(hub_id, config or None, split=own_split or split)
    except DatasetsError as error:  # often "an error occurred", for the reason that it was raised from
        raise ValueError(f"dataset {dataset!r} cannot be loaded: {error.__cause__ or error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {dataset!r} cannot be loaded: {error}") from error
    return _name_and_text(dataset, table, hub_id, column or "text")


def _name_and_text(dataset: str, table: Dataset, name: str, column: str) -> Dataset:
    from datasets import Features, Value

    if column not in table.column_names:
        raise ValueError(no_column(f"dataset {dataset!r}", column, table.column_names))
    for chunk in table.data.column(column).chunks:
        check_text(f"dataset {dataset!r}", column, chunk)
    wanted = [wanted for wanted in dict.fromkeys((column, "name")) if wanted in table.column_names]

    def rename(row: dict[str, Any], index: int) -> dict[str, str]:
        own_name = row["name"] if len(wanted) > 1 else None
        return {"name": document_name(own_name, f"{name}, row {index}"), "text": row[column]}

    # Told, not inferred: the first documents may all be null.
    features = Features({"name": Value("large_string"), "text": Value("large_string")})
    with _progress(table):
        return table.select_columns(wanted).map(rename, with_indices=True, remove_columns=wanted, features=features)
