"""Linear layers on CPUs, computed faster than PyTorch would by itself where nothing is trained.

In float32 PyTorch multiplies by MKL, which reaches half of oneDNN's rate on AMD's processors; oneDNN is part of PyTorch
and as accurate. In bfloat16 processors with instructions for it multiply several times faster still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_ROWS = 64  # of the input: few rows are read as fast as the weights by either library
_BFLOAT16 = "avx512_bf16", "amx_bf16", "bf16"  # instructions of x86 and ARM


@contextmanager
def fast_linear_layers(model: nn.Module) -> Iterator[None]:
    """In this block a model's linear layers go to oneDNN: in float32 on the CPU, with many rows, without gradients.

    Results differ from PyTorch's by the rounding of float32. Nothing changes with gradients, for layers of other
    classes than `torch.nn.Linear` or with hooks of accelerate, in what is compiled, or where PyTorch has no oneDNN.
    """
    layers = []
    if not torch.is_grad_enabled() and _linear() is not None:
        layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = _OneDNNLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def coarse_linear_layers(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """In this block the linear layers of a float32 model on the CPU are computed in bfloat16, in this thread.

    For what rounding does not matter to. Where the processor has no instructions for it, and for other models, this is
    `fast_linear_layers`.

    Args:
        device: where the model computes, wherever its weights are meanwhile (`tracing.input_device`).
    """
    if next(model.parameters()).dtype == torch.float32 and device.type == "cpu" and _has_bfloat16():
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # a cache would hold all weights again
    return fast_linear_layers(model)


def _has_bfloat16() -> bool:
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of PyTorch
    return any(capabilities.get(name, False) for name in _BFLOAT16)


def _linear() -> Any:
    """oneDNN's linear layer, which torch.compile uses for float32; None where there is none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _OneDNNLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  PyTorch's name
        if torch.compiler.is_compiling() or not self._is_meant(input):
            return super().forward(input)
        result: Tensor = _linear()(input, self.weight, self.bias, "none", [], "")
        return result

    def _is_meant(self, rows: Tensor) -> bool:
        tensors = [tensor for tensor in (rows, self.weight, self.bias) if tensor is not None]
        plain = all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
            for tensor in tensors
        )
        return plain and not torch.is_grad_enabled() and rows.numel() >= _LEAST_ROWS * rows.shape[-1]
