"""Long documents: where they come from, their tokens, and the rows that fine-tuning reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.demo import demo_documents

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
PROGRESS_FROM = 200  # documents
IGNORED_LABEL = -100  # what the loss of Transformers and PyTorch skips


def load_documents(dataset: str, split: str = "train") -> Dataset:
    """Documents of a dataset: a `datasets.Dataset` with the columns "name" and "text".

    `dataset` is one of
    - `demo`: the documents of `hf_sparse_attn.demo`;
    - a .txt or .md file (one document), a .jsonl or .parquet file (one document a line or row, in its "text" column
      or in the one named by `FILE:column`), or a directory of such files, searched recursively and read in order of
      path. Local data has no splits: all of it is returned whatever `split` is;
    - a Hub id with optional parts, `id:config:split:column`; an empty part keeps its default, and a split given
      here goes before the `split` argument.

    Raises:
        FileNotFoundError: a local file or directory does not exist.
        ValueError: the dataset is empty, lacks the column, or cannot be read; the message starts with the dataset.
    """
    from datasets import Dataset

    if dataset == "demo":
        return Dataset.from_list(demo_documents(split))
    local = _local_path(dataset)
    documents = _read_hub(dataset, split) if local is None else _read_local(dataset, *local)
    with _progress(documents):
        documents = documents.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if len(documents) == 0:
        raise ValueError(f"dataset {dataset!r} is empty: it holds no document with any text")
    return documents


def tokenize(documents: Dataset, tokenizer: Any) -> Dataset:
    """Documents with their tokens: the columns "name" and "input_ids" (a list of ints per document)."""
    with _progress(documents):
        return documents.map(
            _tokenize_batch,
            batched=True,
            batch_size=8,
            remove_columns=documents.column_names,
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

    Args:
        tokens: what `tokenize` returns.

    Returns:
        Columns "input_ids", "position_ids", "labels", each `context_length` ints a row.

    Raises:
        ValueError: all documents together are shorter than one row.
    """
    from datasets import Dataset

    def rows() -> Iterator[dict[str, list[int]]]:
        row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
        for document in tokens:
            ids = document["input_ids"]
            while ids:
                room = context_length - len(row["input_ids"])
                piece, ids = ids[:room], ids[room:]
                row["input_ids"] += piece
                row["position_ids"] += range(len(piece))
                row["labels"] += [IGNORED_LABEL, *piece[1:]]
                if len(row["input_ids"]) == context_length:
                    yield row
                    row = {"input_ids": [], "position_ids": [], "labels": []}

    _check_context_length(context_length)
    total = sum(map(len, tokens["input_ids"]))
    if total < context_length:
        raise ValueError(f"dataset has {total} tokens in all, fewer than one row of {context_length}")
    return Dataset.from_list(list(rows()))


def windowed(tokens: Dataset, context_length: int) -> Dataset:
    """Windows of exactly `context_length` tokens, each inside one document; incomplete last windows are dropped.

    Args:
        tokens: what `tokenize` returns.

    Returns:
        Columns "input_ids", "position_ids", "labels", each `context_length` ints a row.

    Raises:
        ValueError: every document is shorter than one window.
    """
    from datasets import Dataset

    _check_context_length(context_length)
    windows = chain.from_iterable(
        (ids[start : start + context_length] for start in range(0, len(ids) - context_length + 1, context_length))
        for ids in tokens["input_ids"]
    )
    positions = list(range(context_length))
    rows = [
        {"input_ids": window, "position_ids": positions, "labels": [IGNORED_LABEL, *window[1:]]} for window in windows
    ]
    if not rows:
        longest = max(map(len, tokens["input_ids"]))
        raise ValueError(f"dataset has no document of {context_length} tokens: the longest has {longest}")
    return Dataset.from_list(rows)


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
    # verbose=False: the tokenizer's warning about its maximum length is no news for long documents.
    return {"name": batch["name"], "input_ids": tokenizer(batch["text"], verbose=False)["input_ids"]}


def _local_path(dataset: str) -> tuple[Path, str] | None:
    """Path and column of a local dataset; None when `dataset` can only be a Hub id."""
    whole = Path(dataset).expanduser()
    if whole.exists():
        return whole, "text"
    head, _, column = dataset.rpartition(":")
    path = Path(head).expanduser() if head else whole
    if head and path.exists():
        return path, column
    looks_local = dataset.startswith((".", "/", "~")) or path.suffix in SUFFIXES or whole.suffix in SUFFIXES
    if looks_local:
        raise FileNotFoundError(f"dataset {dataset!r}: no such file or directory")
    return None


def _read_local(dataset: str, path: Path, column: str) -> Dataset:
    from datasets import concatenate_datasets

    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    elif path.suffix not in SUFFIXES:
        raise ValueError(f"dataset {dataset!r}: cannot read {path.suffix or 'such'} files, only {', '.join(SUFFIXES)}")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError(f"dataset {dataset!r} is empty: no text in any {', '.join(SUFFIXES)} file")
    root = path if path.is_dir() else path.parent
    return concatenate_datasets([_read_file(dataset, file, str(file.relative_to(root)), column) for file in files])


def _read_file(dataset: str, file: Path, name: str, column: str) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if file.suffix in TEXT_SUFFIXES:
            return Dataset.from_dict({"name": [name], "text": [file.read_text(encoding="utf-8")]})
        read = Dataset.from_json if file.suffix == ".jsonl" else Dataset.from_parquet
        table = read(str(file))
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"dataset {dataset!r}: {file.name} is not a readable {file.suffix} file ({error})") from error
    return _name_and_text(dataset, table, name, column)


def _read_hub(dataset: str, split: str) -> Dataset:
    from datasets import load_dataset

    parts = dataset.split(":")
    if len(parts) > 4:
        raise ValueError(f"dataset {dataset!r}: expected at most id:config:split:column")
    hub_id, config, own_split, column = parts + [""] * (4 - len(parts))
    try:
        table = load_dataset(hub_id, config or None, split=own_split or split)
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset {dataset!r} cannot be loaded: {error}") from error
    return _name_and_text(dataset, table, hub_id, column or "text")


def _name_and_text(dataset: str, table: Dataset, name: str, column: str) -> Dataset:
    if column not in table.column_names:
        raise ValueError(f"dataset {dataset!r} has no column {column!r}; it has {', '.join(table.column_names)}")
    if table.features[column].dtype not in ("string", "large_string"):
        raise ValueError(f"dataset {dataset!r}: column {column!r} holds {table.features[column].dtype}, not text")
    named = "name" in table.column_names and column != "name"

    def rename(row: dict[str, Any], index: int) -> dict[str, str]:
        return {"name": str(row["name"]) if named else f"{name}, row {index}", "text": row[column]}

    with _progress(table):
        return table.map(rename, with_indices=True, remove_columns=table.column_names)
