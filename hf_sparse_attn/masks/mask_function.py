"""The mask function that Transformers calls: what it is told about masks, in one small tensor.

That is `signed_positions` [batch, 1, 1, KV], int32:

     0            no key here: padding, or a slot that is not filled yet
     p + 1        the key at position p of its batch row, padding not counted, or of its packed document
    -(p + 1)      the same, and the slot belongs to a query of this call
    PADDED_QUERY  a query of this call that is padding
    LATER_TOKENS  everywhere: some tokens are to see some later ones, which is refused when the values are read

Where attention is not causal, it is [batch, 1, 2, KV]: below these, in each column, how far the model's own window
reaches on both sides (keys with |p - j| < window), or 0, where the mask says nothing of a window.

All that is known lies in its values, so it survives being sliced, moved to another device and stored in a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.masks.unsupported import unsupported
from hf_sparse_attn.tensor_parallel import refuse_parted_kv_heads
from hf_sparse_attn.tracing import is_traced, refuse_transforms

PADDED_QUERY = torch.iinfo(torch.int32).min
LATER_TOKENS = PADDED_QUERY + 1


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
        ValueError: for a model that attends in chunks or by a mask function of its own, and for cross-attention.
    """
    refuse_transforms()
    window = _window_on_both_sides(**others)
    if window is not None:
        check_lengths(q_length, kv_length)
        others["use_vmap"] = others.get("use_vmap", False) and not _is_gemma_encoder(others.get("config"))
    _refuse_other_patterns(**others)
    unusual = mask_function is not None and not allow_is_causal_skip and q_length > 1
    last = q_offset + q_length
    to_the_end = isinstance(last, int) and kv_offset == 0 and last == kv_length
    # Where Transformers does not look for packed documents, whether there was a mask tells later on.
    says_nothing = attention_mask is None or asks_what_is_packed(others.get("config"))
    if window is not None:
        unusual = mask_function is not None and q_length > 1
        if window == 0 and others.get("allow_is_bidirectional_skip") and _no_padding(attention_mask, kv_length):
            return None
    elif to_the_end and not unusual and says_nothing and _no_padding(attention_mask, kv_length):
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
    if window is not None:
        return torch.stack([signed, torch.full_like(signed, window)], 1).to(torch.int32)[:, None]
    if later is not None:
        signed = torch.where(later, LATER_TOKENS, signed)
    return signed.to(torch.int32)[:, None, None]


def reads_both_sides(attention_mask: Tensor | None) -> bool:
    """Whether `signed_positions` made a mask of attention that is not causal; knows by its shape."""
    return attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.shape[2] == 2


def check_lengths(q_length: int, kv_length: int) -> None:
    """Refuse what cannot be one document's non-causal self-attention.

    Raises:
        ValueError: for other numbers of queries and keys.
    """
    if q_length != kv_length:
        raise unsupported(
            f"non-causal attention of {q_length} queries to {kv_length} keys (cross-attention or a cache)"
        )


def _window_on_both_sides(local_size: int | None = None, config: Any = None, **others: Any) -> int | None:
    """None: the mask is causal. Else the window that it describes, |p - j| < window, or 0 for none.

    Transformers' bidirectional masks say whether they may be skipped, and their windows include the distance itself.
    Gemma makes causal masks, with all that follows added to them.
    """
    if "allow_is_bidirectional_skip" in others:
        return 0 if local_size is None else local_size + 1
    return local_size or 0 if others.get("use_vmap") and _is_gemma_encoder(config) else None


def _is_gemma_encoder(config: Any) -> bool:
    return getattr(config, "use_bidirectional_attention", None) is True


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
