"""The options that commands share, each in one place, and the parser of a command, made from its module's docstring."""

from __future__ import annotations

import argparse
from typing import Any

from hf_sparse_attn.cli.argument_types import (
    fraction,
    json_object,
    output_file,
    picture_file,
    positive_int,
    predicted_length,
)
from hf_sparse_attn.cli.arguments import OneLineErrors
from hf_sparse_attn.output_files import PICTURE_SUFFIXES

MODEL_HELP = "Use this model: a Hub id, a directory, or demo."
_DATASETS = (
    "a Hub id[:config[:split[:column]]], a file, a directory, demo, or pg19, arxiv, govreport or booksum "
    "(NAME=PATH for a copy)"
)
DATASET_HELP = f"Read documents of this dataset: {_DATASETS}."
DATASETS_HELP = (
    f"Train on documents of these datasets: {_DATASETS}. Several may each have a share of the tokens, DATASET:SHARE."
)
FIELDS_HELP = "Set these fields of the sparse attention, given as a JSON object or as @FILE, which holds one."
SUFFIXES = f"{', '.join(PICTURE_SUFFIXES[:-1])} or {PICTURE_SUFFIXES[-1]}"

_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"required": True, "metavar": "MODEL", "help": MODEL_HELP},
    "dataset": {"required": True, "metavar": "DATASET", "help": DATASET_HELP},
    "split": {
        "default": "validation",
        "metavar": "NAME",
        "help": "Take this split of a dataset that has splits (default: %(default)s).",
    },
    "context-length": {
        "type": predicted_length,
        "required": True,
        "metavar": "N",
        "help": "Read the first N tokens of each document; shorter documents are left out.",
    },
    "context-lengths": {"type": positive_int, "nargs": "+", "required": True, "metavar": "N"},
    "max-documents": {
        "type": positive_int,
        "metavar": "N",
        "help": "Read at most N documents (default: %(default)s).",
    },
    "depths": {
        "type": fraction,
        "nargs": "+",
        "metavar": "SHARE",
        "help": "Hide facts at these depths, from 0 to 1 (default: %(default)s).",
    },
    "num-samples": {
        "type": positive_int,
        "metavar": "N",
        "help": "Make N contexts with several facts for each length (default: %(default)s).",
    },
    "needles-per-depth": {
        "type": positive_int,
        "default": 2,
        "metavar": "N",
        "help": "Hide N facts at each depth of a context (default: %(default)s).",
    },
    "seed": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "Choose the facts that are hidden with the seed N (default: %(default)s).",
    },
    "sparse-attention": {"type": json_object, "default": {}, "metavar": "JSON", "help": FIELDS_HELP},
    "device": {"metavar": "DEVICE", "help": "Compute on this device (default: cuda if there is one, else cpu)."},
    "dtype": {
        "default": "auto",
        "metavar": "DTYPE",
        "help": "Compute in float32, bfloat16, float16 or float64, or in auto, the checkpoint's own (default: "
        "%(default)s).",
    },
    "output": {"type": output_file, "metavar": "FILE", "help": "Write the results to this JSON file."},
    "picture": {"type": picture_file, "metavar": "FILE", "help": f"Draw heat maps to this {SUFFIXES} file."},
}


def add(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Add options that commands share, in this order.

    Args:
        names: such as "context-length".
        changes: of what `add_argument` takes, for all of them.
    """
    for name in names:
        parser.add_argument(f"--{name}", **_OPTIONS[name] | changes)


def command_parser(docstring: str, **kwargs: Any) -> OneLineErrors:
    """A parser whose --help shows a module's docstring: the first paragraph before the options, all else after them."""
    description, epilog = description_and_epilog(docstring)
    return OneLineErrors(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )


def description_and_epilog(docstring: str) -> tuple[str, str]:
    """The first paragraph of a docstring, and its examples with all that follows."""
    description, _, rest = docstring.strip().partition("\n\n")
    return description, f"examples:\n\n{rest}"


def examples(docstring: str) -> list[str]:
    """The command lines among the examples of a docstring, each as one line."""
    lines = docstring.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith("    ") and " " in line.strip()]
