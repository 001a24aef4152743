"""How the hosts of the Triton kernels launch them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton.arguments import Strided

TL = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run a kernel on the device of its first tensor, which also tells how wide its numbers are.

    A GPU starts programs along the first dimension of the grid first. In a forward and a backward the KV head is the
    last one: programs that run together read the keys of one or two KV heads, which the L2 cache then holds (17 MB of
    keys and values for 32768 tokens of 128 bfloat16 numbers), and before it tiles or blocks in order, which read much
    the same keys as their neighbours.
    """
    first = first_tensor(args)
    on_device: AbstractContextManager[Any] = nullcontext()
    if first.device.type == "cuda":
        on_device = torch.cuda.device(first.device)
    with on_device:
        kernel[grid](*args, **kwargs | stages(first))


def first_tensor(args: Any) -> Any:
    """The first argument, or the first member of a first argument that is a tuple."""
    while isinstance(args, tuple):
        args = args[0]
    return args


def stages(x: Tensor) -> dict[str, int]:
    """How many steps of a loop are loaded ahead: none where there is no room for them, registers or shared memory."""
    return {"num_stages": 1} if x.dtype.itemsize > 2 or _has_little_memory(x.device) else {}


@cache
def _has_little_memory(device: torch.device) -> bool:
    """Whether a program has 100 or 160 KB of shared memory; Hopper's and Blackwell's for data centers have 227."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] < 200 * 1024)


def stages_of_key_gradients(x: Tensor, most: int) -> int:
    """Steps of a loop that are loaded ahead, up to `most`, in a program that sums the gradients of a block of keys.

    One where products take their operands from shared memory, in which two steps' would not fit: on Blackwell's GPUs
    for data centers.
    """
    return 1 if _multiplies_from_shared_memory(x.device) else most


@cache
def _multiplies_from_shared_memory(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def precision(dtype: torch.dtype) -> str:
    """How products of inputs of a dtype are formed."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def rows_contiguous(x: Tensor) -> Tensor:
    """Without gradients, each row in one piece."""
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def strided(x: Tensor) -> Strided:
    """A tensor [heads, rows, D] for a kernel; each of its rows is in one piece."""
    assert x.stride(-1) == 1
    return Strided(x, *x.stride()[:2])


def block_dim(dim: int) -> int:
    """Width of the tiles that hold rows of that many numbers."""
    return max(int(triton.next_power_of_2(dim)), 16)


def block_keys(x: Tensor, dim: int) -> int:
    """Keys per step of the attention's loops over keys like `x`: a step's keys and values fit into shared memory."""
    row_bytes = x.dtype.itemsize * block_dim(dim)
    room = 2**13 if row_bytes > 256 and _has_little_memory(x.device) else 2**14
    return max(16, min(64, room // row_bytes))


def tile_shape(query: Tensor, group: int, interval_size: int, backward: bool = False) -> tuple[int, int]:
    """Rows of one refresh interval that a tile of queries takes, and the query heads that it has room for.

    As many as the registers hold, so that each key is loaded once for them all: in the backward, which holds gradients
    beside queries, half as many. A row has one bit of 64. In float64 a tile is one row, whose sums other rows' keys do
    not regroup: what comes later changes nothing, to the last bit.
    """
    group_padded = int(triton.next_power_of_2(group))
    if query.dtype == torch.float64:
        return 1, max(group_padded, 16)
    row_bytes = query.dtype.itemsize * block_dim(query.shape[-1])
    if query.dtype.itemsize > 2 or _has_little_memory(query.device):
        room, most_rows = 2**14, 32
    else:
        room, most_rows = (2**15, 32) if backward else (2**16, 64)
    pairs = max(16, min(4 * most_rows, room // row_bytes))
    return min(max(pairs // group_padded, 1), most_rows, int(triton.next_power_of_2(interval_size))), group_padded
