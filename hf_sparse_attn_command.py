"""The way into `hf-sparse-attn` and scripts/: here is set what must be set before `hf_sparse_attn` loads PyTorch."""

from __future__ import annotations

import os
import sys
from types import ModuleType

_UNCHANGED = ("benchmark", "run")  # what they show or run is programs whose threads wait as they do by default


def main() -> None:
    """The console command."""
    _commands("".join(sys.argv[1:2])).main()


def run_command(name: str) -> None:
    """Run a command of `hf_sparse_attn.cli.main.COMMANDS` with the arguments of `sys.argv` and exit."""
    _commands(name).run_command(name)


def _commands(name: str) -> ModuleType:
    """`hf_sparse_attn.cli.main`, loaded with threads that sleep while they wait, unless the user has set how they do.

    Threads of OpenMP spin by default at the end of every operation: beside a busy process, until a time slice is over.
    """
    if name not in _UNCHANGED:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from hf_sparse_attn.cli import main as commands
    except KeyboardInterrupt:  # these imports take seconds
        raise SystemExit(130) from None
    return commands
