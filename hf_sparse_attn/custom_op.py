"""The attention as one opaque operation, for graphs: torch.compile and torch.export cannot follow what reads values.

Everything about the pattern goes in as plain arguments, so an exported graph stands on its own; loading one needs
`import hf_sparse_attn`, as custom operations do. The operations carry the package's name, which for a Hub kernel is one
of its own: two copies in one process each have theirs.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.cache.static import indexes_at
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops import compute_dtype
from hf_sparse_attn.ops.common.chunked import ONCE
from hf_sparse_attn.patterns import LayerPattern, layer_pattern
from hf_sparse_attn.recording import together
from hf_sparse_attn.side_channels import INDEXES
from hf_sparse_attn.tensor_parallel import HeadSplit
from hf_sparse_attn.watching import RECORDERS, watchers

_NUM_TENSORS = len(Inputs._fields)


def compiled_attention(
    inputs: Inputs,
    fields: str,
    layer_idx: int,
    split: HeadSplit,
    sliding_window: int | None,
    scaling: float,
    softcap: float | None,
    is_causal: bool = True,
    *,
    watched: int = 0,
) -> Tensor:
    """`attention.attention` as one node of the graph that is being traced, with a backward.

    Args:
        inputs: the tensors.
        fields: `repr` of the model's `config.sparse_attention`, a dict or None.
        layer_idx, split, sliding_window, scaling, softcap, is_causal: as for `routing.layer_pattern` and
            `attention.attention`.
        watched: id of the module whose recorders are told what rows read, when the graph runs; 0: there are none.

    Returns:
        [batch, Q, num_heads, head_dim], in query's dtype.
    """
    parts = [split.rank, split.size]
    return _attention(*inputs, fields, layer_idx, parts, sliding_window, scaling, softcap, is_causal, watched)


# They read masks on the host, for which a CUDA graph (mode="reduce-overhead") is left and entered again.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(f"{__package__}::attention", mutates_args=(), tags=_TAGS)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    seq_idx: Tensor | None,
    marks: Tensor | None,
    sinks: Tensor | None,
    fields: str,
    layer_idx: int,
    split: list[int],
    sliding_window: int | None,
    scaling: float,
    softcap: float | None,
    is_causal: bool = True,
    watched: int = 0,
) -> Tensor:
    inputs = Inputs(query, key, value, attention_mask, position_ids, cu_seq_lens, seq_idx, marks, sinks)
    pattern = _pattern(inputs, fields, layer_idx, split, sliding_window, is_causal)
    if (indexes := indexes_at(key)) is not None:
        setattr(key, INDEXES, indexes)
    return attention(inputs, pattern, scaling, softcap, together(watchers(watched, RECORDERS)))


@_attention.register_fake
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch_size, num_heads, q_length, _head_dim = query.shape
    return query.new_empty(batch_size, q_length, num_heads, value.shape[-1])


@torch.library.custom_op(f"{__package__}::attention_backward", mutates_args=(), tags=_TAGS)
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    seq_idx: Tensor | None,
    marks: Tensor | None,
    sinks: Tensor | None,
    fields: str,
    layer_idx: int,
    split: list[int],
    sliding_window: int | None,
    scaling: float,
    softcap: float | None,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks; an empty tensor where there are no sinks."""
    present = [x.detach().requires_grad_() for x in (query, key, value, sinks) if x is not None]
    own_sinks = present[3] if sinks is not None else None
    others = attention_mask, position_ids, cu_seq_lens, seq_idx, marks
    inputs = Inputs(present[0], present[1], present[2], *others, own_sinks)
    pattern = _pattern(inputs, fields, layer_idx, split, sliding_window, is_causal)
    # Custom operations run below autograd.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        output = attention(inputs, pattern, scaling, softcap)
        if output.requires_grad:
            found = [x.contiguous() for x in torch.autograd.grad(output, present, grad)]
        else:  # nothing but padding
            found = [torch.zeros_like(x) for x in present]
    return found[0], found[1], found[2], found[3] if sinks is not None else query.new_empty(0)


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = query.new_empty(0) if others[5] is None else others[5]
    like = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=like),
        torch.empty_like(key, memory_format=like),
        torch.empty_like(value, memory_format=like),
        torch.empty_like(sinks),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.others = inputs[_NUM_TENSORS:-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    query, key, value, sinks = _attention_backward(grad, *tensors, *ctx.others)
    no_sinks = tensors[-1] is None
    return query, key, value, *[None] * 5, None if no_sinks else sinks, *[None] * (len(ctx.others) + 1)


_attention.register_autograd(_backward, setup_context=_setup_context)


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(ONCE)


_attention_backward.register_autograd(_second_backward)


def _pattern(
    inputs: Inputs, fields: str, layer_idx: int, split: list[int], sliding_window: int | None, is_causal: bool
) -> LayerPattern:
    query, key = inputs.query, inputs.key
    heads = query.shape[1], key.shape[1], query.shape[-1]
    others = query.device, compute_dtype(query, key), sliding_window, HeadSplit(split[0], split[1]), is_causal
    return _cached_pattern(fields, layer_idx, *heads, *others)


@lru_cache(maxsize=256)
def _cached_pattern(fields: str, *layer: Any) -> LayerPattern:
    return layer_pattern(SparseAttentionConfig.from_dict(ast.literal_eval(fields)), *layer)
