"""Rows that read everything, by tiles of rows that share their keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.ops.backend import compute_dtype
from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.numba.dense_kernels import attend_chunks
from hf_sparse_attn.ops.numba.layout import filled, flat_rows, padded, widened
from hf_sparse_attn.ops.numba.rules import UNBOUNDED
from hf_sparse_attn.ops.numba.team import own_team
from hf_sparse_attn.ops.numba.tile import ROWS, WIDE


def attend_dense(
    call: Call, num_older: int, output: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
) -> None:
    """See `chunked.AttendDense`.

    Args:
        call: the rest.
        num_older: keys that are older than the first row's own.
        output: in the dtype of query and key.
        query: [num_heads, R, head_dim].
        key, value: [num_key_value_heads, N, head_dim].
        sinks: [num_heads], or None.
    """
    num_heads, num_rows, _ = query.shape
    num_kv_heads, value_dim, dtype = len(key), value.shape[2], compute_dtype(query, key)
    group, stride = num_heads // num_kv_heads, padded(value_dim)
    direct = stride == value_dim and output.dtype == dtype and output.stride(0) == value_dim and output.stride(2) == 1
    own = output if direct else output.new_empty(num_rows, num_heads, stride, dtype=dtype).transpose(0, 1)
    flat, output_row = flat_rows(own)
    rows = filled((widened(query) * call.scaling).unflatten(0, (num_kv_heads, group)).transpose(1, 2)).flatten(1, 2)
    arrays = F.pad(rows, (0, 0, 0, -rows.shape[1] % ROWS)), _side_by_side(key), filled(widened(value))
    sinks = rows.new_empty(num_kv_heads, 0) if sinks is None else sinks.detach().view(num_kv_heads, group)
    attend_chunks(
        own_team(),
        *(x.numpy() for x in (*arrays, sinks)),
        num_older,
        group,
        call.pattern.sliding_window or UNBOUNDED,
        flat,
        output_row,
    )
    if not direct:
        output.copy_(own[..., :value_dim])


def _side_by_side(key: Tensor) -> Tensor:
    """[num_key_value_heads, N, head_dim] -> [num_key_value_heads, blocks, head_dim, WIDE]."""
    key = widened(key.detach())
    missing = padded(key.shape[2]) - key.shape[2], -key.shape[1] % WIDE
    return F.pad(key, (0, missing[0], 0, missing[1])).unflatten(1, (-1, WIDE)).transpose(2, 3).contiguous()
