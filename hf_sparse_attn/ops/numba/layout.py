"""How tensors become the arrays that compiled code reads: rows contiguous, filled up to whole registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.ops.numba.kernels import (
    Array,
)
from hf_sparse_attn.ops.numba.simd import LANES

HALF = {torch.bfloat16: np.uint16, torch.float16: np.int16}  # keys and values are read so, and summed in float32


def padded(number: int) -> int:
    return -(-number // LANES) * LANES


def widened(x: Tensor) -> Tensor:
    """In the precision that is computed in."""
    return x.float() if x.dtype in HALF else x


def as_array(x: Tensor) -> Array:
    """The memory of a contiguous tensor, of half precision as `simd.load` takes it."""
    return x.view(torch.int16).numpy().view(HALF[x.dtype]) if x.dtype in HALF else x.numpy()


def by_row(x: Tensor) -> Array:
    """[group, R, head_dim] -> [R, group, head_dim], filled up to a multiple of LANES."""
    return filled(x.transpose(0, 1)).numpy()


def flat_heads(x: Tensor) -> tuple[Array, int]:
    """The memory of [num_key_value_heads, N, head_dim] from its first element on, and the step from head to head.

    No copy is made of what a cache keeps, unless head_dim is not a multiple of LANES.
    """
    if x.shape[2] % LANES or x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = filled(x)
    length = (len(x) - 1) * x.stride(0) + x.shape[1] * x.shape[2]
    flat = x.detach().as_strided((length,), (1,))
    return as_array(flat), x.stride(0)


def flat_rows(output: Tensor) -> tuple[Array, int]:
    """The memory of [group, R, head_dim] from its first element on, and the step from row to row."""
    stride = output.stride(1)
    length = (output.shape[1] - 1) * stride + output.shape[0] * output.shape[2]
    return output.as_strided((length,), (1,)).numpy(), stride


@contextmanager
def flat_output(output: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Room for [heads, R, head_dim] in `dtype`, head_dim filled up, for `flat_rows`: the output itself where it is so,
    else what is copied there at the end."""
    num_heads, num_rows, size = output.shape
    if output.dtype == dtype and output.stride(0) == size == padded(size) and output.stride(2) == 1:
        yield output
        return
    own = output.new_empty(num_rows, num_heads, padded(size), dtype=dtype).transpose(0, 1)
    yield own
    output.copy_(own[..., :size])


def filled(x: Tensor) -> Tensor:
    """Contiguous, without gradients, the last dimension filled up with zeros to a multiple of LANES."""
    missing = padded(x.shape[-1]) - x.shape[-1]
    return F.pad(x.detach(), (0, missing)) if missing else x.detach().contiguous()
