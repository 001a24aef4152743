"""Rows that read everything, by tiles of rows that share their keys, forward and backward: a `chunked.DenseRows`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.ops.backend import compute_dtype
from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.numba.dense_kernels import Rows, attend_chunks, attend_scored_rows, differentiate_chunks
from hf_sparse_attn.ops.numba.kernels import Array
from hf_sparse_attn.ops.numba.layout import filled, flat_output, flat_rows, padded, widened
from hf_sparse_attn.ops.numba.rules import UNBOUNDED
from hf_sparse_attn.ops.numba.team import own_team
from hf_sparse_attn.ops.numba.tile import ROWS, WIDE


def attend(
    call: Call,
    num_older: int,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Fill output [num_heads, R, head_dim of value], and leave the rows' logsumexp for a backward."""
    rows = _rows(call, num_older, query, key)
    num_kv_heads, num_pairs, _ = rows.query.shape
    logsumexp = np.zeros((num_kv_heads, 0 if call.statistics is None else num_pairs), rows.query.dtype)
    own_sinks = np.zeros((num_kv_heads, 0), rows.query.dtype)
    if sinks is not None:
        own_sinks = sinks.detach().view(num_kv_heads, -1).numpy()
    with flat_output(output, compute_dtype(query, key)) as own:
        attend_chunks(own_team(), rows, filled(widened(value)).numpy(), own_sinks, *flat_rows(own), logsumexp)
    if call.statistics is not None:
        call.statistics.append(torch.from_numpy(logsumexp))


def differentiate(
    call: Call,
    num_older: int,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the arguments of `attend` for that of its result; of keys and values in float32 or more."""
    assert call.output is not None
    assert call.statistics
    rows, num_rows, logsumexp = _rows(call, num_older, query, key), query.shape[1], call.statistics[0].numpy()
    delta = (widened(grad) * widened(call.output[:, :num_rows])).sum(-1)
    slope, means = (_pairs(x, len(key)).numpy() for x in (widened(grad), delta[..., None]))
    num_parts = -(-2 * torch.get_num_threads() // len(key))
    room = num_parts, len(key), rows.key.shape[1] * WIDE
    query_grad = np.zeros_like(rows.query)
    key_grad = np.zeros((*room, rows.query.shape[2]), query_grad.dtype)
    value_grad = np.zeros((*room, slope.shape[2]), query_grad.dtype)
    differentiate_chunks(
        own_team(),
        rows,
        filled(widened(key)).numpy(),
        _side_by_side(value).numpy(),
        slope,
        logsumexp,
        means[..., 0],
        query_grad,
        key_grad,
        value_grad,
    )
    by_head = torch.from_numpy(query_grad)[:, : num_rows * rows.group].unflatten(1, (num_rows, rows.group))
    found = by_head.transpose(1, 2).flatten(0, 1)[..., : query.shape[2]] * call.scaling
    summed = [torch.from_numpy(x).sum(0)[:, : key.shape[1]] for x in (key_grad, value_grad)]
    grads = found, summed[0][..., : key.shape[2]], summed[1][..., : value.shape[2]]
    if sinks is None:
        return grads
    of_rows = torch.from_numpy(logsumexp)[:, : num_rows * rows.group].view(len(key), num_rows, rows.group)
    weights = (sinks[:, None] - of_rows.transpose(1, 2).flatten(0, 1)).exp()
    return *grads, -(weights * delta).sum(1)


def attend_scored(
    call: Call,
    num_older: int,
    kv_head: int,
    static: Array,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Fill output [group, R, head_dim of value] for rows of one KV head that score every key up to their own.

    Args:
        call: the rest.
        num_older: keys that are older than the first row's own.
        kv_head: whose smallest weights hold.
        static: sorted indices of the static keys, int64.
        output, query: [group, R, head_dim].
        key, value: [1, N, head_dim], up to the last row's own.
        sinks: [group], or None.
    """
    rows = _rows(call, num_older, query, key)
    min_weights = call.pattern.min_weights[kv_head * len(query) : (kv_head + 1) * len(query)]
    with flat_output(output, compute_dtype(query, key)) as own:
        attend_scored_rows(
            rows,
            filled(widened(value)).numpy(),
            np.zeros(0, rows.query.dtype) if sinks is None else sinks.detach().numpy(),
            np.array(min_weights, rows.query.dtype),
            static,
            call.pattern.window(UNBOUNDED),
            *flat_rows(own),
        )


def _rows(call: Call, num_older: int, query: Tensor, key: Tensor) -> Rows:
    return Rows(
        query=_pairs(widened(query) * call.scaling, len(key)).numpy(),
        key=_side_by_side(key).numpy(),
        num_keys=key.shape[1],
        num_older=num_older,
        group=len(query) // len(key),
        window=call.pattern.sliding_window or UNBOUNDED,
    )


def _pairs(x: Tensor, num_kv_heads: int) -> Tensor:
    """[num_heads, R, D] -> [num_key_value_heads, pairs, D], filled up with zeros."""
    grouped = x.detach().unflatten(0, (num_kv_heads, -1)).transpose(1, 2)
    num_pairs = grouped.shape[1] * grouped.shape[2]
    missing = padded(x.shape[2]) - x.shape[2], -num_pairs % ROWS
    flat = grouped.reshape(num_kv_heads, num_pairs, x.shape[2])
    return F.pad(flat, (0, missing[0], 0, missing[1])) if any(missing) else flat.contiguous()


def _side_by_side(key: Tensor) -> Tensor:
    """[num_key_value_heads, N, D] -> [num_key_value_heads, blocks, D, WIDE], filled up with zeros."""
    key = widened(key.detach())
    missing = padded(key.shape[2]) - key.shape[2], -key.shape[1] % WIDE
    return F.pad(key, (0, missing[0], 0, missing[1])).unflatten(1, (-1, WIDE)).transpose(2, 3).contiguous()
