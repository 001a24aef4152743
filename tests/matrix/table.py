"""`docs/support.md`, the support matrix for people."""

import inspect
import os
import platform
from pathlib import Path

import torch
import transformers
from helpers.families import FAMILIES

from matrix import PATHS, THEMES, declared

FILE = Path(__file__).parent.parent.parent / "docs" / "support.md"
VERSIONS = "Last written with "
INTRODUCTION = """\
# What is supported

Every cell below is a test: tiny random models of each family in float64, each path compared with the specification
(`hf_sparse_attn/ops/reference.py`) that gets every document alone in one plain forward, row by row. Where rows read
everything, the output is compared with the family's own eager attention.

- **yes**: the path gives what the specification gives.
- **refused**: it ends in one `ValueError` that says so; the messages stand below.
- **-**: Transformers does not offer it; the same error comes with its own eager attention.

This file is written by `python -m pytest tests/test_matrix.py -k test_cell --write-support-table`, if every cell
passes; a test fails when it no longer says what the cells are tested for.
"""


def render():
    """The whole text of the file, as declared; `tests/test_matrix.py` tests each cell."""
    parts = [INTRODUCTION, f"{VERSIONS}{versions()}.\n"]
    for theme, paths in THEMES.items():
        parts.append(f"## {theme}\n\n{table(paths)}\n\n{meanings(paths)}\n")
    parts.append(f"## Families\n\n{families()}\n\n## Messages\n\n{messages()}\n")
    return "\n".join(parts)


def versions():
    python = platform.python_version()
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, Python {python}"


def table(paths):
    rows = [["path", *FAMILIES], ["---"] * (len(FAMILIES) + 1)]
    rows += [[name, *(declared(family, name).symbol for family in FAMILIES)] for name in paths]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def meanings(paths):
    return "\n".join(f"- **{name}**: {' '.join(inspect.getdoc(check).split())}" for name, check in paths.items())


def families():
    lines = []
    for name, (_, model_class, fields) in FAMILIES.items():
        described = ", ".join(f"{field}={value!r}" for field, value in fields.items())
        lines.append(f"- **{name}**: `{model_class.__name__}`" + (f" with `{described}`" if described else ""))
    return "\n".join(lines)


def messages():
    """Each message once, with the paths that end in it."""
    found = {}
    for path in PATHS:
        for family in FAMILIES:
            outcome = declared(family, path)
            if outcome.message:
                found.setdefault((outcome.symbol, outcome.error.__name__, outcome.message), {})[path] = None
    return "\n".join(
        f"- {', '.join(paths)} ({symbol}): `{error}: {message}`" for (symbol, error, message), paths in found.items()
    )


def without_versions(text):
    return [line for line in text.splitlines() if not line.startswith(VERSIONS)]


def write():
    FILE.parent.mkdir(exist_ok=True)
    unfinished = FILE.with_suffix(".md.tmp")
    unfinished.write_text(render())
    os.replace(unfinished, FILE)
