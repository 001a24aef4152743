"""Few rows over a cached document: their keys are found by the index and read where the cache has them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.ops.backend import compute_dtype
from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.numba.index import Index
from hf_sparse_attn.ops.numba.kernels import (
    Read,
    attend_heads,
)
from hf_sparse_attn.ops.numba.layout import filled, flat_heads, padded, widened
from hf_sparse_attn.ops.numba.rules import make_rules, num_columns, record
from hf_sparse_attn.ops.numba.team import own_team
from hf_sparse_attn.patterns import num_row_keys, row_keys


def attend_linked(call: Call, index: Index, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """Few sparse rows: their keys are where the cache has them."""
    num_kv_heads, num_rows, group = len(key), query.shape[1], len(query) // len(key)
    rows = filled((widened(query) * call.scaling).unflatten(0, (num_kv_heads, group)).transpose(1, 2)).numpy()
    budgets = np.array([call.budget(h, key.shape[1]) for h in range(num_kv_heads)])
    min_weights = np.array(call.pattern.min_weights, rows.dtype).reshape(num_kv_heads, group)
    rules = make_rules(call, int(budgets.max()), min_weights)
    if sinks is not None:
        rules = rules._replace(sinks=sinks.numpy().reshape(num_kv_heads, group))
    positions = torch.arange(call.query_offset, call.query_offset + num_rows)
    static = torch.from_numpy(index.static)
    drawn = row_keys(call.pattern, positions, static, rules.window, call.key_offset).int().numpy()
    keep = call.recorder is not None
    width = num_columns(rules, len(index.static), key.shape[1], num_row_keys(call.pattern.config))
    kept_rows = num_rows if keep else 1
    read = Read(
        np.empty((num_kv_heads, kept_rows, group, width), rows.dtype),
        np.empty((num_kv_heads, kept_rows, width), np.int32),
        np.empty((num_kv_heads, kept_rows, 3), np.int32),
    )
    value_dim = padded(value.shape[-1])
    output = torch.empty(num_rows, len(query), value_dim, dtype=compute_dtype(query, key))
    (flat_key, key_step), (flat_value, value_step) = flat_heads(key), flat_heads(value)
    keys = (key.shape[1], flat_key, flat_value, key_step, value_step, value_dim)
    attend_heads(
        own_team(),
        position=call.query_offset,
        query=rows,
        summed=rows.sum(2),
        keys=keys,
        key_offset=call.key_offset,
        static=index.static,
        index=(index.bucket, index.previous, index.states),
        rules=rules,
        budgets=budgets,
        drawn=drawn,
        output=output.view(-1).numpy(),
        read=read,
        keep=keep,
    )
    if keep:
        for h in range(num_kv_heads):
            record(call, h, positions, Read(*(x[h] for x in read)), None)
    return output[..., : value.shape[-1]].to(query.dtype).contiguous().transpose(0, 1)
