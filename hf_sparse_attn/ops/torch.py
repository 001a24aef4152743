"""Sparse attention in plain torch operations: any device, forward and backward, memory linear in the length.

Rows are computed a chunk at a time. For each query head of a chunk the scores of its static keys, its window and its
routed keys stand side by side in one [rows, keys] table, so one exact softmax serves them all. Window scores are
banded matrix products. Routed keys are gathered inside operations that PyTorch has for embeddings, so that nothing of
size rows x keys x head_dim exists. The backward computes each chunk again.

Where attention is not causal, windows reach to both sides, keys are routed by `routing_both_sides`, and the rows of
global tokens are dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from hf_sparse_attn.ops.backend import Backend
from hf_sparse_attn.ops.common.band import Band, window_scores, window_values
from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.common.chunked import (
    Call,
    Piece,
    attend_in_pieces,
    cap,
    dense_pieces,
    hide,
    softmax_or_zeros,
    with_sinks,
)
from hf_sparse_attn.ops.common.gather import GatherDot, GatherSum
from hf_sparse_attn.ops.common.threads import in_order
from hf_sparse_attn.patterns import LayerPattern, global_positions, num_row_keys, row_keys, static_positions
from hf_sparse_attn.routing import BucketIndex, row_chunks
from hf_sparse_attn.routing_both_sides import BothSidesIndex


def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """See `ops.find_keys`."""
    summed = query.unflatten(0, (len(key), -1)).sum(1)

    def find(kv_head: int, index: BucketIndex | BothSidesIndex, start: int, stop: int) -> None:
        index.rows(start, stop).select_slots(summed[kv_head, start:stop], pattern.budgets[kv_head])

    _each_chunk(find, key, AttentionCall(pattern), key.shape[1])


def candidates(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """The keys that the buckets give each row of one document: see `AttentionCall.candidates`.

    Args:
        query: [num_heads, Q, head_dim].
        key: [num_key_value_heads, N, head_dim].
        call: its pattern and positions.

    Returns:
        [num_key_value_heads, Q, largest budget or N], int32 on the device of `key`.
    """
    pattern, offset = call.pattern, call.query_offset
    summed = query.unflatten(0, (len(key), -1)).sum(1)
    dense = pattern.dense_rows() is None
    width = 0 if dense else max(Call.of(call, _sparse_pieces).budget(head, key.shape[1]) for head in range(len(key)))
    found = torch.full((len(key), query.shape[1], width), -1, dtype=torch.int32, device=key.device)

    def find(kv_head: int, index: BucketIndex | BothSidesIndex, start: int, stop: int) -> None:
        rows = slice(start - offset, stop - offset)
        slots, count = index.rows(start, stop).select_slots(summed[kv_head, rows], pattern.budgets[kv_head])
        unused = torch.arange(slots.shape[1], device=key.device) >= count[:, None]
        found[kv_head, rows, : slots.shape[1]] = index.order[slots].masked_fill_(unused, -1)

    _each_chunk(find, key, call, offset + query.shape[1])
    return found


def _each_chunk(
    find: Callable[[int, BucketIndex | BothSidesIndex, int, int], None], key: Tensor, given: AttentionCall, end: int
) -> None:
    """Calls `find(kv_head, its keys by bucket, start, stop)` for the sparse rows before `end`, a chunk at a time."""
    pattern, call = given.pattern, Call.of(given, _sparse_pieces)
    start = call.dense_end(end)
    if end == start:
        return
    static = static_positions(pattern.config, call.key_offset + key.shape[1], key.device, marked=pattern.marked)
    bucket = pattern.bucket_hash.assign(key)

    def chunks() -> Iterator[tuple[int, BucketIndex | BothSidesIndex, int, int]]:
        for kv_head in range(len(key)):
            if call.budget(kv_head, key.shape[1]):
                index = _index(key[kv_head], bucket[kv_head], static, start, call)
                for first, stop in row_chunks(pattern, start, end):
                    yield kv_head, index, first, stop

    num_workers = torch.get_num_threads() if key.device.type == "cpu" else 1
    for _ in in_order(lambda chunk: find(*chunk), chunks(), num_workers):
        pass


@dataclass(frozen=True)
class _Table:
    """A KV head's keys and values [N, head_dim] in another order, without gradients; `order` [N] are their indices."""

    order: Tensor
    key: Tensor
    value: Tensor


def _sparse_pieces(query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call) -> Iterator[Piece]:
    """Rows at positions start .. end - 1: each KV head's query heads, a chunk of rows at a time."""
    pattern, offset, key_offset = call.pattern, call.query_offset, call.key_offset
    group, last_key = query.shape[0] // key.shape[0], key_offset + key.shape[1]
    static = static_positions(pattern.config, last_key, key.device, marked=pattern.marked)
    bucket = pattern.bucket_hash.assign(key)
    sparse_rows = [(start, end)]
    if not pattern.is_causal:
        last_row, cpu = min(end, last_key), torch.device("cpu")
        dense = global_positions(pattern.config, last_row, cpu, start, pattern.marked).tolist()
        sparse_rows = [(low + 1, high) for low, high in pairwise([start - 1, *dense, end])]
        for low, high in _runs(dense):
            yield from dense_pieces(query, low, high, call)
    for kv_head in range(key.shape[0]):
        heads = range(kv_head * group, (kv_head + 1) * group)
        index = None
        if call.candidates is None and call.budget(kv_head, key.shape[1]):
            index = _index(key[kv_head], bucket[kv_head], static, start, call)
        order = torch.arange(key.shape[1], device=key.device) if index is None else index.order.long()
        table = _Table(order, key[kv_head].index_select(0, order), value[kv_head].index_select(0, order))
        for row, stop in (chunk for rows in sparse_rows for chunk in row_chunks(pattern, *rows)):
            attend = partial(_sparse, call, kv_head, index, table, static, row)
            rows = slice(row - offset, stop - offset)
            yield Piece.by_autograd(slice(heads.start, heads.stop), rows, slice(kv_head, kv_head + 1), attend)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as runs of consecutive ones: (first, one after the last)."""
    known = set(numbers)
    starts = [number for number in numbers if number - 1 not in known]
    ends = [number + 1 for number in numbers if number + 1 not in known]
    return list(zip(starts, ends, strict=True))


def _index(key: Tensor, bucket: Tensor, static: Tensor, start: int, call: Call) -> BucketIndex | BothSidesIndex:
    if call.pattern.is_causal:
        return BucketIndex(key, bucket, static, start, call.key_offset, call.pattern)
    return BothSidesIndex(key, bucket, static, call.pattern)


def _sparse(
    call: Call,
    kv_head: int,
    index: BucketIndex | BothSidesIndex | None,
    table: _Table,
    static: Tensor,
    start: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """One chunk of sparse rows of the query heads that share a KV head.

    Args:
        kv_head: which KV head it is.
        index: its routable keys; None: nothing is routed.
        table: keys and values that routed and random keys are gathered from.
        static: sorted positions of the static keys.
        start: position of the first row.
        query: [group, R, head_dim].
        key, value: [1, N, head_dim].
        sinks: [group], or None.

    Returns:
        [group, R, head_dim].
    """
    pattern, key_offset, softcap, recorder = call.pattern, call.key_offset, call.softcap, call.recorder
    key, value = key[0], value[0]
    stop = start + query.shape[1]
    is_causal = pattern.is_causal
    window = pattern.window(stop - key_offset if is_causal else len(key))
    position = torch.arange(start, stop, device=key.device)
    summed, query = query.sum(0), query * call.scaling  # as `candidates` adds them up, to the last bit

    if is_causal:  # keys that are older than the window of at least one row, and not dropped by a sliding cache
        static = static[(static <= stop - 1 - window) & (static >= key_offset)]
    static_key, static_value = key[static - key_offset], value[static - key_offset]
    distance = position[:, None] - static
    distance = distance if is_causal else distance.abs()
    hidden = distance < window
    if pattern.sliding_window is not None:
        hidden |= distance >= pattern.sliding_window
    hidden_static = hidden if bool(hidden.any()) else None
    band = Band(start, stop, window - 1, 0 if is_causal else window - 1, key_offset)
    band_key, band_value = band.keys(key), band.keys(value)
    band_bias = band.bias(band_key, len(key))

    gathered: Tensor | None = None
    unused: Tensor | None = None  # entries of `gathered` that do not count
    with torch.no_grad():
        if call.candidates is not None and call.candidates.shape[2]:
            given = call.candidates[kv_head, start - call.query_offset : stop - call.query_offset]
            gathered, unused = given.clamp(min=0), given < 0
        elif index is not None:
            gathered, count = index.rows(start, stop).select_slots(summed, pattern.budgets[kv_head])
            if bool((count < gathered.shape[1]).any()):
                unused = torch.arange(gathered.shape[1], device=key.device) >= count[:, None]
        num_routed = 0 if gathered is None else gathered.shape[1]
        if num_row_keys(pattern.config, pattern.num_tokens):
            gathered, unused = _with_row_keys(
                gathered, unused, position, static, window, key_offset, pattern, table.order
            )

    def keys() -> Tensor:
        """The position of the key in each column of the table."""
        parts = [static.expand(len(position), -1), band.positions(key.device)]
        return torch.cat(parts if gathered is None else [*parts, table.order[gathered] + key_offset], -1)

    # A row of another document may read nothing; one of the keys' own reads its own key at least.
    of_another_document = start >= key_offset + len(key)
    to_weights: Callable[[Tensor], Tensor] = softmax_or_zeros if of_another_document else partial(torch.softmax, dim=-1)
    outputs = []
    for i, rows in enumerate(query):
        head = kv_head * len(query) + i
        scores = [
            hide(cap(rows @ static_key.T, softcap), hidden_static),
            window_scores(rows, band_key, band_bias, softcap),
        ]
        if gathered is not None:
            dots = GatherDot.apply(rows, key, table.key, gathered, table.order)
            scores.append(hide(cap(dots, softcap), unused))
        widths = [part.shape[-1] for part in scores]
        side_by_side = with_sinks(torch.cat(scores, -1), None if sinks is None else sinks[i])
        if recorder is not None:
            num_scored = int((side_by_side[:, : sum(widths)] > -torch.inf).sum())
        if num_routed and pattern.min_weights[head]:
            routed = slice(sum(widths[:2]), sum(widths[:2]) + num_routed)
            side_by_side = _drop_light(side_by_side, routed, pattern.min_weights[head])
        softmax = to_weights(side_by_side)[:, : sum(widths)]
        if call.dropout is not None:
            softmax = softmax * call.dropout.factors(position.new_tensor(head), position[:, None], keys()).to(softmax)
        weights = softmax.split(widths, -1)
        output = weights[0] @ static_value + window_values(weights[1], band_value)
        if gathered is not None:
            output = output + GatherSum.apply(weights[2], value, table.value, gathered, table.order)
        outputs.append(output)
        if recorder is not None:
            attended = side_by_side[:, : sum(widths)] > -torch.inf
            read = partial(_read, attended, keys)
            call.record(head, position, int(attended.sum()), num_scored, read)
    return torch.stack(outputs)


def _read(attended: Tensor, keys: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    return attended, keys()


def _drop_light(scores: Tensor, routed: slice, min_weight: float) -> Tensor:
    """Hide the scores in the columns `routed` whose softmax weight in [R, K] is under `min_weight`."""
    with torch.no_grad():
        light = torch.zeros_like(scores, dtype=torch.bool)
        least = scores.logsumexp(-1, keepdim=True) + math.log(min_weight)
        torch.lt(scores[:, routed], least, out=light[:, routed])
    return scores.masked_fill(light, -torch.inf)


def _with_row_keys(
    gathered: Tensor | None,
    unused: Tensor | None,
    position: Tensor,
    static: Tensor,
    window: int,
    key_offset: int,
    pattern: LayerPattern,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """Append the keys of the rows' own; the candidates lose what is among these."""
    drawn = row_keys(pattern, position, static, window, key_offset)
    seen = drawn < 0
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    drawn = place[drawn.clamp_(min=0)]
    if gathered is None:
        return drawn.int(), seen
    if unused is None:
        unused = torch.zeros_like(gathered, dtype=torch.bool)
    sorted_drawn = drawn.masked_fill(seen, -1).sort(-1).values
    nearest = torch.searchsorted(sorted_drawn, gathered.long()).clamp_(max=drawn.shape[-1] - 1)
    again = sorted_drawn.gather(-1, nearest) == gathered
    return torch.cat([gathered, drawn.int()], -1), torch.cat([unused | again, seen], -1)


def document_attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """See `backend.AttendDocument`.

    Rows before a key or value that is not finite are computed without it: in the products of a block of rows, 0 times
    NaN would reach them.
    """
    if not call.pattern.is_causal:
        return attend_in_pieces(_sparse_pieces, query, key, value, call)
    start, end, outputs, low = call.query_offset, call.query_offset + query.shape[1], [], call.query_offset
    for high in [*_not_finite(key, value, start, call.key_offset), end]:
        rows, keys = slice(low - start, high - start), slice(0, high - call.key_offset)
        parts = query[:, rows], key[:, keys], value[:, keys]
        given = None if call.candidates is None else call.candidates[:, rows]
        outputs.append(attend_in_pieces(_sparse_pieces, *parts, replace(call, query_offset=low, candidates=given)))
        low = high
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


@torch.no_grad()
def _not_finite(key: Tensor, value: Tensor, start: int, key_offset: int) -> list[int]:
    """Positions after `start` where keys or values that are not finite begin, after ones that are."""
    new = [x[:, start - key_offset :] for x in (key, value)]
    if bool(torch.stack([x.sum() for x in new]).sum().isfinite()):
        return []
    bad = ~torch.stack([x.isfinite().all(-1).all(0) for x in new]).all(0)
    begins = bad[1:] & ~bad[:-1]
    return (torch.nonzero(begins).flatten() + start + 1).tolist()


BACKEND = Backend(document_attention, find_keys=find_keys, plain=True, both_sides=True)
