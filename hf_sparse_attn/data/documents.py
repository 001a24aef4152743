"""Long documents: where they come from, and their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.data.local_files import check_text, document_name, local_path, no_column, read_local
from hf_sparse_attn.demo import demo_documents

if TYPE_CHECKING:
    from datasets import Dataset

PROGRESS_FROM = 200  # documents


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
