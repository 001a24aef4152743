"""Which implementation a config's `implementation` means on a device; each is loaded when it is first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from logging import getLogger
from os import environ

import torch

from hf_sparse_attn.ops.backend import Backend


def check_implementation(name: str, device: torch.device) -> None:
    """Whether the implementation that a config names runs on a device.

    Raises:
        ValueError: if it does not run there.
        ImportError: if it needs a package that is not installed or cannot be used.
    """
    find_backend(name, device)


def find_backend(name: str, device: torch.device, is_causal: bool = True) -> Backend:
    """The implementation that a config names on a device.

    Raises:
        ValueError, ImportError: as `check_implementation`, or if it has no attention that is not causal.
    """
    if name == "auto":
        name = _best(device) if is_causal else "torch"
    if name == "numba" and device.type != "cpu":
        raise ValueError(f'implementation="numba" runs on a CPU only, not on {device}; choose "auto" or "torch"')
    if name == "numba" and not _installed("numba"):
        raise ModuleNotFoundError('implementation="numba" needs Numba: pip install numba, or choose "auto" or "torch"')
    if name == "triton" and not _installed("triton"):
        raise ModuleNotFoundError(
            'implementation="triton" needs Triton: pip install triton, or choose "auto" or "torch"'
        )
    if name == "triton" and device.type != "cuda" and environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f'implementation="triton" runs on a GPU only, not on {device}; choose "auto" or "torch"')
    failure = _failure(name)
    if failure is not None:
        raise ImportError(
            f'implementation="{name}": {name.capitalize()} is installed but cannot be used here, {failure}; '
            'choose "auto" or "torch"'
        ) from failure
    backend: Backend = import_module(f"{__package__}.{name}").BACKEND
    if not (is_causal or backend.both_sides):
        raise ValueError(f'implementation="{name}" has no non-causal attention; choose "auto" or "torch"')
    return backend


def computes_dense_rows(name: str, device: torch.device) -> bool:
    """Whether the implementation that a config names does rows that read everything itself, and faster than SDPA."""
    if device.type != "cpu" or name not in ("auto", "numba"):
        return False
    return find_backend(name, device).dense_rows


def _best(device: torch.device) -> str:
    """What "auto" means: "torch" wherever there is nothing faster. Triton's kernels multiply bfloat16 and tf32."""
    best = "torch"
    if device.type == "cpu" and _installed("numba"):
        best = "numba"
    if device.type == "cuda" and torch.version.cuda and _installed("triton"):
        best = "triton" if torch.cuda.get_device_capability(device) >= (8, 0) else "torch"
    return best if _usable(best) else "torch"


def warn_if_slow(device: torch.device) -> None:
    """Tell once that "auto" takes PyTorch's operations because a package is missing, where that costs speed."""
    package = "numba" if device.type == "cpu" else "triton" if device.type == "cuda" and torch.version.cuda else None
    if package is not None and not _installed(package):
        _tell_what_is_missing(package)


@cache
def _tell_what_is_missing(package: str) -> None:
    getLogger("hf_sparse_attn").warning(
        f"{package.capitalize()} is not installed, so sparse attention is computed by PyTorch's operations, which are "
        f"several times slower, and slower than dense attention up to 16000 tokens and more: pip install {package}"
    )


def explain(device: torch.device) -> str:
    """What "auto" takes on a device, and why nothing faster."""
    best = _best(device)
    faster = "numba" if device.type == "cpu" else "triton"
    if best == faster:
        return f'"auto" takes {best}{", if it passes a check at its first use" if best == "triton" else ""}'
    if not _installed(faster):
        return f'"auto" takes {best}: {faster} is not installed'
    return f'"auto" takes {best}: {_failure(faster) or f"{faster} does not support this device"}'


@cache
def _usable(name: str) -> bool:
    """Whether an implementation can be loaded; if not, a warning says so, once."""
    failure = _failure(name)
    if failure is not None:
        getLogger("hf_sparse_attn").warning(
            f"{name.capitalize()} is installed but cannot be used here, {failure}; PyTorch's operations are slower"
        )
    return failure is None


@cache
def _failure(name: str) -> Exception | None:
    """The outcome of loading an implementation: compiled libraries that do not fit raise all kinds of errors."""
    try:
        import_module(f"{__package__}.{name}")
    except Exception as error:
        return error
    return None


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
