"""Sparse attention in plain torch operations: any device, forward and backward, memory linear in the length.

Rows are computed a chunk at a time. For each query head of a chunk the scores of its static keys, its window and its
routed keys stand side by side in one [rows, keys] table, so one exact softmax serves them all. Window scores are
banded matrix products. Routed keys are gathered inside two operations that PyTorch has for embeddings, so that nothing
of size rows x keys x head_dim exists: `embedding_bag` (a weighted sum of gathered rows) and its gradient in the
weights (dot products with gathered rows). The backward computes each chunk again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.ops.backend import Backend
from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.common.chunked import Call, Piece, attend_in_pieces, cap, hide, with_sinks
from hf_sparse_attn.ops.common.threads import in_order
from hf_sparse_attn.patterns import LayerPattern, num_row_keys, row_keys, static_positions
from hf_sparse_attn.routing import BucketIndex, row_chunks

_BLOCK = 64  # rows per banded matrix product


def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """See `ops.find_keys`."""
    call = Call(_sparse_pieces, pattern)
    start, end = call.dense_end(key.shape[1]), key.shape[1]
    static = static_positions(pattern.config, end, key.device, marked=pattern.marked)
    bucket = pattern.bucket_hash.assign(key)
    summed = query.unflatten(0, (len(key), -1)).sum(1)

    def chunks() -> Iterator[tuple[int, BucketIndex, int, int]]:
        for kv_head in range(len(key)):
            if call.budget(kv_head, key.shape[1]):
                index = BucketIndex(key[kv_head], bucket[kv_head], static, start, 0, pattern)
                for first, stop in row_chunks(pattern, start, end):
                    yield kv_head, index, first, stop

    def find(chunk: tuple[int, BucketIndex, int, int]) -> None:
        kv_head, index, first, stop = chunk
        index.rows(first, stop).select_slots(summed[kv_head, first:stop], pattern.budgets[kv_head])

    if end > start:
        for _ in in_order(find, chunks(), torch.get_num_threads() if key.device.type == "cpu" else 1):
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
    group = query.shape[0] // key.shape[0]
    static = static_positions(pattern.config, end, key.device, marked=pattern.marked)
    bucket = pattern.bucket_hash.assign(key)
    for kv_head in range(key.shape[0]):
        heads = range(kv_head * group, (kv_head + 1) * group)
        index = None
        if call.budget(kv_head, key.shape[1]):
            index = BucketIndex(key[kv_head], bucket[kv_head], static, start, key_offset, pattern)
        order = torch.arange(key.shape[1], device=key.device) if index is None else index.order.long()
        table = _Table(order, key[kv_head].index_select(0, order), value[kv_head].index_select(0, order))
        for row, stop in row_chunks(pattern, start, end):
            attend = partial(_sparse, call, kv_head, index, table, static, row)
            rows = slice(row - offset, stop - offset)
            yield Piece.by_autograd(slice(heads.start, heads.stop), rows, slice(kv_head, kv_head + 1), attend)


def _sparse(
    call: Call,
    kv_head: int,
    index: BucketIndex | None,
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
    window = pattern.window(stop - key_offset)
    position = torch.arange(start, stop, device=key.device)
    query = query * call.scaling

    # Static keys that are older than the window of at least one row, and not dropped by a sliding cache.
    static = static[(static <= stop - 1 - window) & (static >= key_offset)]
    static_key, static_value = key[static - key_offset], value[static - key_offset]
    hidden = static > position[:, None] - window
    if pattern.sliding_window is not None:
        hidden |= static <= position[:, None] - pattern.sliding_window
    hidden_static = hidden if bool(hidden.any()) else None
    band_key, band_value = (_band(x, start, stop, window, key_offset) for x in (key, value))
    band_bias = _band_bias(band_key, start, window, key_offset)

    gathered: Tensor | None = None
    unused: Tensor | None = None  # entries of `gathered` that do not count
    with torch.no_grad():
        if index is not None:
            gathered, count = index.rows(start, stop).select_slots(query.sum(0), pattern.budgets[kv_head])
            if bool((count < gathered.shape[1]).any()):
                unused = torch.arange(gathered.shape[1], device=key.device) >= count[:, None]
        num_routed = 0 if gathered is None else gathered.shape[1]
        if num_row_keys(pattern.config):
            gathered, unused = _with_row_keys(
                gathered, unused, position, static, window, key_offset, pattern, table.order
            )
    outputs = []
    for i, rows in enumerate(query):
        head = kv_head * len(query) + i
        scores = [
            hide(cap(rows @ static_key.T, softcap), hidden_static),
            _window_scores(rows, band_key, band_bias, softcap),
        ]
        if gathered is not None:
            dots = _GatherDot.apply(rows, key, table.key, gathered, table.order)
            scores.append(hide(cap(dots, softcap), unused))
        widths = [part.shape[-1] for part in scores]
        side_by_side = with_sinks(torch.cat(scores, -1), None if sinks is None else sinks[i])
        if recorder is not None:
            num_scored = int((side_by_side[:, : sum(widths)] > -torch.inf).sum())
        if num_routed and pattern.min_weights[head]:
            routed = slice(sum(widths[:2]), sum(widths[:2]) + num_routed)
            side_by_side = _drop_light(side_by_side, routed, pattern.min_weights[head])
        weights = side_by_side.softmax(-1)[:, : sum(widths)].split(widths, -1)
        output = weights[0] @ static_value + _window_values(weights[1], band_value)
        if gathered is not None:
            output = output + _GatherSum.apply(weights[2], value, table.value, gathered, table.order)
        outputs.append(output)
        if recorder is not None:
            attended = side_by_side[:, : sum(widths)] > -torch.inf
            parts = [static.expand(len(position), -1), _band_positions(start, stop, window, key.device)]
            parts += [table.order[gathered] + key_offset] if gathered is not None else []
            read = partial(_read, attended, parts)
            call.record(head, position, int(attended.sum()), num_scored, read)
    return torch.stack(outputs)


def _read(attended: Tensor, keys: list[Tensor]) -> tuple[Tensor, Tensor]:
    return attended, torch.cat(keys, -1)


def _drop_light(scores: Tensor, routed: slice, min_weight: float) -> Tensor:
    """Hide the scores in the columns `routed` whose softmax weight in [R, K] is under `min_weight`."""
    with torch.no_grad():
        light = torch.zeros_like(scores, dtype=torch.bool)
        least = scores.logsumexp(-1, keepdim=True) + math.log(min_weight)
        torch.lt(scores[:, routed], least, out=light[:, routed])
    return scores.masked_fill(light, -torch.inf)


def _band(x: Tensor, start: int, stop: int, window: int, key_offset: int) -> Tensor:
    """Keys that each block of _BLOCK rows can see in its window: [num_blocks, head_dim, _BLOCK + window - 1] view.

    Zeros stand for positions before the first key and after the last row.
    """
    low, high = start - window + 1 - key_offset, stop - key_offset
    tail = -(stop - start) % _BLOCK
    padded = F.pad(x[max(low, 0) : high], (0, 0, max(-low, 0), tail))
    return padded.unfold(0, _BLOCK + window - 1, _BLOCK)


def _band_bias(band_key: Tensor, start: int, window: int, key_offset: int) -> Tensor:
    """0 where a row of a block sees the key in a column, else -inf: [1 or num_blocks, _BLOCK, _BLOCK + window - 1].

    Column c of block b is the key at position start + b * _BLOCK - window + 1 + c.
    """
    num_blocks, _, width = band_key.shape
    row = torch.arange(_BLOCK, device=band_key.device)[:, None]
    column = torch.arange(width, device=band_key.device)
    outside = ((column < row) | (column > row + window - 1))[None]
    if start - window + 1 < key_offset:  # the first blocks reach before the first key
        first = start - window + 1 + _BLOCK * torch.arange(num_blocks, device=band_key.device)
        outside = outside | (first[:, None, None] + column < key_offset)
    return torch.zeros(outside.shape, dtype=band_key.dtype, device=band_key.device).masked_fill_(outside, -torch.inf)


def _window_scores(rows: Tensor, band_key: Tensor, band_bias: Tensor, softcap: float | None) -> Tensor:
    """[R, head_dim] queries -> [R, _BLOCK + window - 1]."""
    blocks = _blocks(rows, len(band_key))
    if softcap is None:
        scores = torch.baddbmm(band_bias.expand(len(band_key), -1, -1), blocks, band_key)
    else:
        scores = cap(blocks @ band_key, softcap) + band_bias
    return scores.flatten(0, 1)[: len(rows)]


def _window_values(weights: Tensor, band_value: Tensor) -> Tensor:
    """[R, _BLOCK + window - 1] weights -> [R, head_dim]."""
    return (_blocks(weights, len(band_value)) @ band_value.transpose(1, 2)).flatten(0, 1)[: len(weights)]


def _blocks(rows: Tensor, num_blocks: int) -> Tensor:
    """[R, C] -> [num_blocks, _BLOCK, C], filled up with zeros."""
    missing = num_blocks * _BLOCK - len(rows)
    return (F.pad(rows, (0, 0, 0, missing)) if missing else rows).unflatten(0, (num_blocks, _BLOCK))


def _band_positions(start: int, stop: int, window: int, device: torch.device) -> Tensor:
    """Position of the key in every column of the window scores: [R, _BLOCK + window - 1]."""
    block = torch.arange(stop - start, device=device) // _BLOCK * _BLOCK + start - window + 1
    return block[:, None] + torch.arange(_BLOCK + window - 1, device=device)


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


class _GatherDot(torch.autograd.Function):
    """scores[r, m] = rows[r] . table[index[r, m]]: [R, D], [N, D], [R, M] -> [R, M], where table is source[order]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, table: Tensor, index: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(rows, table, index, order)
        return _gather_dot(rows, table, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        rows, table, index, order = ctx.saved_tensors
        (grad,) = grad_outputs
        return _gather_sum(grad, table, index), _scatter_sum(grad, rows, index, order), None, None, None


class _GatherSum(torch.autograd.Function):
    """out[r] = sum of weights[r, m] * table[index[r, m]] over m: [R, M], [N, D], [R, M] -> [R, D]; as above."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, source: Tensor, table: Tensor, index: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(weights, table, index, order)
        return _gather_sum(weights, table, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        weights, table, index, order = ctx.saved_tensors
        (grad,) = grad_outputs
        grad = grad.contiguous()
        return _gather_dot(grad, table, index), _scatter_sum(weights, grad, index, order), None, None, None


def _gather_dot(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    num_rows, width = index.shape
    offsets = torch.arange(0, num_rows * width, width, device=index.device, dtype=index.dtype)
    bags = (
        torch.arange(num_rows, device=index.device, dtype=index.dtype)[:, None].expand(-1, width).contiguous().view(-1)
    )
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), table.contiguous(), index.reshape(-1), offsets, bags, 0
    ).view(num_rows, width)


def _gather_sum(weights: Tensor, table: Tensor, index: Tensor) -> Tensor:
    return F.embedding_bag(index, table.contiguous(), per_sample_weights=weights.contiguous(), mode="sum")


def _scatter_sum(weights: Tensor, rows: Tensor, index: Tensor, order: Tensor) -> Tensor:
    """out[order[n]] = sum of weights[r, m] * rows[r] over all (r, m) with index[r, m] == n: the gather reversed."""
    keys, pairs = torch.sort(index.reshape(-1), stable=True)
    first = torch.searchsorted(keys, torch.arange(len(order), device=keys.device, dtype=keys.dtype))
    row = torch.div(pairs, index.shape[1], rounding_mode="floor")
    sums = F.embedding_bag(row, rows.contiguous(), first, per_sample_weights=weights.reshape(-1)[pairs], mode="sum")
    return torch.empty_like(sums).index_copy_(0, order, sums)


def document_attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """See `backend.AttendDocument`.

    Rows before a key or value that is not finite are computed without it: in the products of a block of rows, 0 times
    NaN would reach them.
    """
    start, end, outputs, low = call.query_offset, call.query_offset + query.shape[1], [], call.query_offset
    for high in [*_not_finite(key, value, start, call.key_offset), end]:
        rows, keys = slice(low - start, high - start), slice(0, high - call.key_offset)
        parts = query[:, rows], key[:, keys], value[:, keys]
        outputs.append(attend_in_pieces(_sparse_pieces, *parts, replace(call, query_offset=low)))
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


BACKEND = Backend(document_attention, find_keys=find_keys)
