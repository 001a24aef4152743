"""What the scripts share: arguments, errors in one line, output files, tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """A mistake in what the user gave, told in one line without a traceback."""


@contextmanager
def argument(name: str) -> Iterator[None]:
    """Turn the errors that a wrong value of the command line argument `name` causes into a `UserError` naming it."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"argument {name}: {_one_line(error)}") from error


def read_checkpoint(model: str, overrides: dict[str, Any]) -> tuple[str, Any, Any, dict[str, Any]]:
    """What `--model` names, without its weights, checked together with the fields that `--sparse-attention` sets.

    Returns:
        What `from_pretrained` takes, the config, the tokenizer, and `sparse_attention` with the overrides.
    """
    from transformers import AutoTokenizer

    from hf_sparse_attn.integration import merge_sparse_attention
    from hf_sparse_attn.loading import load_config, resolve_model

    with argument(f"--model {model}"):
        path = resolve_model(model)
        config = load_config(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    with argument("--sparse-attention"):
        sparse_attention = merge_sparse_attention(config, overrides)
    return path, config, tokenizer, sparse_attention


def written_fields(sparse_attention: dict[str, Any]) -> dict[str, Any]:
    """The fields that a report repeats: all but the calibrated hash itself, which is megabytes of text."""
    return {name: value for name, value in sparse_attention.items() if name != "calibrated_hash"}


class OneLineErrors(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage; also a mixin for other parsers."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function and exit: 0, 2 after a `UserError` (one line on stderr), 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)
    sys.exit(0)


def positive_int(text: str) -> int:
    """The type of a count on the command line: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def fraction(text: str) -> float:
    """The type of a share on the command line: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction in [0, 1], got {text!r}")
    return value


def json_object(text: str) -> dict[str, Any]:
    """The type of a JSON object on the command line, such as '{"window_size": 512}'."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def check_output_file(path: str | Path) -> Path:
    """Path of a file that can be written later: not itself a directory, and its directory exists or can be made."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a directory; expected the name of a file")
    _check_writable(path.parent)
    return path


def check_output_directory(path: str | Path) -> Path:
    """Path of a directory that can be filled later: absent or empty, and it can be made where it is."""
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file; expected a directory that is new or empty")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{str(path)!r} already holds something; expected a directory that is new or empty")
    _check_writable(path.parent)
    return path


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON under a temporary name, then rename: readers see the whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a short table on standard output: the first column is left-aligned, the figures right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _check_writable(directory: Path) -> None:
    # The directory may not exist yet: what counts is the nearest one above that does. Permission bits say little
    # (root, read-only mounts), so a nameless file is tried.
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {str(existing)!r}: {error.strerror or error}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
