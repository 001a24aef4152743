"""The operation: what callers see of it, whatever the implementation."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops.backend import Index, compute_dtype
from hf_sparse_attn.ops.checks import check_document, check_scores
from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.dispatch import find_backend, warn_if_slow
from hf_sparse_attn.patterns import LayerPattern, layer_pattern
from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.tracing import refuse_transforms


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SparseAttentionConfig,
    layer_idx: int = 0,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    recorder: Recorder | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Sparse attention over whole documents: softmax(scaling * query . key over S(row)) . value.

    S(row) is defined in `SparseAttentionConfig`. The last query belongs to the last key, so Q < N continues a document
    whose first N - Q keys are cached.

    Args:
        query: [batch, num_heads, Q, head_dim]; any float dtype, computed in float32 or float64.
        key, value: [batch, num_key_value_heads, N, head_dim].
        config: which keys each row reads, and `config.implementation`.
        layer_idx: layer whose budget and hash apply.
        scaling: factor on query . key; head_dim ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap) before the softmax (Gemma 2, arXiv 2408.00118).
        sinks: [num_heads], logits that take part in each softmax but carry no value (gpt-oss, arXiv 2508.10925).
        recorder: is told which keys each row read.
        is_causal: False: rows read keys on both sides; of `config.implementation`, "reference" and "torch" can.

    Returns:
        [batch, num_heads, Q, head_dim of value], in query's dtype.

    Raises:
        ValueError: for shapes that do not fit together, impossible numbers, and under torch.jit.trace or torch.func.
    """
    refuse_transforms()
    if query.ndim != 4 or key.ndim != 4 or key.shape[:3] != value.shape[:3] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query, key and value must be [batch, heads, tokens, head_dim] with one head_dim; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if len(query) != len(key) or query.shape[1] % key.shape[1] or query.shape[2] > key.shape[2]:
        raise ValueError(
            "query must have key's batch, a multiple of its heads and at most its tokens; got "
            f"query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    heads = query.shape[1], key.shape[1], query.shape[-1]
    dtype = compute_dtype(query, key)
    pattern = layer_pattern(config, layer_idx, *heads, query.device, dtype, is_causal=is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    offset = key.shape[2] - query.shape[2]
    outputs = [
        document_attention(
            q,
            k,
            v,
            pattern=pattern,
            query_offset=offset,
            key_offset=0,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            recorder=recorder,
        )
        for q, k, v in zip(query, key, value, strict=True)
    ]
    output = outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)
    return output.to(query.dtype)


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    recorder: Recorder | None = None,
    index: Index | None = None,
) -> Tensor:
    """Attention of one document through the implementation that the config names.

    Args:
        query: [num_heads, Q, head_dim]; any float dtypes are taken.
        key, value: [num_key_value_heads, N, head_dim].
        pattern, query_offset, key_offset, scaling, softcap, sinks, recorder, index: see `AttentionCall`.

    Returns:
        [num_heads, Q, head_dim], in the dtype that was computed in: at least float32, except that "triton" keeps to the
        dtype of query and key.

    Raises:
        ValueError: for tensors, positions or numbers that do not fit together.
    """
    check_scores(scaling, softcap)
    check_document(query, key, value, pattern, query_offset, key_offset, sinks)
    if not query.shape[1]:
        return query.new_empty(len(query), 0, value.shape[-1])
    if not pattern.is_causal:
        pattern = dataclasses.replace(pattern, num_tokens=key.shape[1])
    implementation, dense_rows = pattern.config.implementation, pattern.dense_rows()
    backend = find_backend(implementation, query.device, pattern.is_causal)
    if (
        implementation == "auto"
        and pattern.is_causal
        and dense_rows is not None
        and query_offset + query.shape[1] > dense_rows
    ):
        warn_if_slow(query.device)
    dtype, precise = backend.dtype(query, key), compute_dtype(query, key)
    sinks = None if sinks is None else sinks.to(precise)
    call = AttentionCall(pattern, query_offset, key_offset, scaling, softcap, sinks, recorder, index)
    as_stored = index is not None and dtype == torch.float32 and {key.dtype} == {value.dtype} <= backend.cached_dtypes
    autocast = torch.is_autocast_enabled(query.device.type)
    with torch.autocast(query.device.type, enabled=False) if autocast else nullcontext():
        output: Tensor = backend.document_attention(
            query.to(dtype),
            key if as_stored else key.to(dtype),
            value if as_stored else value.to(dtype),
            call,
        )
    return output


def new_index(pattern: LayerPattern, key: Tensor, key_offset: int) -> Index | None:
    """An empty index for the keys of one cached document, or None where the implementation has no such thing.

    Args:
        pattern: the layer's pattern.
        key: [num_key_value_heads, N, head_dim].
        key_offset: position of the first key.
    """
    start = find_backend(pattern.config.implementation, key.device).index
    if start is None or pattern.dense_rows() is None:
        return None
    if pattern.sliding_window is not None and not start.knows_sliding_windows:
        return None
    return start(pattern, len(key), key_offset)


@torch.no_grad()
def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """Hash the keys of a document and find every sparse row's keys, nothing else: to measure what routing costs.

    Args:
        query: [num_heads, N, head_dim].
        key: [num_key_value_heads, N, head_dim].
        pattern: the layer's pattern, in the dtype that is computed in; "reference" does not find keys by themselves.
    """
    backend = find_backend(pattern.config.implementation, query.device)
    dtype = backend.dtype(query, key)
    if pattern.dense_rows() is not None and backend.find_keys is not None:
        backend.find_keys(query.to(dtype), key.to(dtype), pattern)
