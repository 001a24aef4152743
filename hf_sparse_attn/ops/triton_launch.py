"""How the hosts of the Triton kernels launch them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TL = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run a kernel on the device of its first argument."""
    device = args[0].device
    on_device: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        on_device = torch.cuda.device(device)
    with on_device:
        kernel[grid](*args, **kwargs, **stages(device))


@cache
def _has_little_memory(device: torch.device) -> bool:
    """Whether a program has about 100 KB of shared memory, as on consumers' GPUs, where others have 160 and more."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] < 160 * 1024)


def stages(device: torch.device) -> dict[str, int]:
    """How many steps of a loop are loaded ahead: none where there is no room for them."""
    return {"num_stages": 1} if _has_little_memory(device) else {}


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


def block_keys(x: Tensor, dim: int) -> int:
    """Keys per step of the attention's loops over keys like `x`: a step's keys and values fit into shared memory."""
    room = 2**13 if _is_tight(x) else 2**14
    return max(16, min(64, room // (x.dtype.itemsize * block_dim(dim))))


def pairs(x: Tensor) -> int:
    """(row, query head) pairs per tile, of rows like `x`."""
    return 32 if _is_tight(x) else 64


def _is_tight(x: Tensor) -> bool:
    return x.dtype.itemsize * block_dim(x.shape[-1]) > 256 and _has_little_memory(x.device)
