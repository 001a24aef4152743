"""What Transformers passes about masks, turned into one description: the documents of every batch row.

A document is a run of tokens that see each other causally: one batch row without its padding, or one of several
packed into a row. Everything after this file works on one document at a time, with positions that count from its
first token, so padding, packing and cache slots cannot leak into the pattern.

The mask function passes on one small tensor, `signed_positions` [batch, 1, 1, KV], int32:

     0            no key here: padding, or a slot that is not filled yet
     p + 1        the key at position p of its batch row, padding not counted
    -(p + 1)      the same, and the slot belongs to a query of this call
    PADDED_QUERY  a query of this call that is padding

All that is known lies in its values, so it survives being sliced, moved to another device and stored in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PADDED_QUERY = torch.iinfo(torch.int32).min


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


def signed_positions(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **pattern: Any,
) -> Tensor | None:
    """The mask function: see the module's docstring. None where every slot is a key and the last ones are the queries.

    Args:
        batch_size, q_length, kv_length: sizes of this call.
        q_offset: slot of the first query, counted from the first token that the cache ever saw.
        kv_offset: slot of the first key, counted likewise.
        attention_mask: [batch, slots], True or non-zero where the token is no padding; None: no padding.
        pattern: what else Transformers says about the mask; read only to refuse a pattern of the model's own.

    Raises:
        ValueError: for a model that attends in chunks, to later tokens, or by a mask function of its own.
    """
    _refuse_other_patterns(batch_size, q_length, q_offset, device, **pattern)
    last = q_offset + q_length
    if isinstance(last, int) and kv_offset == 0 and last == kv_length and _no_padding(attention_mask, kv_length):
        return None
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()
        last = q_offset + q_length
    slot = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    if attention_mask is None:
        present = torch.ones(batch_size, kv_offset + kv_length, dtype=torch.bool, device=device)
    else:
        present = attention_mask.to(device=device, dtype=torch.bool)
        missing = kv_offset + kv_length - present.shape[-1]
        if missing > 0:  # slots that a preallocated cache has not filled yet
            present = torch.nn.functional.pad(present, (0, missing), value=False)
    rank = present.cumsum(-1, dtype=torch.int32)[:, kv_offset : kv_offset + kv_length]
    present = present[:, kv_offset : kv_offset + kv_length] & (slot < last)
    is_query = (slot >= q_offset) & (slot < last)
    signed = torch.where(present, torch.where(is_query, -rank, rank), torch.where(is_query, PADDED_QUERY, 0))
    return signed.to(torch.int32)[:, None, None]


def _no_padding(attention_mask: Tensor | None, kv_length: int) -> bool:
    return attention_mask is None or bool(attention_mask[:, :kv_length].all() and attention_mask.shape[1] >= kv_length)


def _refuse_other_patterns(
    batch_size: int,
    q_length: int,
    q_offset: int | Tensor,
    device: torch.device | str,
    mask_function: Callable[..., Tensor] | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **_: Any,
) -> None:
    """Causal masks and sliding windows come in ways that this plugin reads elsewhere; nothing else may get lost."""
    refused = None
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        refused = "chunked attention"
    elif use_vmap:  # or_mask_function, and_mask_function
        refused = "a mask function of the model's own"
    elif not allow_is_causal_skip and mask_function is not None and q_length > 1:  # packed, or not quite causal
        row = torch.arange(q_length - 1, device=device) + q_offset
        if bool(mask_function(torch.arange(batch_size, device=device)[:, None], 0, row, row + 1).any()):
            refused = "non-causal attention between tokens of one block"
    if refused is not None:
        raise ValueError(f'attn_implementation="sparse" does not support {refused}; load the model with "sdpa"')


def documents(
    attention_mask: Tensor | None, position_ids: Tensor | None, batch_size: int, q_length: int, kv_length: int
) -> list[Document]:
    """Split a call into documents.

    A new document starts where `position_ids` stop growing between two tokens that are no padding. Where they start
    below the number of earlier keys, the earlier keys that are too many belong to documents that have ended.

    Args:
        attention_mask: what `signed_positions` made, or None: no padding, the last slots are the queries.
        position_ids: [1 or batch, Q], or None.

    Raises:
        ValueError: for a mask that is not this plugin's, such as a 4D mask of the caller's own.
    """
    if attention_mask is not None and (
        attention_mask.dtype != torch.int32 or attention_mask.shape[1:] != (1, 1, kv_length)
    ):
        raise ValueError(
            'attn_implementation="sparse" takes a 2D attention_mask [batch, tokens] or none; '
            f"got one of shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}"
        )
    found = []
    for batch in range(batch_size):
        ids = None if position_ids is None else position_ids[batch % len(position_ids)]
        if attention_mask is None:
            queries = torch.arange(q_length)
            keys = torch.arange(kv_length)
            first_key = 0
        else:
            signed = attention_mask[batch, 0, 0]
            rows = signed[signed < 0]
            queries = torch.nonzero(rows != PADDED_QUERY).flatten()
            keys = torch.nonzero((signed != 0) & (signed != PADDED_QUERY)).flatten()
            if not len(queries):
                continue
            first_key = int(signed[keys[0]].abs()) - 1
        found += _split(batch, queries, keys, first_key, ids)
    return found


def _split(batch: int, queries: Tensor, keys: Tensor, first_key: int, position_ids: Tensor | None) -> list[Document]:
    """Documents of one batch row, given the rows and slots that are no padding."""
    cached = len(keys) - len(queries)
    starts = [0]  # first query of each document
    begin = 0  # first key of the first document
    if position_ids is not None:
        ids = position_ids[queries.to(position_ids.device)]
        starts += (torch.nonzero(ids[1:] <= ids[:-1]).flatten() + 1).tolist()
        surplus = first_key + cached - int(ids[0])
        if surplus > first_key:
            begin, first_key = surplus - first_key, 0
        elif surplus > 0:
            first_key -= surplus
    found = []
    for start, stop in zip(starts, [*starts[1:], len(queries)], strict=True):
        first = begin if start == 0 else cached + start
        offset = first_key if start == 0 else 0
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
