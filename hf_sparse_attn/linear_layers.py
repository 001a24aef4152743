"""Linear layers on CPUs, computed faster than PyTorch would by itself where nothing is trained.

In float32 PyTorch multiplies by MKL, which reaches half of oneDNN's rate on AMD's processors; oneDNN is part of PyTorch
and as accurate. In bfloat16 processors with instructions for it multiply several times faster still.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LEAST_ROWS = 64  # of the input: few rows are read as fast as the weights by either library
_BFLOAT16 = "avx512_bf16", "amx_bf16", "bf16"  # instructions of x86 and ARM


def fast_linear_layers() -> AbstractContextManager[Any]:
    """In this block linear layers go to oneDNN: float32 on the CPU, many rows, without gradients, in this thread.

    Results differ from PyTorch's by the rounding of float32. Nothing changes with gradients, or in a build of PyTorch
    that has no oneDNN.
    """
    return nullcontext() if torch.is_grad_enabled() or _linear() is None else _OneDNN()


def coarse_linear_layers(model: nn.Module) -> AbstractContextManager[Any]:
    """In this block the linear layers of a float32 model on the CPU are computed in bfloat16, in this thread.

    For what rounding does not matter to. Where the processor has no instructions for it, and for other models, this is
    `fast_linear_layers`.
    """
    first = next(model.parameters())
    if first.dtype == torch.float32 and first.device.type == "cpu" and _has_bfloat16():
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # a cache would hold all weights again
    return fast_linear_layers()


def _has_bfloat16() -> bool:
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of PyTorch
    return any(capabilities.get(name, False) for name in _BFLOAT16)


def _linear() -> Any:
    """oneDNN's linear layer, which torch.compile uses for float32; None where there is none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _is_large(*args):
            return _by_onednn(*args)
        return func(*args, **kwargs or {})


def _is_large(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    tensors = [tensor for tensor in (rows, weight, bias) if tensor is not None]
    plain = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for tensor in tensors
    )
    return plain and not torch.is_grad_enabled() and rows.numel() >= _LEAST_ROWS * rows.shape[-1]


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = _linear()(rows, weight, bias, "none", [], "")
    return result
