"""What the commands share: a parser whose errors are one line, exit statuses, reports and tables."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hf_sparse_attn.cli.argument_types import integer, number
from hf_sparse_attn.errors import (
    ArgumentError,
    OtherProcessError,
    RunError,
    add_note,
    fault_of_the_machine,
    is_first_process,
    one_line,
    reason,
)
from hf_sparse_attn.output_files import is_device, write_elsewhere, write_json

FAILURE_STATUS = 1
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


class UserError(ValueError):
    """A mistake in what the user gave, told in one line without a traceback."""


@contextmanager
def argument(label: str) -> Iterator[None]:
    """Turn the errors that a wrong value on the command line causes into a `UserError` that names it by a label.

    For what only a command has; `hf_sparse_attn.errors.argument` is for arguments of functions, too.
    """
    try:
        yield
    except (UserError, ArgumentError):
        raise
    except (argparse.ArgumentTypeError, ValueError, OSError, ImportError, RecursionError) as error:
        if fault_of_the_machine(error) is not None:
            raise
        raise UserError(f"argument {label}: {one_line(error)}") from error


class OneLineErrors(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage; also a mixin for other parsers.

    No value may be empty, NaN or an integer of more than 64 bits, and no output file another argument's file.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, integer)
        self.register("type", float, number)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if not all(value.strip() for value in arg_strings):
            raise argparse.ArgumentError(action, "expected a value, got ''")
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        arguments, rest = super().parse_known_args(*args, **kwargs)
        _check_outputs_apart(vars(arguments))
        return arguments, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's main function and exit.

    The status is 0; after a `UserError` or an `ArgumentError` 2; after a `RunError`, and where memory, disk space or a
    package is lacking, 1; after Ctrl-C 130. All of these are told in one line on stderr. Other errors are bugs and
    have their traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # whoever started this closed it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of documents are any text
    status = _status(main)
    broken = _broken_stdout()  # now, or Python would add lines of its own at the end
    if broken is not None and status == 0:
        status = _tell(f"error: {broken}", RunError(), FAILURE_STATUS)
    sys.exit(status)


def _status(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as error:  # after --help
        return int(error.code or 0)
    except UserError as error:
        return _tell(f"error: {error}", error, USER_ERROR_STATUS)
    except ArgumentError as error:
        return _tell(f"error: {error.as_option()}", error, USER_ERROR_STATUS)
    except OtherProcessError:
        return FAILURE_STATUS
    except RunError as error:
        return _tell(f"error: {error}", error, FAILURE_STATUS)
    except KeyboardInterrupt as error:
        return _tell("interrupted", error, INTERRUPTED_STATUS) if is_first_process() else INTERRUPTED_STATUS
    except Exception as error:
        nameless = isinstance(error, OSError) and error.filename is None  # as errors of print are
        fault = _broken_stdout("\n" if nameless else "") or fault_of_the_machine(error)
        if fault is None:
            raise
        return _tell(f"error: {fault}", error, FAILURE_STATUS)
    return 0


def _tell(line: str, error: BaseException, status: int) -> int:
    """Print an error's line, with its notes, and return the status."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()  # or the line would stand after it
    name = "" if status == INTERRUPTED_STATUS else f"{_script()}: "
    print(name + "; ".join([line, *getattr(error, "__notes__", [])]), file=sys.stderr)
    return status


def warn(message: str) -> None:
    """Tell something in one line on stderr, once of several processes."""
    if is_first_process():
        print(f"{_script()}: warning: {message}", file=sys.stderr)


class _Warnings(logging.Handler):
    """Tells what the package logs in one line on stderr, as `warn` does."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def show_warnings() -> None:
    """Let warnings that the package logs be told as the command's own; idempotent."""
    logger = logging.getLogger("hf_sparse_attn")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings(logging.WARNING))


def _check_outputs_apart(arguments: Mapping[str, Any]) -> None:
    """Outputs are paths, all else is text: no file that is there already, nor another output, may be overwritten."""
    given = ((name.replace("_", "-"), value) for name, value in arguments.items())
    files = {name: value for name, value in given if isinstance(value, (str, Path)) and value}
    for output, path in files.items():
        if isinstance(path, Path) and not is_device(path):
            for other, value in files.items():
                is_file = isinstance(value, Path) or os.path.isfile(value)
                if other != output and is_file and os.path.realpath(value) == os.path.realpath(path):
                    raise UserError(f"argument --{output}: {str(path)!r} is the file of --{other}, too")


class ShownTable(NamedTuple):
    """What `print_table` was given."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


_TABLES: ContextVar[list[ShownTable] | None] = ContextVar("tables", default=None)


@contextmanager
def collected_tables() -> Iterator[list[ShownTable]]:
    """Tables that this block prints come into the list instead."""
    found: list[ShownTable] = []
    before = _TABLES.set(found)
    try:
        yield found
    finally:
        _TABLES.reset(before)


def resumed(
    arguments: argparse.Namespace, may_differ: Collection[str] = (), **fixed: Any
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The report that an interrupted run with the same options has left in its --output, or a new one, and what writes
    it there.

    Args:
        may_differ: options that decide how much is measured, and not what a single result is.
        fixed: entries of the report that have to be the same beside the options.
    """
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "picture", "device")}
    output, result = arguments.output, {"settings": settings, "results": {}, **fixed}

    def deciding(report: dict[str, Any]) -> list[Any]:
        options = {name: value for name, value in report["settings"].items() if name not in may_differ}
        return [options, *(report.get(name) for name in fixed)]

    if output is not None and output.is_file():
        with suppress(ValueError, OSError, LookupError, TypeError, AttributeError):  # what is no such report
            found = json.loads(output.read_text(encoding="utf-8"))
            if deciding(found) == deciding(json.loads(json.dumps(result))) and isinstance(found["results"], dict):
                result = found | {"settings": settings}

    def keep() -> None:
        if output is not None:
            write_json(output, result)

    return result, keep


def report(result: dict[str, Any], output: Path | None, show: Callable[[dict[str, Any]], None]) -> None:
    """Write a result to `output`, if there is one, and show it; one that is in neither place is kept in another.

    Its "command" is the one that made it: that of the module with `show`, and the arguments of this process.
    """
    result = result | {"command": this_command(show)}
    if output is not None:
        write_json(output, result)
    try:
        show(result)
        sys.stdout.flush()
    except Exception as error:
        if output is None:
            add_note(error, f"the results are {write_elsewhere(result)}")
        raise


def this_command(show: Callable[[dict[str, Any]], None]) -> str:
    """The command of the module with `show`, with the arguments of this process."""
    name = show.__module__.rpartition(".")[2].replace("_", "-")
    return shlex.join(["hf-sparse-attn", name, *sys.argv[1:]])


def origin(arguments: Any, sparse_attention: dict[str, Any], device: Any) -> dict[str, Any]:
    """What a report of hidden facts says of its own making."""
    from hf_sparse_attn.environment import describe_environment, written_fields

    return {
        **{name: getattr(arguments, name) for name in ("model", "dataset", "seed")},
        "sparse_attention": written_fields(sparse_attention),
        "environment": describe_environment(device),
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a short table on standard output: the first column is left-aligned, the figures right-aligned."""
    collected = _TABLES.get()
    if collected is not None:
        collected.append(ShownTable(title, columns, rows))
        return
    from rich.console import Console
    from rich.table import Table

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            """Rich would end the whole program here."""
            raise

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    _Console(markup=False, emoji=False).print(table)


def _broken_stdout(text: str = "") -> str | None:
    """Whether standard output can no longer be written to; if so, what else is printed is dropped."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with suppress(OSError):
            os.dup2(sys.stdout.fileno(), 1)
        return f"cannot write to standard output: {reason(error)}"
    return None


def _script() -> str:
    return Path(sys.argv[0]).name


def refuse_token_ids(config: Any) -> None:
    """An attention that is measured by itself knows no token ids."""
    from hf_sparse_attn.patterns import marks_are_missing

    if config.global_token_ids:
        raise ArgumentError("sparse_attention", str(marks_are_missing()))
