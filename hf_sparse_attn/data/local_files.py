"""Documents in local files: text, JSON lines and Parquet, read as they come, with one error that names the place."""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn

from hf_sparse_attn.data.tables import CHUNK, temporary_dataset

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES


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


def local_path(dataset: str) -> tuple[Path, str] | None:
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


def read_local(dataset: str, path: Path, column: str) -> Dataset:
    """Names and texts of a local dataset, as a dataset in a temporary file."""
    import pyarrow as pa

    schema = pa.schema({"name": pa.large_string(), "text": pa.large_string()})
    documents = batches(local_documents(dataset, path, column))
    return temporary_dataset((pa.RecordBatch.from_pylist(batch, schema=schema) for batch in documents), schema)


def local_documents(dataset: str, path: Path, column: str) -> Iterator[tuple[str, str | None]]:
    """Names and texts of a local dataset, read as they are asked for."""
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
    try:
        for file in files:
            yield from _read_file(file, _printable(str(file.relative_to(root))), column)
    except ValueError as error:
        raise ValueError(f"dataset {dataset!r}: {error}") from error


def _files(directory: Path) -> list[Path]:
    def fail(error: OSError) -> NoReturn:
        raise error

    found = (Path(folder, name) for folder, _, names in os.walk(directory, onerror=fail) for name in names)
    return sorted(file for file in found if _suffix(file) and file.is_file())


def batches(documents: Iterable[tuple[str, str | None]]) -> Iterator[list[dict[str, str | None]]]:
    """Names and texts in lists of `CHUNK` characters or a little more."""
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
        yield document_name(own_name, f"{name}, row {index}"), text


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
                raise ValueError(not_text(f"{name}, line {number}", column, text))
            yield None if column == "name" else row.get("name"), text
    if not is_empty and not is_found:
        raise ValueError(no_column(name, column, columns))


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
                raise ValueError(no_column(name, column, columns))
            for repeated in wanted:
                if columns.count(repeated) > 1:
                    raise ValueError(f"{name} has {columns.count(repeated)} columns {repeated!r}; expected one")
            for batch in parquet.iter_batches(batch_size=64, columns=wanted):
                check_text(name, column, batch.column(column))
                names = batch.column("name").to_pylist() if len(wanted) > 1 else [None] * len(batch)
                yield from zip(names, batch.column(column).to_pylist(), strict=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a readable .parquet file: {error}") from error


def check_text(where: str, column: str, values: pa.Array) -> None:
    """Refuse a column of another type than text, however Arrow stores it, unless all that it holds is null."""
    import pyarrow as pa

    type_ = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if str(type_) in ("string", "large_string", "string_view") or values.null_count == len(values):
        return
    value = next(value for value in values if value.is_valid).as_py()
    raise ValueError(not_text(where, column, value, str(type_)))


def not_text(where: str, column: str, value: Any, type_: str = "") -> str:
    kind = _kind(value) if isinstance(value, (dict, list)) or not type_ else type_
    message = f"{where}: column {column!r} holds {kind}, not text"
    if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys():
        message += (
            "; these are chat messages: make each conversation one string first, with the tokenizer's "
            "apply_chat_template(messages, tokenize=False)"
        )
    return message


def no_column(where: str, column: str, columns: Iterable[str]) -> str:
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


def document_name(own_name: Any, default: str) -> str:
    if own_name is None or isinstance(own_name, (dict, list, bytes)):
        return default
    return _printable(str(own_name)) if str(own_name).strip() else default


def _printable(text: str) -> str:
    """`text` with "?" for what is not a character: odd bytes of a file name, half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at position {error.start}"
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            found = "the byte order mark of UTF-16 or UTF-32"
        raise ValueError(f"{found}; expected UTF-8") from error
