"""What a model's user should know and no error says: each told once per model, through this package's logger."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_attn.config import longest_context
from hf_sparse_attn.masks.mask_function import PADDED_QUERY
from hf_sparse_attn.side_channels import SEEN_BY

if TYPE_CHECKING:
    from hf_sparse_attn.attention import Inputs
    from hf_sparse_attn.patterns import LayerPattern

_logger = logging.getLogger("hf_sparse_attn")
_told: dict[int, tuple[weakref.ref[Any], set[str]]] = {}  # by id of a model's config, which cannot be hashed


def tell_once(config: Any, message: str, tell: Callable[[str], object] = _logger.warning) -> None:
    """Tell a message, as a rule by a logged warning, unless the model with this config was told the same before."""
    key = id(config)
    if key not in _told:
        _told[key] = weakref.ref(config, lambda _: _told.pop(key, None)), set()
    messages = _told[key][1]
    if message not in messages:
        messages.add(message)
        tell(message)


def beyond_trained_length(longest: int) -> str:
    """The message for a text that is longer than what a model was trained for."""
    return (
        f"positions reach beyond max_position_embeddings={longest}, what the model was trained for: expect worse "
        "answers, from dense attention as well, unless its rotary embeddings are scaled (rope_parameters)"
    )


def notice_positions(config: Any, inputs: Inputs, pattern: LayerPattern) -> None:
    """Look once a forward at position_ids that the attention cannot follow, or that nobody trained the model for."""
    ids, mask, num_keys = inputs.position_ids, inputs.attention_mask, inputs.key.shape[2]
    if ids is None or ids.ndim != 2 or getattr(ids, SEEN_BY, None) is config:
        return
    setattr(ids, SEEN_BY, config)
    longest = longest_context(config)
    if longest is not None and num_keys > longest and int(ids.max()) >= longest:
        tell_once(config, beyond_trained_length(longest))
    if ids.shape[1] < 2 and mask is None:
        return
    if inputs.cu_seq_lens is None and inputs.seq_idx is None:
        _notice_documents(config, ids, mask)
    if mask is not None and mask.dtype == torch.int32:
        dense_rows = pattern.dense_rows()
        routes = dense_rows is not None and num_keys > dense_rows and any(pattern.budgets)
        if routes and bool((_shift(ids, mask) > 0).any()):
            tell_once(
                config,
                "position_ids count the padding of a left-padded batch, which turns the rotary embeddings of a row's "
                "keys, so sparse attention finds other keys for it than for the row alone; pass position_ids that "
                "start at 0, (attention_mask.cumsum(-1) - 1).clamp(min=0), as generate does",
            )


def _notice_documents(config: Any, ids: Tensor, mask: Tensor | None) -> None:
    falls = ids[:, 1:] <= ids[:, :-1]
    if mask is not None:
        if mask.dtype != torch.int32:  # the caller's own, which says what is a document
            return
        rank = _query_ranks(mask, ids.shape[1])
        falls = falls & (rank[:, 1:] == rank[:, :-1] + 1)
    if bool(falls.any()):
        tell_once(
            config,
            "position_ids repeat or start anew, but beside an attention_mask or a cache Transformers does not take "
            "that for packed documents: each row is read as one document, as by any other attention; to pack, pass no "
            "attention_mask and use_cache=False",
        )


def _query_ranks(mask: Tensor, num_queries: int) -> Tensor:
    """Each query's place among its document's tokens, from 1 on; a negative number for padding: [batch, Q]."""
    signed = mask[:, 0, 0]
    queries = signed[signed < 0].view(-1, num_queries)
    return torch.where(queries == PADDED_QUERY, queries, -queries)


def _shift(ids: Tensor, mask: Tensor) -> Tensor:
    """How far position_ids are ahead of the place of each row's first token: [batch]; 0 for a row of padding."""
    rank = _query_ranks(mask, ids.shape[1])
    first = (rank > 0).int().argmax(1, keepdim=True)
    ahead = ids.expand(len(rank), -1).gather(1, first) + 1 - rank.gather(1, first)
    return torch.where(rank.gather(1, first) > 0, ahead, 0)[:, 0]
