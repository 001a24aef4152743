"""Attention of one document: a few cached rows one way, many rows in chunks."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hf_sparse_attn.ops.common.chunked import Call, attend_in_pieces
from hf_sparse_attn.ops.numba.chunks import sparse_pieces
from hf_sparse_attn.ops.numba.decode import attend_linked
from hf_sparse_attn.ops.numba.index import Index
from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.routing import LayerPattern

_KEYS_PER_LINKED_ROW = 100  # at most one linked row for so many keys; with more, sorting the keys pays


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    recorder: Recorder | None,
    index: Index | None = None,
) -> Tensor:
    """See `common.chunked.attend_in_pieces`; with the `index` of a cache, keys and values may be of half precision."""
    end, dense_rows = query_offset + query.shape[1], pattern.dense_rows()
    if dense_rows is None or end <= dense_rows:
        index = None  # it takes in all keys when the first row asks for them
    pieces = partial(sparse_pieces, index)
    if index is not None:
        index.append(key)
        index.move_back(query_offset)
        index.row = end - 1
        few = query.shape[1] <= max(key.shape[1] // _KEYS_PER_LINKED_ROW, 1)
        if few and query_offset >= (dense_rows or 0):
            call = Call(pieces, pattern, query_offset, key_offset, scaling, softcap, sinks is None, recorder)
            return attend_linked(call, index, query, key, value, sinks)
    return attend_in_pieces(
        pieces,
        query,
        key.to(query.dtype),
        value.to(query.dtype),
        pattern=pattern,
        query_offset=query_offset,
        key_offset=key_offset,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        recorder=recorder,
        dense_rows_too=True,
    )
