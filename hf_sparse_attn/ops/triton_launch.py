"""How the hosts of the Triton kernels launch them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TL = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run a kernel on the device of its first argument."""
    on_device: AbstractContextManager[Any] = nullcontext()
    if args[0].is_cuda:
        on_device = torch.cuda.device(args[0].device)
    with on_device:
        kernel[grid](*args, **kwargs)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What sums over inputs of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """How products of inputs of a dtype are formed."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def rows_contiguous(x: Tensor) -> Tensor:
    """Without gradients, each row in one piece."""
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def with_strides(*tensors: Tensor) -> list[Any]:
    """Each tensor [heads, rows, D] with its first two strides."""
    return [part for x in tensors for part in (x, *x.stride()[:2])]


def block_dim(dim: int) -> int:
    """Width of the tiles that hold rows of that many numbers."""
    return max(int(triton.next_power_of_2(dim)), 16)


def block_keys(dtype: torch.dtype, dim: int) -> int:
    """Keys per step of the attention's loops, so that a step's keys and values fit into shared memory."""
    return max(16, min(64, 8192 * 2 // (dtype.itemsize * block_dim(dim))))
