"""Long documents by a short name: datasets of the Hub with the columns that hold their text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Named(NamedTuple):
    """A dataset of the Hub.

    Args:
        hub_id: where it is.
        config: one of its configurations, or "" for its default.
        columns: what a document is made of, see `document_text`.
    """

    hub_id: str
    config: str
    columns: tuple[str, ...]


NAMED = {
    "pg19": Named("emozilla/pg19", "", ("text",)),  # deepmind/pg19 is a script, which `datasets` no longer runs
    "arxiv": Named("ccdv/arxiv-summarization", "document", ("article", "abstract")),
    "govreport": Named("ccdv/govreport-summarization", "", ("report", "summary")),
    "booksum": Named("kmfoda/booksum", "", ("chapter", "summary_text")),
}


def document_text(parts: list[str | None]) -> str | None:
    """The text of a document: its one column, or an article and its summary; None if any of them is blank."""
    if len(parts) == 1:
        return parts[0]
    article, summary = parts
    if not (article and article.strip() and summary and summary.strip()):
        return None
    return f"{article}\n\nSummary:\n{summary}"


def copy_of_named(dataset: str) -> tuple[Named, Path] | None:
    """What `NAME=PATH` stands for: a named dataset whose files are here; None for anything else.

    Raises:
        FileNotFoundError: there is no such path.
    """
    name, _, text = dataset.partition("=")
    if name not in NAMED or not text or Path(dataset).exists():
        return None
    path = Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"dataset {dataset!r}: no such file or directory")
    return NAMED[name], path
