"""`docs/support.md`, the support matrix for people: what does not work, then all that works for every family."""

import inspect
import os
import platform
from collections import Counter

import torch
import transformers
from helpers.families import FAMILIES
from helpers.paths import ROOT

from matrix import PATHS, THEMES, declared

FILE = ROOT / "docs" / "support.md"
VERSIONS = "Last written with "
INTRODUCTION = """\
# What is supported

{tested}. What does not work comes first; all other paths work with every family.
[limits.md](limits.md) says what else to know.
"""
WHAT_IS_TESTED = """\
Each pair of a path and a family is a test: a tiny random model in float64 is compared with the specification
(`hf_sparse_attn/ops/reference.py`), which gets every document alone in one plain forward, row by row. Where rows read
everything, the output is compared with the family's own eager attention.

{counts}.

This file is written by `python -m pytest tests/test_matrix.py -k test_cell --write-support-table`, if every such test
passes; another one fails when it no longer says what they test for.
"""
SYMBOLS = {
    "refused": ("Refused", "The call ends in this error, never in another answer."),
    "-": (
        "Not offered by Transformers",
        "The same error comes with the family's own eager attention; the other families support it.",
    ),
}


def render():
    """The whole text of the file, as declared; `tests/test_matrix.py` tests each cell."""
    tested = f"{len(PATHS)} paths are tested on {len(FAMILIES)} model families"
    parts = [INTRODUCTION.format(tested=tested), "## What does not work\n"]
    for symbol, (title, meaning) in SYMBOLS.items():
        if rows := exceptions(symbol):
            parts.append(f"### {title}\n\n{meaning}\n\n| path | families | error |\n| --- | --- | --- |\n{rows}\n")
    parts.append("## What works with every family\n")
    for theme, paths in THEMES.items():
        if supported := [path for path in paths if all(declared(family, path).symbol == "yes" for family in FAMILIES)]:
            lines = "\n".join(f"- **{path}**: {meaning_of(path)}" for path in supported)
            parts.append(f"### {theme}\n\n{lines}\n")
    parts.append(f"## Families\n\n{families()}\n")
    parts.append(f"## What is tested\n\n{WHAT_IS_TESTED.format(counts=counts())}\n{VERSIONS}{versions()}.\n")
    return "\n".join(parts)


def exceptions(symbol):
    """A row for each path and each error that it ends in, with the families for which it does."""
    rows = []
    for path in PATHS:
        found = {}
        for family in FAMILIES:
            outcome = declared(family, path)
            if outcome.symbol == symbol:
                found.setdefault(f"`{outcome.error.__name__}: {outcome.message}`", []).append(family)
        for error, ends in found.items():
            names = "all" if len(ends) == len(FAMILIES) else ", ".join(ends)
            rows.append(f"| **{path}**: {meaning_of(path)} | {names} | {error} |")
    return "\n".join(rows)


def meaning_of(path):
    return " ".join(inspect.getdoc(PATHS[path]).split())


def counts():
    found = Counter(declared(family, path).symbol for path in PATHS for family in FAMILIES)
    return (
        f"Of {found.total()} pairs, {found['yes']} work, {found['refused']} are refused, {found['-']} are not offered"
    )


def families():
    lines = []
    for name, (_, model_class, fields) in FAMILIES.items():
        described = ", ".join(f"{field}={value!r}" for field, value in fields.items())
        lines.append(f"- **{name}**: `{model_class.__name__}`" + (f" with `{described}`" if described else ""))
    return "\n".join(lines)


def versions():
    python = platform.python_version()
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, Python {python}"


def without_versions(text):
    return [line for line in text.splitlines() if not line.startswith(VERSIONS)]


def write():
    FILE.parent.mkdir(exist_ok=True)
    unfinished = FILE.with_suffix(".md.tmp")
    unfinished.write_text(render())
    os.replace(unfinished, FILE)
