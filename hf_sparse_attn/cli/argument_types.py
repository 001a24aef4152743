"""Types of command line arguments, for argparse: each says in one line what was given and what is allowed."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_sparse_attn.errors import one_line, reason
from hf_sparse_attn.output_files import (
    check_drawing_file,
    check_output_directory,
    check_output_file,
    check_picture_file,
)

_MOST = 2**31 - 1  # of anything that is counted
_LONGEST_VALUE = 60


def integer(text: str) -> int:
    """The type of an integer on the command line, of at most 64 bits."""
    return _integer(text, -(2**63), 2**63 - 1, "an integer")


def positive_int(text: str) -> int:
    """The type of a count on the command line: an integer of at least 1."""
    return _integer(text, 1, _MOST, "a positive integer")


def predicted_length(text: str) -> int:
    """The type of a number of tokens that are to be predicted."""
    value = positive_int(text)
    if value < 2:
        raise ArgumentTypeError("must be at least 2: the first token is not predicted")
    return value


def count(text: str) -> int:
    """The type of a count that may be 0."""
    return _integer(text, 0, _MOST, "an integer of at least 0")


def _integer(text: str, least: int, most: int, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value > most:
        expected += f" of at most {most}"
    if not least <= value <= most:
        raise ArgumentTypeError(f"expected {expected}, got {_shown(text)}")
    return value


def number(text: str) -> float:
    """The type of a number on the command line: any but NaN."""
    return _number(text, -math.inf, math.inf, "a number")


def fraction(text: str) -> float:
    """The type of a share on the command line: a number in [0, 1]."""
    return _number(text, 0, 1, "a fraction in [0, 1]")


def share(text: str) -> float:
    """The type of a share that may not be 0."""
    return _number(text, math.ulp(0), 1, "a number greater than 0 and at most 1")


def positive_number(text: str) -> float:
    """The type of a finite number greater than 0."""
    return _number(text, math.ulp(0), sys.float_info.max, "a finite number greater than 0")


def _number(text: str, least: float, most: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise ArgumentTypeError(f"expected {expected}, got {_shown(text)}")
    return value


def json_object(text: str) -> dict[str, Any]:
    """The type of a JSON object on the command line, such as '{"window_size": 512}', or @FILE, which holds one."""
    shown = _shown(text)
    try:
        content = Path(text[1:]).expanduser().read_text(encoding="utf-8") if text.startswith("@") else text
        value = json.loads(
            content,
            object_pairs_hook=_without_repetition,
            parse_int=_json_integer,
            parse_float=_json_number,
            parse_constant=_json_number,
        )
    except RecursionError as error:
        raise ArgumentTypeError(f"not valid JSON (nested too deeply): {shown}") from error
    except OSError as error:
        raise ArgumentTypeError(f"cannot read {shown}: {reason(error)}") from error
    except ValueError as error:
        raise ArgumentTypeError(f"not valid JSON ({error}): {shown}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"expected a JSON object, got {shown}")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given more than once")
    return fields


def _json_integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**63:
        raise ValueError(f"{_shown(text)} is an integer of more than 64 bits")
    return int(text)


def _json_number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{_shown(text)} is not a finite number")
    return float(text)


def output_file(text: str) -> Path:
    """The type of a file to write; see `check_output_file`."""
    return _checked(check_output_file, text)


def picture_file(text: str) -> Path:
    """The type of a picture to write; see `check_picture_file`."""
    return _checked(check_picture_file, text)


def drawing_file(text: str) -> Path:
    """The type of a picture or a page to write; see `check_drawing_file`."""
    return _checked(check_drawing_file, text)


def output_directory(text: str) -> Path:
    """The type of a directory to fill; see `check_output_directory`."""
    return _checked(check_output_directory, text)


def _checked(check: Callable[[str], Path], text: str) -> Path:
    try:
        return check(text)
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(one_line(error)) from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}...")
