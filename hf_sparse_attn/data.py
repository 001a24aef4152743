"""Long documents: where they come from, their tokens, and the rows that fine-tuning reads."""

from __future__ import annotations

import codecs
import json
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from hf_sparse_attn.demo import demo_documents

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
PROGRESS_FROM = 200  # documents
IGNORED_LABEL = -100  # what the loss of Transformers and PyTorch skips
CHUNK = 2**20  # characters or tokens handed on together


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
    local = _local_path(dataset)
    documents = _read_hub(dataset, split) if local is None else _read_local(dataset, *local)
    with _progress(documents):
        documents = documents.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if len(documents) == 0:
        raise ValueError(f"dataset {dataset!r} is empty: it holds no document with any text")
    return documents


def read_text(path: str | Path, name: str | None = None) -> str:
    """Text of a file in UTF-8, without a byte order mark; its lines end in a line feed, whatever they end in there.

    Args:
        name: what messages call the file (default: its path).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not in UTF-8; the message names it and the first byte that is wrong.
    """
    path = Path(path)
    try:
        text = _decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name or path} is not a readable {path.suffix or 'text'} file: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


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
    # verbose=False: the tokenizer's warning about its maximum length is no news for long documents.
    return {"name": batch["name"], "input_ids": tokenizer(batch["text"], verbose=False)["input_ids"]}


def _local_path(dataset: str) -> tuple[Path, str] | None:
    """Path and column of a local dataset; None when `dataset` can only be a Hub id."""
    whole = Path(os.path.expanduser(dataset))
    if whole.exists():
        return whole, "text"
    head, _, column = dataset.rpartition(":")
    path = Path(os.path.expanduser(head)) if head else whole
    if head and path.exists():
        return path, column or "text"
    looks_local = dataset.startswith((".", "/", "~")) or whole.is_symlink() or _suffix(path) or _suffix(whole)
    if looks_local:
        raise FileNotFoundError(f"dataset {dataset!r}: no such file or directory")
    return None


def _suffix(path: Path) -> str:
    """Which of SUFFIXES a path has, in capitals or not; "" if none."""
    suffix = path.suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def _read_local(dataset: str, path: Path, column: str) -> Dataset:
    files, root = [path], path.parent
    if path.is_dir():
        files, root = _files(path), path
    elif not path.is_file():
        raise ValueError(f"dataset {dataset!r} is neither a file nor a directory")
    elif not _suffix(path):
        raise ValueError(f"dataset {dataset!r}: cannot read {path.suffix or 'such'} files, only {', '.join(SUFFIXES)}")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError(f"dataset {dataset!r} is empty: no text in any {', '.join(SUFFIXES)} file")
    documents = chain.from_iterable(_read_file(file, _printable(str(file.relative_to(root))), column) for file in files)
    try:
        return _dataset_of_documents(documents)
    except ValueError as error:
        raise ValueError(f"dataset {dataset!r}: {error}") from error


def _files(directory: Path) -> list[Path]:
    def fail(error: OSError) -> NoReturn:
        raise error

    found = (Path(folder, name) for folder, _, names in os.walk(directory, onerror=fail) for name in names)
    return sorted(file for file in found if _suffix(file) and file.is_file())


def _dataset_of_documents(documents: Iterable[tuple[str, str | None]]) -> Dataset:
    """Names and texts as a dataset in a temporary file, which is gone when the dataset is."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    schema = pa.schema({"name": pa.large_string(), "text": pa.large_string()})
    with tempfile.TemporaryDirectory(prefix="hf_sparse_attn_", ignore_cleanup_errors=True) as directory:
        path = os.path.join(directory, "documents.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(documents):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
    # A fingerprint of its own: `datasets` would compute one from a copy of the whole table.
    return Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)


def _batches(documents: Iterable[tuple[str, str | None]]) -> Iterator[list[dict[str, str | None]]]:
    batch: list[dict[str, str | None]] = []
    size = 0
    for name, text in documents:
        batch.append({"name": name, "text": text})
        size += len(name) + len(text or "")
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_file(file: Path, name: str, column: str) -> Iterator[tuple[str, str | None]]:
    """Names and texts of one file, which messages call `name`."""
    if _suffix(file) in TEXT_SUFFIXES:
        yield name, read_text(file, name)
        return
    rows = _read_jsonl if _suffix(file) == ".jsonl" else _read_parquet
    for index, (own_name, text) in enumerate(rows(file, name, column)):
        yield _document_name(own_name, f"{name}, row {index}"), text


def _read_jsonl(file: Path, name: str, column: str) -> Iterator[tuple[Any, str | None]]:
    columns: dict[str, None] = {}
    is_empty, is_found = True, False
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = _json_object(line)
            except ValueError as error:
                raise ValueError(f"{name} is not a readable .jsonl file: line {number}: {error}") from error
            if row is None:
                continue
            is_empty = False
            if column in row:
                is_found = True
            elif not is_found:
                columns |= dict.fromkeys(row)
            text = row.get(column)
            if isinstance(text, str) and text != _printable(text):
                raise ValueError(f"{name}, line {number}: column {column!r} holds half a surrogate pair, not text")
            if not isinstance(text, (str, NoneType)):
                raise ValueError(_not_text(f"{name}, line {number}", column, text))
            yield None if column == "name" else row.get("name"), text
    if not is_empty and not is_found:
        raise ValueError(_no_column(name, column, columns))


def _json_object(line: bytes) -> dict[str, Any] | None:
    """One line of a .jsonl file; None if it is blank."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {repeated!r} stands twice in one object")
        return value

    text = _decode(line).strip()
    if not text:
        return None
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, character {error.pos}); expected one JSON object a line") from error
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_kind(value)}; expected one JSON object a line")
    return value


def _read_parquet(file: Path, name: str, column: str) -> Iterator[tuple[Any, str | None]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with file.open("rb") as stream:
        try:
            parquet = ParquetFile(stream)
            columns = parquet.schema_arrow.names
            wanted = [wanted for wanted in dict.fromkeys((column, "name")) if wanted in columns]
            if column not in wanted:
                raise ValueError(_no_column(name, column, columns))
            for repeated in wanted:
                if columns.count(repeated) > 1:
                    raise ValueError(f"{name} has {columns.count(repeated)} columns {repeated!r}; expected one")
            for batch in parquet.iter_batches(batch_size=64, columns=wanted):
                _check_text(name, column, batch.column(column))
                names = batch.column("name").to_pylist() if len(wanted) > 1 else [None] * len(batch)
                yield from zip(names, batch.column(column).to_pylist(), strict=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a readable .parquet file: {error}") from error


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
        raise ValueError(_no_column(f"dataset {dataset!r}", column, table.column_names))
    for chunk in table.data.column(column).chunks:
        _check_text(f"dataset {dataset!r}", column, chunk)
    wanted = [wanted for wanted in dict.fromkeys((column, "name")) if wanted in table.column_names]

    def rename(row: dict[str, Any], index: int) -> dict[str, str]:
        own_name = row["name"] if len(wanted) > 1 else None
        return {"name": _document_name(own_name, f"{name}, row {index}"), "text": row[column]}

    # Told, not inferred: the first documents may all be null.
    features = Features({"name": Value("large_string"), "text": Value("large_string")})
    with _progress(table):
        return table.select_columns(wanted).map(rename, with_indices=True, remove_columns=wanted, features=features)


def _check_text(where: str, column: str, values: pa.Array) -> None:
    """Refuse a column of another type than text, however Arrow stores it, unless all that it holds is null."""
    import pyarrow as pa

    type_ = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if str(type_) in ("string", "large_string", "string_view") or values.null_count == len(values):
        return
    value = next(value for value in values if value.is_valid).as_py()
    raise ValueError(_not_text(where, column, value, str(type_)))


def _not_text(where: str, column: str, value: Any, type_: str = "") -> str:
    kind = _kind(value) if isinstance(value, (dict, list)) or not type_ else type_
    message = f"{where}: column {column!r} holds {kind}, not text"
    if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys():
        message += (
            "; these are chat messages: make each conversation one string first, with the tokenizer's "
            "apply_chat_template(messages, tokenize=False)"
        )
    return message


def _no_column(where: str, column: str, columns: Iterable[str]) -> str:
    names = list(columns)
    listed = ", ".join(names[:20]) or "none"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{where} has no column {column!r}; it has {listed}{more}"


def _kind(value: Any, plural: bool = False) -> str:
    """What a value read from JSON is, in words."""
    if isinstance(value, dict):
        return "objects" if plural else "an object"
    if isinstance(value, str):
        return "strings" if plural else "a string"
    if isinstance(value, list):
        if plural:
            return "lists"
        kinds = {_kind(item, plural=True) for item in value}
        return f"a list of {kinds.pop()}" if len(kinds) == 1 else "a list"
    return {bool: "bool", int: "int64", float: "float64", NoneType: "null"}.get(type(value), type(value).__name__)


def _document_name(own_name: Any, default: str) -> str:
    if own_name is None or isinstance(own_name, (dict, list, bytes)):
        return default
    return _printable(str(own_name)) if str(own_name).strip() else default


def _printable(text: str) -> str:
    """`text` with "?" for what is no character: odd bytes of a file name, half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at position {error.start}"
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            found = "the byte order mark of UTF-16 or UTF-32"
        raise ValueError(f"{found}; expected UTF-8") from error
