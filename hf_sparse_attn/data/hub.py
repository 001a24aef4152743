"""Documents of the Hub's datasets, and of files that are copies of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_sparse_attn.data.local_files import check_text, document_name, no_column, not_text
from hf_sparse_attn.data.named import NAMED, copy_of_named, document_text
from hf_sparse_attn.data.progress import quiet_if_short

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


class _Source(NamedTuple):
    """What `load_dataset` is given, what documents are called, and the columns that they are made of."""

    arguments: tuple[str, str | None]
    options: dict[str, str]
    name: str
    columns: tuple[str, ...]


def read_hub(dataset: str, split: str) -> Dataset:
    """Names and texts of a dataset of the Hub."""
    from datasets import Features, Value

    source = _source(dataset, split)
    table = _load(dataset, source)
    for column in source.columns:
        _check_column(dataset, column, table.column_names)
        for chunk in table.data.column(column).chunks:
            check_text(f"dataset {dataset!r}", column, chunk)
    wanted = [wanted for wanted in dict.fromkeys((*source.columns, "name")) if wanted in table.column_names]

    def rename(row: dict[str, Any], index: int) -> dict[str, str | None]:
        return dict(zip(("name", "text"), _document(source, row, index), strict=True))

    # Told, not inferred: the first documents may all be null.
    features = Features({"name": Value("large_string"), "text": Value("large_string")})
    with quiet_if_short(table):
        return table.select_columns(wanted).map(rename, with_indices=True, remove_columns=wanted, features=features)


def stream_hub(dataset: str, split: str) -> Iterator[tuple[str, str | None]]:
    """Names and texts of a dataset of the Hub, downloaded as they are asked for."""
    source = _source(dataset, split)
    for index, row in enumerate(_load(dataset, source, streaming=True)):
        for column in source.columns:
            _check_column(dataset, column, list(row))
            if not isinstance(row[column], (str, NoneType)):
                raise ValueError(not_text(f"dataset {dataset!r}, row {index}", column, row[column]))
        yield _document(source, row, index)


def _source(dataset: str, split: str) -> _Source:
    if copy := copy_of_named(dataset):
        named, path = copy
        return _Source(*_local_copy(dataset, path, split), name=path.name, columns=named.columns)
    parts = dataset.split(":")
    if len(parts) > 4:
        raise ValueError(f"dataset {dataset!r}: expected at most id:config:split:column")
    hub_id, config, own_split, column = parts + [""] * (4 - len(parts))
    columns: tuple[str, ...] = ("text",)
    if hub_id in NAMED:
        hub_id, default_config, columns = NAMED[hub_id]
        config = config or default_config
    columns = (column,) if column else columns
    return _Source((hub_id, config or None), {"split": own_split or split}, hub_id, columns)


def _local_copy(dataset: str, path: Path, split: str) -> tuple[tuple[str, str | None], dict[str, str]]:
    if path.is_dir():
        return (str(path.resolve()), None), {"split": split}
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(
            f"dataset {dataset!r}: cannot read {path.suffix or 'such'} files, only {', '.join(_BUILDERS)} "
            "and directories of them"
        )
    return (builder, None), {"data_files": str(path.resolve()), "split": "train"}  # a file has no splits


def _load(dataset: str, source: _Source, **options: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(*source.arguments, **source.options, **options)
    except DatasetsError as error:  # often "an error occurred", for the reason that it was raised from
        raise ValueError(f"dataset {dataset!r} cannot be loaded: {error.__cause__ or error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {dataset!r} cannot be loaded: {error}") from error


def _check_column(dataset: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise ValueError(no_column(f"dataset {dataset!r}", column, columns))


def _document(source: _Source, row: dict[str, Any], index: int) -> tuple[str, str | None]:
    own_name = None if "name" in source.columns else row.get("name")
    text = document_text([row[column] for column in source.columns])
    return document_name(own_name, f"{source.name}, row {index}"), text
