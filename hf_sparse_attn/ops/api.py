"""The operation: what callers see of it, whatever the implementation."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_sparse_attn.ops.backend import Backend, Index, StartIndex, compute_dtype
from hf_sparse_attn.ops.block_votes import check_votes, prefill, reading_everything
from hf_sparse_attn.ops.checks import check_document, check_scores
from hf_sparse_attn.ops.common.call import AttentionCall, Chooser
from hf_sparse_attn.ops.common.dropout import Dropout
from hf_sparse_attn.ops.dispatch import find_backend, warn_if_slow
from hf_sparse_attn.ops.self_check import checked
from hf_sparse_attn.patterns import LayerPattern
from hf_sparse_attn.recording import HeadsFrom, Recorder
from hf_sparse_attn.statistics import statistics_in


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
    dropout: Dropout | None = None,
    candidates: Tensor | None = None,
    newest: Tensor | None = None,
    choose: Chooser | None = None,
) -> Tensor:
    """Attention of one document through the implementation that the config names.

    Args:
        query: [num_heads, Q, head_dim]; any float dtypes are taken.
        key, value: [num_key_value_heads, N, head_dim].
        pattern, query_offset, key_offset, scaling, softcap, sinks, recorder, index, dropout, candidates, newest: see
            `AttentionCall`.
        choose: makes the candidates of each pattern's heads.

    Returns:
        [num_heads, Q, head_dim]: in at least float32 from "reference" and "torch", from "numba" and "triton" in the
        dtype of query and key.

    Raises:
        ValueError: for tensors, positions or numbers that do not fit together, and for dropout or candidates where the
            config names an implementation without them.
        RuntimeError: if the config names "triton" and its kernels are wrong on this GPU, see `self_check`.
    """
    check_scores(scaling, softcap)
    check_document(query, key, value, pattern, query_offset, key_offset, sinks)
    if not query.shape[1]:
        return query.new_empty(len(query), 0, value.shape[-1])
    if not pattern.is_causal:
        pattern = dataclasses.replace(pattern, num_tokens=key.shape[1])
    sinks = None if sinks is None else sinks.to(compute_dtype(query, key))
    call = AttentionCall(
        pattern, query_offset, key_offset, scaling, softcap, sinks, recorder, index, dropout, candidates, newest
    )
    for statistics in statistics_in(recorder):
        statistics.begin(query, key, call)
    if not pattern.kv_head_entries:
        return _attend(query, key, value, call, choose)
    group, outputs = len(query) // len(key), []
    for kv_heads, part in pattern.parts:  # kernels know one pattern for all heads
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        own = dataclasses.replace(
            call,
            pattern=part,
            sinks=None if sinks is None else sinks[heads],
            recorder=None if recorder is None else HeadsFrom(recorder, heads.start),
            dropout=None if dropout is None else dataclasses.replace(dropout, first_head=heads.start),
            candidates=None if candidates is None else candidates[kv_heads],
            index=None,
        )
        outputs.append(_attend(query[heads], key[kv_heads], value[kv_heads], own, choose))
    return torch.cat(outputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, choose: Chooser | None) -> Tensor:
    """`document_attention` by one pattern."""
    if choose is not None and call.pattern.dense_rows() is not None:
        call = dataclasses.replace(call, candidates=choose(query, key, call))
    if call.pattern.config.num_voted_blocks and call.pattern.dense_rows() is not None:
        check_votes(call)
        if call.query_offset:
            call = dataclasses.replace(call, pattern=reading_everything(call.pattern))
    pattern, dense_rows = call.pattern, call.pattern.dense_rows()
    implementation = pattern.config.implementation
    backend = find_backend(implementation, query.device, pattern.is_causal)
    votes = pattern.config.num_voted_blocks > 0 and dense_rows is not None
    if not backend.plain and (call.dropout is not None or call.candidates is not None or votes):
        backend = _plain_backend(implementation, query.device)
    grows = pattern.is_causal and dense_rows is not None and call.query_offset + query.shape[1] > dense_rows
    if implementation == "auto" and grows:
        warn_if_slow(query.device)
    if grows:
        backend = checked(backend, query, key, call)
    attend = prefill if votes and implementation != "reference" else backend.document_attention
    dtype = backend.dtype(query, key)
    autocast = torch.is_autocast_enabled(query.device.type)
    with torch.autocast(query.device.type, enabled=False) if autocast else nullcontext():
        result: Tensor = attend(query.to(dtype), key.to(dtype), value.to(dtype), call)
    return result


def _plain_backend(implementation: str, device: torch.device) -> Backend:
    """That of PyTorch's operations, if the config's `implementation` leaves the choice."""
    if implementation != "auto":
        raise ValueError(
            f'implementation="{implementation}" knows neither attention dropout nor an index of chosen keys nor voted '
            'blocks; choose "auto", "torch" or "reference"'
        )
    return find_backend("torch", device)


@torch.no_grad()
def find_candidates(query: Tensor, key: Tensor, *, pattern: LayerPattern, query_offset: int, key_offset: int) -> Tensor:
    """The keys that the buckets give each row of one document, found by PyTorch's operations.

    Args:
        query: [num_heads, Q, head_dim].
        key: [num_key_value_heads, N, head_dim].
        pattern, query_offset, key_offset: see `AttentionCall`.

    Returns:
        [num_key_value_heads, Q, K] int32: see `AttentionCall.candidates`; K is the largest budget of the KV heads.

    Raises:
        ValueError: as `document_attention`.
    """
    implementation = pattern.config.implementation
    if any(part.config.num_voted_blocks for _, part in pattern.parts):
        raise ValueError("num_voted_blocks are not found through buckets; build_index does not know them")
    if not find_backend(implementation, query.device, pattern.is_causal).plain:
        _plain_backend(implementation, query.device)
    check_document(query, key, key, pattern, query_offset, key_offset, None)
    if not pattern.is_causal:
        pattern = dataclasses.replace(pattern, num_tokens=key.shape[1])
    from hf_sparse_attn.ops.torch import candidates

    dtype, group, found = compute_dtype(query, key), len(query) // len(key), []
    query, key = query.to(dtype), key.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        for kv_heads, part in pattern.parts:
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            rows, keys = query[heads], key[kv_heads]
            found.append(candidates(rows, keys, AttentionCall(part, query_offset, key_offset)))
    width = max(rows.shape[2] for rows in found)
    return torch.cat([pad(rows, (0, width - rows.shape[2]), value=-1) for rows in found])


def new_index(pattern: LayerPattern, key: Tensor, key_offset: int) -> Index | None:
    """An empty index for the keys of one cached document, or None where the implementation has no such thing.

    Args:
        pattern: the layer's pattern.
        key: [num_key_value_heads, N, head_dim].
        key_offset: position of the first key.
    """
    start = _start_index(pattern, key.device)
    return None if start is None else start(pattern, len(key), key_offset)


def has_fixed_steps(pattern: LayerPattern, device: torch.device) -> bool:
    """Whether steps of one token over cached keys on a device can launch the same every time.

    Layers whose rows read everything need no index for it.
    """
    start = _start_index(pattern, device)
    return pattern.dense_rows() is None if start is None else start.has_fixed_steps


def _start_index(pattern: LayerPattern, device: torch.device) -> StartIndex | None:
    start = find_backend(pattern.config.implementation, device).index
    if start is None or pattern.dense_rows() is None or pattern.kv_head_entries or pattern.config.num_voted_blocks:
        return None
    if pattern.sliding_window is not None and not start.knows_sliding_windows:
        return None
    return start


@torch.no_grad()
def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """Hash the keys of a document and find every sparse row's keys, nothing else: to measure what routing costs.

    Args:
        query: [num_heads, N, head_dim].
        key: [num_key_value_heads, N, head_dim].
        pattern: the layer's pattern, in the dtype that is computed in; "reference" does not find keys by themselves.
    """
    backend, group = find_backend(pattern.config.implementation, query.device), len(query) // len(key)
    dtype = backend.dtype(query, key)
    if pattern.dense_rows() is not None and backend.find_keys is not None:
        for kv_heads, part in pattern.parts:
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            backend.find_keys(query[heads].to(dtype), key[kv_heads].to(dtype), part)
