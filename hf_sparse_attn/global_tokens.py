"""Global tokens by token id: an attention function never sees ids, so the model's forward tells it where they stand.

A hook before the forward finds the tokens that `global_token_ids` names and passes their slots on as one more keyword
argument, which Transformers' models hand down to the attention function. A cache remembers the ids of its tokens, cuts
them where it is cut, and moves them where its rows go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_sparse_attn.config import SparseAttentionConfig, attends_sparsely, sparse_config, text_config
from hf_sparse_attn.masks.unsupported import unsupported
from hf_sparse_attn.side_channels import MARKS, TOKEN_IDS
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
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(part).values()):
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
    asked = (getattr(config, "sparse_attention", None) or {}).get("global_token_ids")
    if not asked or not attends_sparsely(config):
        return None
    given = _arguments(module, args, kwargs)
    token_ids, held = given.get("input_ids"), given.get("past_key_values")
    if token_ids is None:
        raise ValueError(
            "global_token_ids needs input_ids: which tokens inputs_embeds stand for is not known; pass input_ids, or "
            "take global_token_ids out by hf_sparse_attn.configure(model, global_token_ids=[])"
        )
    if not is_traced(token_ids):
        asked = SparseAttentionConfig(global_token_ids=asked).global_token_ids
        token_ids = token_ids.cpu() if held is None else _with_cached(held, token_ids)  # every layer reads the marks
    elif held is not None:
        raise ValueError(
            "global_token_ids with a cache do not work under torch.compile; pass disable_compile=True to generate, or "
            "compile forwards with use_cache=False"
        )
    return args, {**kwargs, MARKS: torch.isin(token_ids, token_ids.new_tensor(asked))}


def _after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A cache that the forward has made remembers its tokens, too."""
    if MARKS not in kwargs or is_traced(kwargs[MARKS]) or not isinstance(output, (Mapping, tuple)):
        return
    token_ids = _arguments(module, args, kwargs).get("input_ids")
    if token_ids is None:  # those of the model around this one, whose output holds the cache, too
        return
    for value in output.values() if isinstance(output, Mapping) else output:
        new = isinstance(value, Cache) and TOKEN_IDS not in value.__dict__
        if new and value.get_seq_length() == token_ids.shape[1]:
            _remember(value, token_ids.int().cpu())


def _with_cached(held: Any, token_ids: Tensor) -> Tensor:
    """The ids [batch, slots] of all tokens that a cache is to hold, given those of the new ones [batch, Q]."""
    past, known, new = int(held.get_seq_length()), held.__dict__.get(TOKEN_IDS), token_ids.int().cpu()
    if past:
        if known is None or len(known) != len(new) or known.shape[1] < past:
            told = "none" if known is None else f"{known.shape[1]} of {len(known)} rows"
            raise ValueError(
                f"global_token_ids needs the ids of cached tokens, too: the cache holds {past} tokens of {len(new)} "
                f"rows, and the ids of {told} are known; fill it from its first token on by forwards with input_ids of "
                "a model with global_token_ids"
            )
        new = torch.cat([known[:, :past], new], 1)
    _remember(held, new)
    return new


def _remember(held: Any, token_ids: Tensor) -> None:
    if not isinstance(held, _KnownTokens):
        kind: Any = type(held)
        held.__class__ = _knowing_tokens(kind)
    held.__dict__[TOKEN_IDS] = token_ids


class _KnownTokens(Cache):
    """What a cache of any class becomes: the same, and the ids of its tokens go where its keys go."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change(lambda token_ids: token_ids[beam_idx.cpu()])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda token_ids: token_ids[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda token_ids: token_ids.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._change(lambda token_ids: token_ids[:, : int(self.get_seq_length())])

    def reset(self) -> None:
        super().reset()
        self.__dict__.pop(TOKEN_IDS, None)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if TOKEN_IDS in self.__dict__:
            self.__dict__[TOKEN_IDS] = change(self.__dict__[TOKEN_IDS])

    def __reduce_ex__(self, protocol: Any) -> Any:  # for pickle, which finds classes by their names
        return _empty, (type(self).__bases__[1],), self.__dict__


@cache
def _knowing_tokens(kind: Any) -> Any:
    return type(kind.__name__, (_KnownTokens, kind), {})


def _empty(kind: Any) -> Any:
    known = _knowing_tokens(kind)
    return known.__new__(known)


def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters(module), args, strict=False)), **kwargs} if args else kwargs


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Those of its forward, `self` left out."""
    return dict(list(inspect.signature(type(module).forward).parameters.items())[1:])
