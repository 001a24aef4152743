"""Global tokens by token id: an attention function never sees ids, so the model's forward tells it where they stand.

A hook before the forward finds the tokens that `global_token_ids` names and passes their slots on as one more keyword
argument, which Transformers' models hand down to the attention function. Those of cached keys are remembered at the
cache, which is told when its rows change places; what is cut off shows by the cache's length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_sparse_attn.config import SparseAttentionConfig, sparse_config, text_config
from hf_sparse_attn.masks.unsupported import unsupported
from hf_sparse_attn.side_channels import MARKS
from hf_sparse_attn.tracing import is_traced


def mark_global_tokens(model: nn.Module) -> None:
    """Have every forward of a model tell its attention where the tokens of `global_token_ids` stand.

    Once after loading with stock `from_pretrained`; `load_model`, `configure` and the commands do it by themselves. It
    lasts as long as the model, copies included; a model without such tokens is not affected.

    Args:
        model: a Transformers model, wrapped or not.

    Raises:
        ValueError: for an impossible `global_token_ids`, and a model whose forward takes no further keyword arguments.
    """
    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"mark_global_tokens needs a Transformers model, got {type(model).__name__}")
    config = text_config(inner.config)
    asked = sparse_config(config)
    asked.check_vocabulary(getattr(config, "vocab_size", None))
    # In a vision-language model the outer one sees the ids; the text model is called by itself in places.
    for part in {id(part): part for part in (inner.base_model, inner.get_decoder())}.values():
        if "kwargs" not in _parameters(type(part)):
            if asked.global_token_ids:
                raise unsupported(f"global_token_ids in {type(part).__name__}, which hands nothing on to its attention")
        elif _before_forward not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_before_forward, with_kwargs=True)
            part.register_forward_hook(_after_forward, with_kwargs=True)


def _before_forward(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if MARKS in kwargs:  # said by the model around this one
        return None
    config = text_config(module.config)
    global_token_ids = (getattr(config, "sparse_attention", None) or {}).get("global_token_ids")
    if not global_token_ids or config._attn_implementation != "sparse":
        return None
    given = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs} if args else kwargs
    token_ids, held = given.get("input_ids"), given.get("past_key_values")
    if token_ids is None:
        raise ValueError(
            "global_token_ids needs input_ids: which tokens inputs_embeds stand for is not known; pass input_ids, or "
            "take global_token_ids out by hf_sparse_attn.configure(model, global_token_ids=[])"
        )
    if is_traced(token_ids):
        if held is not None:
            raise unsupported("global_token_ids with a cache under torch.compile; generate takes disable_compile=True")
        new = torch.isin(token_ids, token_ids.new_tensor(global_token_ids))
    else:
        global_token_ids = SparseAttentionConfig(global_token_ids=global_token_ids).global_token_ids
        new = torch.isin(token_ids, token_ids.new_tensor(global_token_ids)).cpu()  # where every layer reads them
    return args, {**kwargs, MARKS: new if held is None else _after_cached(held, new)}


def _after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A cache that the forward has made remembers its keys' marks, too."""
    marks = kwargs.get(MARKS)
    if marks is None or is_traced(marks) or not isinstance(output, Iterable):
        return
    for value in output.values() if isinstance(output, Mapping) else output:
        if isinstance(value, Cache) and MARKS not in value.__dict__ and value.get_seq_length() == marks.shape[1]:
            _remember(value, marks)


def _after_cached(held: Any, new: Tensor) -> Tensor:
    """The marks [batch, slots] of all keys that a cache is to hold, given those of the new ones [batch, Q]."""
    past, known = int(held.get_seq_length()), held.__dict__.get(MARKS)
    if past:
        if known is None or len(known) != len(new) or known.shape[1] < past:
            told = "none" if known is None else f"{known.shape[1]} in {len(known)} rows"
            raise ValueError(
                f"global_token_ids needs the token ids of cached keys, too: the cache holds {past} tokens of "
                f"{len(new)} rows, and the ids of {told} are known; fill it from its first token on by forwards with "
                "input_ids, after mark_global_tokens and with global_token_ids set"
            )
        new = torch.cat([known[:, :past], new], 1)  # the cache may have been cut since
    _remember(held, new)
    return new


def _remember(held: Any, marks: Tensor) -> None:
    if not isinstance(held, _MarkedCache):
        held.__class__ = _marked_class(type(held))
    held.__dict__[MARKS] = marks


class _MarkedCache(Cache):
    """What a cache of any class becomes: the same, and the marks of its keys go where their rows go."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.__dict__[MARKS] = self.__dict__[MARKS].repeat_interleave(repeats, 0)

    def _select(self, rows: Tensor) -> None:
        self.__dict__[MARKS] = self.__dict__[MARKS][rows.cpu()]

    def __reduce_ex__(self, protocol: Any) -> Any:  # for pickle, which finds classes by their names
        return _empty_marked, (type(self).__bases__[1],), self.__dict__


@cache
def _marked_class(kind: Any) -> Any:
    return type(kind.__name__, (_MarkedCache, kind), {})


def _empty_marked(kind: type) -> Any:
    marked = _marked_class(kind)
    return marked.__new__(marked)


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]
