"""Errors that are told in one line: whose fault they are, and which argument's."""

from __future__ import annotations

import errno
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST_LINE = 500

# A machine's resources that may run out: as numbers of an OSError, and in the words of libraries that raise errors of
# their own, here torch.save and what is written in Rust.
_RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPIPE)
_SPACE_WORDS = ["PytorchStreamWriter failed", ". unexpected pos ", *(f"(os error {number})" for number in _RESOURCES)]
_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


class RunError(RuntimeError):
    """Something went wrong although the arguments were right; it is told in one line, too."""


class OtherProcessError(RunError):
    """Another process of the same run failed, too, and tells it."""


class ArgumentError(ValueError):
    """A value that an argument cannot have.

    Args:
        name: the argument's name in Python; a command has it as an option, with dashes.
        problem: what is wrong; other arguments are named in braces, such as "{key_budget}".
        value: named beside the argument, if one alone of several values is wrong, or "".
        others: the arguments that `problem` names in braces.
    """

    def __init__(self, name: str, problem: str, value: str = "", others: tuple[str, ...] = ()) -> None:
        self.name, self.problem, self.value, self.others = name, problem, value, others
        super().__init__(name, problem, value, others)

    def __str__(self) -> str:
        return self._told(str)

    def as_option(self) -> str:
        """The message for somebody who gave the argument on a command line."""
        return f"argument {self._told(lambda name: '--' + name.replace('_', '-'))}"

    def _told(self, spell: Any) -> str:
        problem = self.problem
        for other in self.others:
            problem = problem.replace(f"{{{other}}}", spell(other))
        return f"{spell(self.name)}{' ' if self.value else ''}{self.value}: {problem}"


def is_first_process() -> bool:
    """Whether this is the first process on this machine of those that a launcher started; true without one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def argument(name: str, value: object = "") -> Iterator[None]:
    """Turn the errors that a wrong value of the argument `name` causes into an `ArgumentError` naming it.

    A package that cannot be imported, a full disk or too little memory are not the argument's fault: they pass.

    Args:
        name: the argument's name in Python.
        value: named beside it; "" leaves it out.
    """
    try:
        yield
    except ArgumentError:
        raise
    except (ValueError, OSError, ImportError, RecursionError) as error:
        if fault_of_the_machine(error) is not None:
            raise
        raise ArgumentError(name, one_line(error), str(value)) from error


def check_integer(name: str, value: Any, least: int) -> None:
    """Make sure that a value is an integer of at least `least` and at most 64 bits.

    Raises:
        ArgumentError: naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ArgumentError(name, f"must be an integer of at least {least}, got {value!r}")


def check_positive(name: str, value: Any, most: float = math.inf) -> None:
    """Make sure that a value is a finite number greater than 0 and at most `most`.

    Raises:
        ArgumentError: naming the argument.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= most or value == math.inf:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ArgumentError(name, f"must be a finite number greater than 0{limit}, got {value!r}")


def add_note(error: BaseException, note: str) -> None:
    """Have something told with an error; its own `add_note` came with Python 3.11."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]


def reason(error: OSError) -> str:
    """The system's words for an error, without the file's name."""
    return error.strerror or one_line(error)


def one_line(error: BaseException) -> str:
    """An error's message in one line that is not too long."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."


def fault_of_the_machine(error: BaseException) -> str | None:
    """The line to tell of an error that no argument is to blame for: a package, memory or disk space is lacking."""
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
    """The line to tell of an error that was raised, or caused, in the own code of a module that was being imported."""
    while error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = [frame.f_globals.get("__name__", "?") for frame in frames if frame.f_code.co_name == "<module>"]
        if modules and modules[-1] != "__main__":
            return f"cannot import {modules[-1]}: {one_line(error)}"
        error = None if isinstance(error, ImportError) else error.__cause__
    return None
