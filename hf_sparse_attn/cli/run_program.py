"""Run any program with "sparse" registered, such as lm-evaluation-harness, TRL or a training script of your own.

    hf-sparse-attn run train.py --model_name_or_path DIR --attn_implementation sparse
    hf-sparse-attn run -m lm_eval --model hf --model_args pretrained=DIR,attn_implementation=sparse --tasks ...
    hf-sparse-attn run --sparse-attention '{"key_budget": 512}' train.py ...
    accelerate launch -m hf_sparse_attn run train.py ...
    torchrun --nproc-per-node 2 -m hf_sparse_attn run train.py ...

The program gets its own arguments, and runs as Python itself would run it.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_sparse_attn.cli.argument_types import json_object
from hf_sparse_attn.cli.arguments import UserError, argument

_USAGE = "usage: hf-sparse-attn run [--sparse-attention JSON] SCRIPT|-m MODULE ARGUMENTS..."


def main() -> None:
    overrides, is_module, program, rest = _parse(sys.argv[1:])
    if overrides is not None:
        with argument("--sparse-attention"):
            set_for_new_models(overrides)
    if is_module:
        sys.path.insert(0, os.getcwd())
        with argument("-m"):
            if _is_missing(program):
                raise ValueError(f"there is no module {program!r}")
        sys.argv = [program, *rest]
        _run(functools.partial(runpy.run_module, program, run_name="__main__", alter_sys=True))
        return
    path = Path(program).expanduser()
    if not path.exists():
        raise UserError(f"argument SCRIPT: there is no file {program!r}")
    sys.argv = [program, *rest]
    sys.path.insert(0, str(path.resolve().parent))
    _run(functools.partial(runpy.run_path, str(path), run_name="__main__"))


def _run(program: Any) -> None:
    """Run it; its errors are its own, with their traceback, and so is its exit status."""
    try:
        program()
    except Exception as error:  # not one line, as for mistakes in this command's own arguments
        frames = error.__traceback__
        sys.excepthook(type(error), error, frames and frames.tb_next)
        sys.exit(1)


def _parse(arguments: list[str]) -> tuple[dict[str, Any] | None, bool, str, list[str]]:
    """What is this command's own: the overrides, whether a module is run, its name, and the program's arguments."""
    overrides = None
    while arguments and arguments[0].startswith("-"):
        option, *arguments = arguments
        name, has_value, value = option.partition("=")
        if option in ("-h", "--help"):
            print(f"{_USAGE}\n\n{__doc__}")
            sys.exit(0)
        if name == "--sparse-attention":
            if not has_value:
                if not arguments:
                    raise UserError("argument --sparse-attention: expected a JSON object")
                value, *arguments = arguments
            with argument("--sparse-attention"):
                overrides = json_object(value)
        elif option == "-m":
            if not arguments:
                raise UserError("argument -m: expected the name of a module")
            return overrides, True, arguments[0], arguments[1:]
        else:
            raise UserError(f"{option!r} stands before the program and is not this command's; {_USAGE}")
    if not arguments:
        raise UserError(f"expected a script, or -m and a module; {_USAGE}")
    return overrides, False, arguments[0], arguments[1:]


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        return True


def set_for_new_models(overrides: dict[str, Any]) -> None:
    """Let every model that this process makes with `attn_implementation="sparse"` have these fields.

    Transformers drops unknown keywords of `from_pretrained`, so a program cannot pass `sparse_attention` on for a model
    that was never converted. For this process only: `PreTrainedModel.__init__` is wrapped.

    Raises:
        ValueError: for an unknown field or an impossible value, naming the field.
    """
    from transformers import PreTrainedModel

    from hf_sparse_attn.config import SparseAttentionConfig, text_config
    from hf_sparse_attn.integration import NAME, merge_sparse_attention

    if overrides.get("hash") != "calibrated":  # whose text a model may bring
        SparseAttentionConfig.from_dict(overrides)
    original = PreTrainedModel.__init__

    @functools.wraps(original)
    def initialize(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        if self.config._attn_implementation == NAME:
            text_config(self.config).sparse_attention = merge_sparse_attention(self.config, overrides)

    PreTrainedModel.__init__ = initialize  # type: ignore[method-assign]
