"""What the scripts share: arguments, errors in one line, models, output files, tables."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hf_sparse_attn.cli.argument_types import integer, number
from hf_sparse_attn.cli.output_files import (
    RunError,
    add_note,
    is_device,
    one_line,
    reason,
    write_elsewhere,
    write_json,
)
from hf_sparse_attn.config import text_config
from hf_sparse_attn.notices import beyond_trained_length, tell_once

FAILURE_STATUS = 1
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130

# What a machine runs out of: as numbers of an OSError, and in the words of libraries that raise errors of their own,
# here torch.save and what is written in Rust.
_RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPIPE)
_SPACE_WORDS = ["PytorchStreamWriter failed", ". unexpected pos ", *(f"(os error {number})" for number in _RESOURCES)]
_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


class UserError(ValueError):
    """A mistake in what the user gave, told in one line without a traceback."""


@contextmanager
def argument(name: str) -> Iterator[None]:
    """Turn the errors that a wrong value of the command line argument `name` causes into a `UserError` naming it.

    A package that cannot be imported, a full disk or too little memory are no fault of the argument's: they pass.
    """
    try:
        yield
    except UserError:
        raise
    except (argparse.ArgumentTypeError, ValueError, OSError, ImportError, RecursionError) as error:
        if _fault_of_the_machine(error) is not None:
            raise
        raise UserError(f"argument {name}: {one_line(error)}") from error


def choose_device(device: str | None) -> Any:
    """The `torch.device` of a `--device` argument, one that computes."""
    import torch

    from hf_sparse_attn.cli.loading import parse_device

    with argument("--device"):
        try:
            chosen = parse_device(device)
            torch.zeros(1, device=chosen).item()
        except (RuntimeError, ImportError) as error:  # such as meta, whose tensors hold no numbers
            raise ValueError(f"{device!r} is no device of this machine; try cpu or cuda") from error
    return chosen


def choose_dtype(dtype: str) -> Any:
    """The `torch.dtype` of a `--dtype` argument, one that a whole model can compute in, or "auto"."""
    from hf_sparse_attn.cli.loading import parse_dtype

    with argument("--dtype"):
        chosen = parse_dtype(dtype)
        if not isinstance(chosen, str) and chosen.itemsize < 2:
            raise ValueError(f"no model computes in {dtype!r}; expected auto, float32, bfloat16, float16 or float64")
    return chosen


def read_checkpoint(model: str, overrides: dict[str, Any]) -> tuple[str, Any, Any, dict[str, Any]]:
    """What `--model` names, without its weights, checked together with the fields that `--sparse-attention` sets.

    Returns:
        What `from_pretrained` takes, the config, the tokenizer, and `sparse_attention` with the overrides.
    """
    from transformers import AutoTokenizer

    from hf_sparse_attn.cli.loading import library_errors, load_config, resolve_model
    from hf_sparse_attn.integration import merge_sparse_attention

    with argument(f"--model {model}"):
        path = resolve_model(model)
        config = load_config(path)
        with library_errors("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(path)
        known = getattr(text_config(config), "vocab_size", tokenizer.vocab_size)
        if tokenizer.vocab_size > known:
            raise ValueError(
                f"its tokenizer has {tokenizer.vocab_size} tokens, but its config.json a vocab_size of {known}"
            )
    with argument("--sparse-attention"):
        sparse_attention = merge_sparse_attention(config, overrides)
    return path, config, tokenizer, sparse_attention


def load_model(
    model: str,
    path: str,
    overrides: dict[str, Any] | None = None,
    *,
    device: Any = None,
    num_tokens: int = 0,
    **kwargs: Any,
) -> Any:
    """The sparse model that `--model` names; tells if it was made for fewer tokens than it is to read.

    Args:
        model: as it was given.
        path: what `read_checkpoint` returned for it.
        overrides: fields of its sparse attention.
        device: moves it there, for evaluation; None leaves it as it was loaded.
        num_tokens: the most that it will read at once.
        kwargs: go to `from_pretrained`.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from hf_sparse_attn.cli.loading import load_sparse_model

    if not sys.stderr.isatty():
        disable_progress_bar()
    with argument(f"--model {model}"):
        loaded: Any = load_sparse_model(path, overrides, **kwargs)
        most = getattr(text_config(loaded.config), "max_position_embeddings", None) or num_tokens
        tables = [table.num_embeddings for table in loaded.modules() if isinstance(table, torch.nn.Embedding)]
        if num_tokens > most and any(most <= size <= most + 2 for size in tables):  # OPT leaves two places free
            raise ValueError(f"it has learned {most} positions and cannot read {num_tokens} tokens")
        for name, weight in loaded.named_parameters():
            if weight.itemsize > 1 and not weight.isfinite().all():  # quantised ones have no such numbers
                raise ValueError(f"its weights are damaged: {name} has numbers that are not finite")
    if num_tokens > most:
        told = f"{num_tokens} tokens are more than the {most} that the model was made for (max_position_embeddings)"
        tell_once(text_config(loaded.config), beyond_trained_length(most), lambda _: warn(told))
    return loaded if device is None else loaded.to(device).eval()


def written_fields(sparse_attention: dict[str, Any]) -> dict[str, Any]:
    """The fields that a report repeats: all but the calibrated hash itself, which is megabytes of text."""
    return {name: value for name, value in sparse_attention.items() if name != "calibrated_hash"}


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
    """Run a script's main function and exit.

    The status is 0; after a `UserError` 2; after a `RunError`, and where memory, disk space or a package is lacking, 1;
    after Ctrl-C 130. All of these are told in one line on stderr. Other errors are bugs and have their traceback.
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
    except RunError as error:
        return _tell(f"error: {error}", error, FAILURE_STATUS)
    except KeyboardInterrupt as error:
        return _tell("interrupted", error, INTERRUPTED_STATUS)
    except Exception as error:
        nameless = isinstance(error, OSError) and error.filename is None  # as errors of print are
        fault = _broken_stdout("\n" if nameless else "") or _fault_of_the_machine(error)
        if fault is None:
            raise
        return _tell(f"error: {fault}", error, FAILURE_STATUS)
    return 0


def _tell(line: str, error: BaseException, status: int) -> int:
    """Print an error's line, with its notes, and return the status."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()  # or the line would stand behind it
    name = "" if status == INTERRUPTED_STATUS else f"{_script()}: "
    print(name + "; ".join([line, *getattr(error, "__notes__", [])]), file=sys.stderr)
    return status


def warn(message: str) -> None:
    """Tell something in one line on stderr."""
    print(f"{_script()}: warning: {message}", file=sys.stderr)


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


def report(result: dict[str, Any], output: Path | None, show: Callable[[dict[str, Any]], None]) -> None:
    """Write a result to `output`, if there is one, and show it; one that is in neither place is kept in another."""
    if output is not None:
        write_json(output, result)
    try:
        show(result)
        sys.stdout.flush()
    except Exception as error:
        if output is None:
            add_note(error, f"the results are {write_elsewhere(result)}")
        raise


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a short table on standard output: the first column is left-aligned, the figures right-aligned."""
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


def _fault_of_the_machine(error: BaseException) -> str | None:
    """What to tell of an error that no argument is to blame for: a package, memory or disk space is lacking."""
    if broken := _broken_import(error):
        return broken
    if isinstance(error, ModuleNotFoundError) and error.name:  # without a name, somebody says what is needed for what
        return f"{one_line(error)}; pip install 'hf_sparse_attn[scripts]' brings what the commands need"
    if isinstance(error, OSError):
        return one_line(error) if error.errno in _RESOURCES else None
    if isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_WORDS):
        return f"there is too little memory: {one_line(error)}"
    return one_line(error) if any(words in str(error) for words in _SPACE_WORDS) else None


def _broken_import(error: BaseException | None) -> str | None:
    """What to tell of an error that was raised, or caused, in the own code of a module that was being imported."""
    while error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = [frame.f_globals.get("__name__", "?") for frame in frames if frame.f_code.co_name == "<module>"]
        if modules and modules[-1] != "__main__":
            return f"cannot import {modules[-1]}: {one_line(error)}"
        error = None if isinstance(error, ImportError) else error.__cause__
    return None


def _script() -> str:
    return Path(sys.argv[0]).name
