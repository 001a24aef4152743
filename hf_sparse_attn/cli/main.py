"""The console command `hf-sparse-attn`, also `python -m hf_sparse_attn`: a module of this package for each command."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from typing import NoReturn

from hf_sparse_attn.cli.arguments import UserError, run, show_warnings

# By command: its module, and what it does.
COMMANDS = {
    "convert": ("convert", "Convert a dense checkpoint: fit the hash and what every head reads on sample documents."),
    "eval-perplexity": ("eval_perplexity", "Measure perplexity over long documents, dense and sparse."),
    "eval-needle": ("eval_needle", "Hide facts in long text and ask for them, dense and sparse."),
    "eval-tasks": ("eval_tasks", "Ask RULER-style tasks, dense and sparse, and name the worst one."),
    "eval-recall": ("eval_recall", "Measure what the sparse attention keeps of the dense one, by layer and head."),
    "leak-test": ("leak_test", "Show that no logit knows of later tokens, whatever the attention."),
    "eval-cache-policies": ("eval_cache_policies", "Compare the eviction policies: perplexity, needles and bytes."),
    "compare-patterns": ("compare_patterns", "Compare the field's sparse patterns on one model at the same density."),
    "report": ("report", "Gather what other commands measured into one page and a model card's tables."),
    "finetune": ("finetune", "Fine-tune on long documents with Transformers' Trainer."),
    "benchmark": ("benchmark", "Measure time and memory against dense attention."),
    "roofline": ("roofline", "Say what the GPU kernels compute and move, and the least time that this takes."),
    "plot": ("plot_pattern", "Draw which keys each row attends to."),
    "chat": ("chat", "Answer questions about a document that is read once."),
    "info": ("info", 'Print versions, devices and what "auto" takes: what a bug report needs.'),
    "run": ("run_program", 'Run any program with "sparse" registered: a script, or -m and a module.'),
}


def main() -> NoReturn:
    """The console command."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0)
    if arguments and arguments[0] == "--version":
        from hf_sparse_attn import __version__

        print(__version__)
        sys.exit(0)
    sys.argv[0] = "hf-sparse-attn"
    if not arguments or arguments[0] not in COMMANDS:
        run(_refuse)
    sys.argv[1:] = arguments[1:]
    run_command(arguments[0], f"hf-sparse-attn {arguments[0]}")


def run_command(name: str, program: str | None = None) -> NoReturn:
    """Run a command with the arguments of `sys.argv` and exit.

    Args:
        name: one of COMMANDS.
        program: what usage and errors call it; None: as `sys.argv` does.
    """
    if program is not None:
        sys.argv[0] = program

    def command() -> None:
        if name != "run":  # another program decides by itself what it does with warnings
            show_warnings()
        import_module(f"hf_sparse_attn.cli.{COMMANDS[name][0]}").main()

    run(command)


def _refuse() -> None:
    if len(sys.argv) < 2:
        raise UserError(f"expected a command: {', '.join(COMMANDS)}; see hf-sparse-attn --help")
    given = sys.argv[1]
    close = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"{given!r} is not a command{hint} Expected one of {', '.join(COMMANDS)}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-sparse-attn COMMAND ARGUMENTS...",
            "",
            "Sparse attention for long documents in Hugging Face Transformers. Each command takes --help.",
            "",
            *lines,
        ]
    )
