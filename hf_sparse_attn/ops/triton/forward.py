"""The attention of a tile's rows over its list of keys, forward.

A program takes a tile of rows of all query heads that share a KV head, so every key is loaded once for them all; the
list says which row scores it. Candidates whose softmax weight among all that a row scored is below the head's smallest
one are dropped: a first pass over the keys finds the logsumexp, a second one the output (one pass where nothing is
dropped).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import AttentionConstants, KeyLists, Tile
from hf_sparse_attn.ops.triton.document_keys import Span
from hf_sparse_attn.ops.triton.launch import strided
from hf_sparse_attn.ops.triton.primitives import load_keys, load_listed, load_rows, score_keys, store_rows, tile_pairs


@triton.jit(do_not_specialize=["base", "start", "end", "num_rows", "num_tiles"])
def fwd_kernel(
    query,
    key,
    value,
    output,
    lists,
    sinks,
    log_min_weights,
    logsumexp,
    least,
    attended,
    base,
    start,
    end,
    num_rows,
    num_tiles,
    interval_size,
    capacity,
    TILE: tl.constexpr,
    SCORE: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Exact softmax attention of a tile's rows over the listed keys that are theirs.

    Args:
        query, output: [H, R, D], the first row at position `start`.
        key, value: [Hkv, N, D].
        lists: `KeyLists` of `capacity` columns.
        sinks: [H], or None.
        log_min_weights: [H], logarithm of the smallest weight of a candidate that is attended to.
        logsumexp: [H, R], of the scores of the attended keys and the sink, written.
        least: [H, R], score below which a candidate is dropped, written if DROP.
        attended: [Hkv, tiles, M, capacity] int8, set where a pair attends to the key, or None.
    """
    ROWS: tl.constexpr = TILE.ROWS
    GROUP_PADDED: tl.constexpr = TILE.GROUP_PADDED
    HEAD_DIM: tl.constexpr = TILE.HEAD_DIM
    BLOCK_DIM: tl.constexpr = TILE.BLOCK_DIM
    VALUE_DIM: tl.constexpr = TILE.VALUE_DIM
    BLOCK_VALUE_DIM: tl.constexpr = TILE.BLOCK_VALUE_DIM
    BLOCK: tl.constexpr = TILE.BLOCK
    tile = tl.program_id(0)
    head = tl.program_id(1)
    r, _, position, heads, inside = tile_pairs(tile, head, base, start, end, interval_size, TILE)
    q = load_rows(query, heads, position - start, inside, HEAD_DIM, BLOCK_DIM)
    list_ = (head * num_tiles + tile).to(tl.int64)
    num_fixed = tl.load(lists.fixed + list_)
    stop = tl.load(lists.total + list_)
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_VALUE_DIM)
    largest = tl.full((ROWS * GROUP_PADDED,), float("-inf"), ACC)
    if sinks is not None:
        largest = tl.load(sinks + heads, mask=inside, other=float("-inf")).to(ACC)
    sink = largest
    least_row = largest
    if DROP:
        weight = tl.where(largest > float("-inf"), 1.0, 0.0).to(ACC)
        for low in range(0, stop, BLOCK):
            c = low + tl.arange(0, BLOCK)
            index, valid = load_listed(lists, list_ * capacity, c, stop, r)
            k = load_keys(key, head, index, None, d, HEAD_DIM, TRANSPOSED=True)
            score = score_keys(q, k, SCORE, PRECISION, ACC)
            score = tl.where(valid, score, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            shift = tl.where(higher > float("-inf"), higher, 0.0)
            weight = weight * tl.exp(largest - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
            largest = higher
        minimum = tl.load(log_min_weights + heads, mask=inside, other=float("-inf"))
        least_row = largest + tl.log(tl.where(weight > 0, weight, 1.0)) + minimum
    shift = tl.where(largest > float("-inf"), largest, 0.0)
    weight = tl.exp(sink - shift)  # 0 without a sink
    summed = tl.zeros((ROWS * GROUP_PADDED, BLOCK_VALUE_DIM), ACC)
    for low in range(0, stop, BLOCK):
        c = low + tl.arange(0, BLOCK)
        index, valid = load_listed(lists, list_ * capacity, c, stop, r)
        k = load_keys(key, head, index, None, d, HEAD_DIM, TRANSPOSED=True)
        v = load_keys(value, head, index, None, e, VALUE_DIM)
        score = score_keys(q, k, SCORE, PRECISION, ACC)
        if DROP:
            valid = valid & ((c < num_fixed)[None, :] | (score >= least_row[:, None]))
            p = tl.where(valid, tl.exp(score - shift[:, None]), 0.0)
        else:
            score = tl.where(valid, score, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            shift = tl.where(higher > float("-inf"), higher, 0.0)
            change = tl.exp(largest - shift)
            p = tl.exp(score - shift[:, None])
            weight *= change
            summed *= change[:, None]
            largest = higher
        weight += tl.sum(p, 1)
        summed = tl.dot(p.to(v.dtype), v, summed, input_precision=PRECISION, out_dtype=ACC)
        if attended is not None:
            m = tl.arange(0, ROWS * GROUP_PADDED)
            place = (list_ * ROWS * GROUP_PADDED + m)[:, None] * capacity + c[None, :]
            tl.store(attended + place, (valid & inside[:, None]).to(tl.int8), mask=(c < stop)[None, :])
    weight = tl.where(weight > 0, weight, 1.0)
    store_rows(output, heads, position - start, inside, summed / weight[:, None], VALUE_DIM, BLOCK_VALUE_DIM)
    place = heads.to(tl.int64) * num_rows + position - start
    tl.store(logsumexp + place, shift + tl.log(weight), mask=inside)
    if DROP:
        tl.store(least + place, least_row, mask=inside)


def num_warps(tile: Tile) -> int:
    """Warps of a program that takes the rows of a tile."""
    return 8 if tile.ROWS * tile.GROUP_PADDED >= 128 else 4


def fwd(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    lists: KeyLists,
    log_min_weights: Tensor,
    span: Span,
    constants: AttentionConstants,
    recording: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill output [H, R, D] for a chunk's query [H, R, D], all keys and values [Hkv, N, D] and sinks [H].

    Returns:
        Each row's logsumexp and the score below which its candidates were dropped, [H, R], and, if recording, which
        listed keys each pair attends to, [Hkv, tiles, M, capacity] int8.
    """
    num_kv_heads, num_tiles, capacity = lists.keys.shape
    logsumexp, least = query.new_empty(2, *query.shape[:2], dtype=log_min_weights.dtype)
    attended = None
    if recording:
        pairs = constants.TILE.ROWS * constants.TILE.GROUP_PADDED
        attended = torch.empty(num_kv_heads, num_tiles, pairs, capacity, dtype=torch.int8, device=query.device)
    triton_launch.launch(
        fwd_kernel,
        (num_tiles, num_kv_heads),
        *(strided(x) for x in (query, key, value, output)),
        lists,
        sinks,
        log_min_weights,
        logsumexp,
        least,
        attended,
        num_rows=query.shape[1],
        num_tiles=num_tiles,
        capacity=capacity,
        num_warps=num_warps(constants.TILE),
        **span.place,
        **constants._asdict(),
    )
    return logsumexp, least, attended
