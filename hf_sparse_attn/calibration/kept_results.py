"""Results of long work on disk, so that work that was interrupted goes on where it was."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_sparse_attn.errors import add_note, one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class KeptResults:
    """Computes each named result once: one that lies in the directory is read from there, mapped, not copied.

    Where the directory cannot be written to, a warning says so and results are kept in memory alone.

    Args:
        directory: for these results alone, made with the first one; None keeps nothing.
        classes: of what results hold besides tensors and plain Python values.
    """

    def __init__(self, directory: Path | None = None, classes: Sequence[Any] = ()) -> None:
        self._directory, self._classes = directory, list(classes)

    def __call__(self, name: str, compute: Callable[[], Result]) -> Result:
        """The result of `compute`, or what it gave the last time; damaged files count as none."""
        if self._directory is None:
            return compute()
        file = self._directory / f"{name}.pt"
        with contextlib.suppress(Exception):
            return self._load(file)
        result = compute()
        if not self._save(file, result):
            return result
        return self._load(file)  # what was computed can leave the memory

    def _load(self, file: Path) -> Any:
        with torch.serialization.safe_globals(self._classes):
            return torch.load(file, mmap=True, weights_only=True)

    def _save(self, file: Path, result: Any) -> bool:
        unfinished = file.with_suffix(f".{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(result, unfinished)
            unfinished.replace(file)
        except (OSError, RuntimeError) as error:  # PyTorch tells a full disk by a RuntimeError
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            logger.warning("cannot keep what is measured, so an interruption loses it: %s", one_line(error))
            self._directory = None
            return False
        return True


@contextlib.contextmanager
def kept_results(directory: Path, classes: Sequence[Any]) -> Iterator[KeptResults]:
    """Results that stay in `directory` if the block ends early, which its error then tells; else they are removed."""
    try:
        yield KeptResults(directory, classes)
    except BaseException as error:
        if directory.exists():
            add_note(error, f"what was measured is in {str(directory)!r}: the same command goes on from there")
        raise
    shutil.rmtree(directory, ignore_errors=True)
