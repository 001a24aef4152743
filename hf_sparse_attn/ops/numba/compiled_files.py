"""Where code that Numba has compiled is kept, for the next process.

Numba's own cache would do but for this: it knows no source file other than that of a function itself, and it ends the
program at a damaged file, a full disk or where it can write nowhere. Here what cannot be read is compiled again.
"""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import llvmlite
import numba
import numpy as np
from numba import types
from numba.core.caching import NullCache, _CacheLocator
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

from hf_sparse_attn.ops.numba.simd import LANES

_SOURCES = ("simd", "team", "tile", "kernels", "dense_kernels", "backward_kernels")


def cached(dispatcher: Any) -> Any:
    """The same compiled function, one of `kernels`; what it is compiled to is kept.

    A constant in a call of it has the type of other numbers, or there would be another form of the function for each.
    """
    template = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template(tuple(map(types.unliteral, args)), kws)
    dispatcher._cache = _Cache(dispatcher.py_func)
    return dispatcher


class _Cache(NullCache):
    """A file for each signature of a function. It begins with a digest of what it depends on and of itself."""

    def __init__(self, function: Any) -> None:
        self._function = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        name = self._file_name(sig, target_context.codegen())
        for folder in folders():
            try:
                data = (folder / name).read_bytes()
            except OSError:
                continue
            digest, data = data[:32], data[32:]
            if digest == _digest(data):
                return CompileResult._rebuild(target_context, *pickle.loads(data))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        name = self._file_name(sig, data.codegen)
        data = dumps(data._reduce())
        failures = []
        for folder in folders():
            try:
                _write(folder / name, _digest(data) + data)
                return
            except OSError as error:
                failures.append(f"{folder}: {error.strerror}")
        _warn("; ".join(failures))

    def _file_name(self, signature: Any, codegen: Any) -> str:
        key = sha256(repr((signature, codegen.magic_tuple())).encode()).hexdigest()
        return f"{self._function}.{sys.implementation.cache_tag}.{key[:16]}.nbc"


def folders() -> Iterator[Path]:
    """NUMBA_CACHE_DIR if it is set, else beside the source and the user's: the first that works is taken."""
    own, config = _CacheLocator.get_suitable_cache_subpath(__file__), vars(numba.config)
    if config["CACHE_DIR"]:
        yield Path(config["CACHE_DIR"], own)
        return
    yield Path(__file__).with_name("__pycache__")
    of_user = Path(AppDirs("numba", appauthor=False).user_cache_dir, own)
    if of_user.is_absolute():  # else there is no home
        yield of_user


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{uuid4().hex}")  # other processes may write the same
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _digest(data: bytes) -> bytes:
    return sha256(_DEPENDENCIES + data).digest()


def _read(module: str) -> bytes:
    """The source of a module, or what stands for it."""
    if getattr(sys, "frozen", False):  # everything in one file
        return Path(sys.executable).read_bytes()
    spec: Any = find_spec(f"{__package__}.{module}")
    return spec.loader.get_data(spec.origin)


@cache
def _warn(failures: str) -> None:
    logging.getLogger("hf_sparse_attn").warning(
        "What Numba compiles cannot be kept and takes 10 to 15 seconds in each process; let NUMBA_CACHE_DIR name a "
        f"folder that can be written to ({failures})"
    )


# A digest of what this process runs, whatever happens to the files later.
# What is kept names the module that it was compiled for, and a Hub kernel's has another name in each build.
_VERSIONS = f"{numba.__version__} {llvmlite.__version__} {np.__version__} {LANES} {__package__} "
_DEPENDENCIES = sha256(b"".join([_VERSIONS.encode(), *map(_read, _SOURCES)])).digest()
