"""What Transformers passes about masks, turned into one description: the documents of every batch row.

A document is a run of tokens that see each other causally: one batch row without its padding, or one of several
packed into a row. Everything after this file works on one document at a time, with positions that count from its
first token, so padding, packing and cache slots cannot leak into the pattern.

The mask function passes on one small tensor, `signed_positions` [batch, 1, 1, KV], int32:

     0            no key here: padding, or a slot that is not filled yet
     p + 1        the key at position p of its batch row, padding not counted, or of its packed document
    -(p + 1)      the same, and the slot belongs to a query of this call
    PADDED_QUERY  a query of this call that is padding
    LATER_TOKENS  everywhere: the model wants tokens to see later ones, which is refused when the values are read

All that is known lies in its values, so it survives being sliced, moved to another device and stored in a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.tensor_parallel import refuse_parted_kv_heads
from hf_sparse_attn.tracing import is_traced, refuse_transforms

PADDED_QUERY = torch.iinfo(torch.int32).min
LATER_TOKENS = PADDED_QUERY + 1


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
    mask_function: Callable[..., Tensor] | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor | None:
    """The mask function: see the module's docstring. None where every slot is a key and the last ones are the queries.

    Args:
        batch_size, q_length, kv_length: sizes of this call.
        q_offset: slot of the first query, counted from the first token that the cache ever saw.
        kv_offset: slot of the first key, counted likewise.
        attention_mask: [batch, slots], True or non-zero where the token is no padding; None: no padding.
        mask_function: (batch, head, query slot, key slot) -> may attend, padding aside.
        allow_is_causal_skip: False where the mask may be something else than causal: packed documents, for one.
        others: what else Transformers says about the mask; read only to refuse a pattern of the model's own.

    Raises:
        ValueError: for a model that attends in chunks or by a mask function of its own.
    """
    refuse_transforms()
    _refuse_other_patterns(**others)
    unusual = mask_function is not None and not allow_is_causal_skip and q_length > 1
    last = q_offset + q_length
    to_the_end = isinstance(last, int) and kv_offset == 0 and last == kv_length
    # Where Transformers does not look for packed documents, whether there was a mask tells later on.
    says_nothing = attention_mask is None or asks_what_is_packed(others.get("config"))
    if to_the_end and not unusual and says_nothing and _no_padding(attention_mask, kv_length):
        return None
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in place
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
    later = None
    if unusual:
        assert mask_function is not None
        batch, pairs = torch.arange(batch_size, device=device)[:, None], is_query[1:] & is_query[:-1]
        starts = torch.nn.functional.pad(~mask_function(batch, 0, slot[1:], slot[:-1]) & pairs, (1, 0))
        rank = rank - torch.where(starts, rank - 1, 0).cummax(-1).values
        later = (mask_function(batch, 0, slot[:-1], slot[1:]) & pairs).any()
    signed = torch.where(present, torch.where(is_query, -rank, rank), torch.where(is_query, PADDED_QUERY, 0))
    if later is not None:
        signed = torch.where(later, LATER_TOKENS, signed)
    return signed.to(torch.int32)[:, None, None]


def asks_what_is_packed(config: Any) -> bool:
    """Whether a family's models tell Transformers' mask functions their position_ids, which show what is packed."""
    return getattr(config, "model_type", None) not in ("afmoe", "gpt_oss", "granitemoehybrid")


def _no_padding(attention_mask: Tensor | None, kv_length: int) -> bool:
    if attention_mask is None:
        return True
    if is_traced(attention_mask):
        return False
    return bool(attention_mask[:, :kv_length].all() and attention_mask.shape[1] >= kv_length)


def _refuse_other_patterns(local_size: int | None = None, use_vmap: bool = False, config: Any = None, **_: Any) -> None:
    """Causal masks and sliding windows come in ways that this plugin reads elsewhere; nothing else may get lost."""
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        raise unsupported("chunked attention")
    if use_vmap:  # or_mask_function, and_mask_function
        raise unsupported("a mask function of the model's own")
    refuse_parted_kv_heads(config)
    if config is not None and not torch.compiler.is_compiling() and not _attention_is_called(config):
        raise unsupported(f"{config.model_type}, which never calls its attention through Transformers' registry")


def _attention_is_called(config: Any) -> bool:
    """False for families of Transformers' own that take any attn_implementation, make a mask and never use either."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(name)
    if modeling is None or not name.startswith("transformers.models.") or getattr(config, "sub_configs", None):
        return True
    return hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


def unsupported(what: str) -> ValueError:
    """The one error for what the sparse attention cannot do."""
    return ValueError(f'attn_implementation="sparse" does not support {what}; choose another implementation')


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
        ValueError: for a mask that is not this plugin's, and where the model wants tokens to see later ones.
    """
    if attention_mask is not None and (
        attention_mask.dtype != torch.int32 or attention_mask.shape != (batch_size, 1, 1, kv_length)
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
                raise unsupported("non-causal attention")
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
