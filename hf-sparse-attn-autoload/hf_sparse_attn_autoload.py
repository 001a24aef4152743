"""Imports `hf_sparse_attn`, which registers "sparse", once a program has imported Transformers' models.

PyTorch calls `install` at the end of `import torch`, where an error would end the import: nothing here raises one.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

SWITCH = "HF_SPARSE_ATTN_AUTOLOAD"
MODELS = "transformers.modeling_utils"  # holds the registry, and is imported before any model


def install() -> None:
    """Have "sparse" registered as soon as Transformers' models are imported, unless `SWITCH` is 0."""
    if os.environ.get(SWITCH, "1") == "0" or any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        return
    finder = _Waiting()
    if not finder.is_over():
        sys.meta_path.insert(0, finder)


class _Waiting(MetaPathFinder):
    """Finds nothing by itself: waits for `MODELS`, and takes itself away."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODELS:
            self.is_over()
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._and_register(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec

    def is_over(self) -> bool:
        """Register if `MODELS` is there already. It imports PyTorch, which may call `install` in the middle of it."""
        spec = getattr(sys.modules.get(MODELS), "__spec__", None)
        if spec is None or getattr(spec, "_initializing", False):
            return False
        self._register()
        return True

    def _and_register(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._register()

        return exec_module

    def _register(self) -> None:
        # A new list: whoever goes through the old one, as every import does, misses no finder.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        try:
            import hf_sparse_attn  # noqa: F401
        except Exception as error:
            logging.getLogger("hf_sparse_attn").warning(
                f'attn_implementation="sparse" is not registered: {type(error).__name__}: {error}; {SWITCH}=0 tells '
                "hf-sparse-attn-autoload not to try"
            )
