"""Gather what other commands measured into one HTML page that needs no network, and into a model card's tables.

    hf-sparse-attn report measured converted --output report.html --model-card converted/README.md

Of each directory, reports of other commands (their --output) and pictures are shown, those of a converted model among
them: what each density is predicted to cost, and what each head reads. The card gets a section "Measured" at its end,
in place of an earlier one.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from hf_sparse_attn.cli.argument_types import output_file
from hf_sparse_attn.cli.arguments import OneLineErrors, ShownTable, UserError, collected_tables, warn
from hf_sparse_attn.cli.main import COMMANDS
from hf_sparse_attn.cli.options import command_parser
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.output_files import replaced

TEMPLATE = Path(__file__).with_name("report.html")
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
MARKS = "<!-- measured with hf-sparse-attn -->", "<!-- end of what was measured -->"


class Section(NamedTuple):
    """What one command measured.

    Args:
        name: of its file.
        command: the whole of it.
        tables: what it prints.
        lines: what it prints beside tables.
        environment: where it ran.
    """

    name: str
    command: str
    tables: Sequence[ShownTable]
    lines: Sequence[str]
    environment: str

    @property
    def title(self) -> str:
        return shlex.split(self.command)[1]


class Picture(NamedTuple):
    name: str
    source: str  # a data URI


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="Gather what is in DIR.")
    parser.add_argument(
        "--output", type=output_file, required=True, metavar="FILE", help="Write the page to this .html file."
    )
    parser.add_argument("--title", default="Measurements", metavar="TEXT", help="Call the page TEXT.")
    parser.add_argument(
        "--model-card", type=output_file, metavar="FILE", help="Put the tables into this README.md of a model, too."
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    for folder in arguments.directories:
        if not folder.is_dir():
            raise UserError(f"argument DIR: {str(folder)!r} is not a directory")
    if arguments.model_card is not None and not arguments.model_card.is_file():
        raise ArgumentError("model_card", f"{str(arguments.model_card)!r} is not a file")
    files = sorted(file for folder in dict.fromkeys(arguments.directories) for file in folder.iterdir())
    sections = read_sections(files)
    if not sections:
        raise UserError("argument DIR: holds no report of a command; give commands an --output there")
    pictures = [read_picture(file) for file in files if file.suffix.lower() in PICTURES]
    with replaced(arguments.output) as path:
        path.write_text(render(arguments.title, sections, pictures), encoding="utf-8")
    if arguments.model_card is not None:
        card = with_tables(arguments.model_card.read_text(encoding="utf-8"), sections)
        with replaced(arguments.model_card) as path:
            path.write_text(card, encoding="utf-8")
    print(f"{len(sections)} reports and {len(pictures)} pictures are in {arguments.output}")


def read_sections(files: Iterable[Path]) -> list[Section]:
    """Those of reports, in the order of COMMANDS; JSON files that are none are told."""
    sections = []
    for file in files:
        if file.suffix.lower() == ".json":
            section = read_section(file)
            if section is not None:
                sections.append(section)
            elif not is_of_a_model(file):
                warn(f"{str(file)!r} is no report that a command of this release has finished; it is left out")
    order = list(COMMANDS)
    return sorted(sections, key=lambda section: order.index(section.title))


def read_section(file: Path) -> Section | None:
    """What a command that made a report prints of it, or None."""
    result: Any = None
    with suppress(ValueError, OSError):
        result = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or not isinstance(result.get("command"), str):
        return None
    name = next(iter(shlex.split(result["command"])[1:]), "")
    module: Any = import_module(f"hf_sparse_attn.cli.{COMMANDS[name][0]}") if name in COMMANDS else None
    show = getattr(module, "print_result", None)
    if show is None:
        return None
    text = io.StringIO()
    try:
        with collected_tables() as tables, redirect_stdout(text):
            show(result)
    except (KeyError, TypeError, ValueError):  # of another release, or changed by hand
        return None
    where = result.get("environment") or {}
    told = [
        where.get("date"),
        where.get("device"),
        *(f"{name} {where.get(name)}" for name in ("torch", "transformers")),
    ]
    return Section(file.name, result["command"], tables, text.getvalue().splitlines(), ", ".join(map(str, told)))


def is_of_a_model(file: Path) -> bool:
    """Whether a JSON file is one of those that a model's directory has anyway."""
    names = ("config", "tokenizer", "generation_config", "special_tokens_map", "vocab", "trainer_state", "all_results")
    return file.stem.split(".")[0] in (*names, "tokenizer_config", "model")


def read_picture(file: Path) -> Picture:
    encoded = base64.b64encode(file.read_bytes()).decode()
    return Picture(file.name, f"data:{PICTURES[file.suffix.lower()]};base64,{encoded}")


def render(title: str, sections: Sequence[Section], pictures: Sequence[Picture]) -> str:
    """The page."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(title=title, sections=sections, pictures=pictures)


def with_tables(card: str, sections: Sequence[Section]) -> str:
    """A model card with the tables at its end, in place of earlier ones."""
    begin, end = MARKS
    head, found, rest = card.partition(begin)
    tail = rest.partition(end)[2] if found else ""
    parts = [head.rstrip(), "", begin, "## Measured", ""]
    for section in sections:
        for table in section.tables:
            alignment = row_of("---", *["---:"] * (len(table.columns) - 1))
            rows = [row_of(*map(cell, cells)) for cells in (table.columns, *table.rows)]
            parts += [f"**{cell(table.title)}**", "", rows[0], alignment, *rows[1:], ""]
        parts += [*(cell(line) + "  " for line in section.lines), *[""] * bool(section.lines)]
        parts += [f"`{section.command}`; {section.environment}", ""]
    return "\n".join([*parts, end]) + (tail if tail.strip() else "\n")


def row_of(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Text of documents may hold whatever means something in Markdown."""
    return re.sub(r"([\\|`*_\[\]$#])", r"\\\1", html.escape(text, quote=False))
