"""Modules that earlier releases had elsewhere: programs and pickled caches that name them go on working."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

MOVED = {
    "allocation": "calibration.budget_allocation",
    "cli.environment": "environment",
    "cli.loading": "loading",
    "cli.output_files": "output_files",
    "command_line": "cli.arguments",
    "compiled": "custom_op",
    "conversation": "cli.conversation",
    "conversion": "calibration.calibrate",
    "custom_masks": "masks.mask_4d",
    "evaluation.decoding": "benchmarking.decoding",
    "evaluation.roofline": "benchmarking.roofline",
    "evaluation.speed": "benchmarking.speed",
    "eviction": "cache.policies",
    "indexes": "cache.document_indexes",
    "kept": "cache.evicting",
    "local_files": "data.local_files",
    "masking": "masks.mask_function",
    "model_card": "calibration.model_card",
    "ops.numba_cache": "ops.numba.compiled_files",
    "ops.numba_kernels": "ops.numba.kernels",
    "ops.pieces": "ops.common.chunked",
    "ops.simd": "ops.numba.simd",
    "ops.triton_decoding": "ops.triton.decode",
    "ops.triton_index": "ops.triton.index",
    "ops.triton_kernels": "ops.triton.forward",
    "ops.triton_launch": "ops.triton.launch",
    "ops.triton_routing": "ops.triton.choose_buckets",
    "ops.workers": "ops.common.threads",
    "parallel": "tensor_parallel",
    "quantizer": "hashing.product_quantizer",
}


class _MovedModules(MetaPathFinder, Loader):
    """Gives the module of today for a name of earlier releases; asked last, for what nobody else finds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return spec_from_loader(name, self) if package == __package__ and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__package__}.{MOVED[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__  # which the import system is about to replace
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let names of earlier releases be imported; idempotent."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
