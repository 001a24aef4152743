"""The documents of every batch row, read from what the mask function made.

A document is a run of tokens that see each other, causally or on both sides: one batch row without its padding, or one
of several packed into a row. Everything after this works on one document at a time, with positions that count from its
first token, so padding, packing and cache slots cannot leak into the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.masks.mask_function import LATER_TOKENS, PADDED_QUERY
from hf_sparse_attn.masks.unsupported import unsupported


@dataclass(frozen=True)
class Document:
    """One document of one batch row.

    Args:
        batch: index of the batch row.
        queries: which rows of `query` belong to it (a slice, or int64 indices).
        keys: which slots of `key` belong to it (a slice, or int64 indices), up to its last query.
        query_offset: position of its first query.
        key_offset: position of its first key; over 0 where a sliding cache has dropped the first ones.
    """

    batch: int
    queries: slice | Tensor
    keys: slice | Tensor
    query_offset: int
    key_offset: int


def documents(
    attention_mask: Tensor | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    starts: Tensor | None = None,
) -> list[Document]:
    """Split a call into documents.

    A new document starts where the mask or `starts` says so. In the mask Transformers itself says where documents are
    packed: it tells from position_ids, where there is neither a mask nor a cache. Anywhere else position_ids are only
    what rotary embeddings count by.

    Args:
        attention_mask: what `signed_positions` made, or None: no padding, the last slots are the queries.
        starts: [1 or batch, Q], True where a document starts, or None; see `document_starts`.

    Raises:
        ValueError: for a mask that is not this plugin's, and where the model wants blocks of tokens to see later ones.
    """
    if attention_mask is not None and (
        attention_mask.dtype != torch.int32
        or attention_mask.shape not in ((batch_size, 1, 1, kv_length), (batch_size, 1, 2, kv_length))
    ):
        raise ValueError(
            'attn_implementation="sparse" takes a 2D attention_mask [batch, tokens], a causal 4D mask '
            f"[batch, 1, {q_length}, {kv_length}] or none; "
            f"got one of shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}"
        )
    found = []
    for batch in range(batch_size):
        started = None if starts is None else starts[batch % len(starts)].cpu()
        if attention_mask is None and started is None:
            found.append(Document(batch, slice(0, q_length), slice(0, kv_length), kv_length - q_length, 0))
            continue
        if attention_mask is None:
            queries = torch.arange(q_length)
            keys = torch.arange(kv_length)
            first_key = 0
        else:
            signed = attention_mask[batch, 0, 0].cpu()
            if len(signed) and signed[0] == LATER_TOKENS:
                raise unsupported("causal attention with blocks of tokens that see each other")
            rows = signed[signed < 0]
            queries = torch.nonzero(rows != PADDED_QUERY).flatten()
            keys = torch.nonzero((signed != 0) & (signed != PADDED_QUERY)).flatten()
            if not len(queries):
                continue
            first_key = int(signed[keys[0]].abs()) - 1
            restarts = rows == -1
            started = restarts if started is None else started | restarts
        assert started is not None
        found += _split(batch, queries, keys, first_key, started[queries])
    return found


def document_starts(cu_seq_lens: Tensor | None, seq_idx: Tensor | None, q_length: int) -> Tensor | None:
    """Where collators say that packed documents start, other than by position_ids: [1 or batch, Q], bool.

    Args:
        cu_seq_lens: [documents + 1], lengths added up, of a batch of one row; or None.
        seq_idx: [batch, Q], the number of each token's document; or None.
        q_length: tokens of this call.
    """
    starts = None
    if seq_idx is not None:
        starts = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    if cu_seq_lens is not None:
        token = torch.arange(q_length, device=cu_seq_lens.device)
        by_length = torch.isin(token, cu_seq_lens)[None]
        starts = by_length if starts is None else starts | by_length
    return starts


def _split(batch: int, queries: Tensor, keys: Tensor, first_key: int, starts: Tensor) -> list[Document]:
    """Documents of one batch row, given the rows and slots that are no padding, and at which rows documents start.

    The first one goes on from earlier keys.
    """
    cached = len(keys) - len(queries)
    first_query = [0, *(torch.nonzero(starts[1:]).flatten() + 1).tolist()]
    found = []
    for start, stop in zip(first_query, [*first_query[1:], len(queries)], strict=True):
        first, offset = (0, first_key) if start == 0 else (cached + start, 0)
        found.append(
            Document(
                batch,
                _as_slice(queries[start:stop]),
                _as_slice(keys[first : cached + stop]),
                offset + cached + start - first,
                offset,
            )
        )
    return found


def _as_slice(index: Tensor) -> slice | Tensor:
    """A slice where the indices are consecutive, so that indexing makes no copy."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index
