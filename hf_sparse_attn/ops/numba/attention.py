"""Attention of one document: a few cached rows one way, many rows in chunks."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.common.chunked import Call, attend_in_pieces
from hf_sparse_attn.ops.numba import dense_rows as own_dense
from hf_sparse_attn.ops.numba.chunks import sparse_pieces
from hf_sparse_attn.ops.numba.decode import attend_linked

_KEYS_PER_LINKED_ROW = 100  # at most one linked row for so many keys; with more, sorting the keys pays


def document_attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """See `backend.AttendDocument`."""
    end, dense_rows, index = call.query_offset + query.shape[1], call.pattern.dense_rows(), call.index
    if dense_rows is None or end <= dense_rows:
        index = None  # it takes in all keys when the first row asks for them
    pieces = partial(sparse_pieces, index)
    if index is not None:
        index.append(key)
        index.move_back(call.query_offset)
        index.row = end - 1
        few = query.shape[1] <= max(key.shape[1] // _KEYS_PER_LINKED_ROW, 1)
        if few and call.query_offset >= (dense_rows or 0):
            return attend_linked(Call.of(call, pieces), index, query, key, value, call.sinks)
    return attend_in_pieces(pieces, query, key, value, call, own_dense=own_dense)
