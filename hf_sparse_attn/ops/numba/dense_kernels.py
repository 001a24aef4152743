"""The compiled part of `dense_rows`: exact softmax attention, block of keys after block (FlashAttention, 2205.14135).

A pair is a row of one query head. The pairs of a KV head lie side by side, so that a tile of them shares each key.
"""

from __future__ import annotations

import math

import numpy as np

from hf_sparse_attn.ops.numba.kernels import compiled, inlined
from hf_sparse_attn.ops.numba.simd import (
    LANES,
    add,
    drop_below,
    exp,
    largest,
    load,
    maximum,
    multiply_add,
    splat,
    store,
    total,
    zeros,
)
from hf_sparse_attn.ops.numba.team import share
from hf_sparse_attn.ops.numba.tile import ROWS, WIDE, multiply_narrow, multiply_wide

_CHUNK = 8 * ROWS  # pairs that go through a block of keys together
_BLOCK_ELEMENTS = 32768  # of a block's keys, which stay in the nearer caches meanwhile


@inlined
def _weigh(scores, at, low, high, width, least_weight, largest_score, weight, summed, i):
    """Turn a pair's scores of the columns low .. high - 1 of `width` into weights, others into zeros; what the pair had
    before is scaled to the new largest score."""
    for c in range(at, at + low):
        scores.flat[c] = -math.inf
    for c in range(at + high, at + width):
        scores.flat[c] = -math.inf
    if low >= high:
        for c in range(at, at + width):
            scores.flat[c] = 0
        return
    top = load(scores, at)
    for c in range(at + LANES, at + width, LANES):
        top = maximum(load(scores, c), top)
    new = max(largest(top), largest_score[i])
    change = math.exp(largest_score[i] - new)
    largest_score[i] = new
    shift, added, nothing = splat(-new), zeros(scores), splat(least_weight)
    for c in range(at, at + width, LANES):
        weights = drop_below(exp(add(load(scores, c), shift)), nothing)
        added = add(added, weights)
        store(scores, c, weights)
    weight[i] = weight[i] * change + total(added)
    if change != 1:
        factor, value_dim = splat(change), summed.shape[1]
        for d in range(i * value_dim, (i + 1) * value_dim, LANES):
            store(summed, d, multiply_add(load(summed, d), factor, zeros(summed)))


@inlined
def _add_values(scores, at, low, high, value, at_value, summed, i):
    """Add a pair's values of the columns low .. high - 1 to its sum."""
    value_dim = summed.shape[1]
    for c in range(low, high):
        factor = splat(scores.flat[at + c])
        for d in range(0, value_dim, LANES):
            place = i * value_dim + d
            store(summed, place, multiply_add(load(value, at_value + c * value_dim + d), factor, load(summed, place)))


@inlined
def _own_columns(pair, num_older, group, window, num_keys, low, width):
    """The columns that a pair reads of `width` keys from `low` on: the first, and where they end."""
    own = num_older + pair // group + 1
    return min(max(own - window - low, 0), width), min(max(min(own, num_keys) - low, 0), width)


@compiled
def _attend_chunk(turn, query, key, value, sinks, num_older, group, window, output, output_row):
    """Chunk by chunk from the last one, which has most to do; the KV heads in turn. See `attend_chunks`."""
    num_kv_heads, num_pairs, head_dim = query.shape
    num_blocks, num_keys, value_dim = key.shape[1], value.shape[1], value.shape[2]
    head, chunk = turn % num_kv_heads, (num_pairs - 1) // _CHUNK - turn // num_kv_heads
    first, last = chunk * _CHUNK, min((chunk + 1) * _CHUNK, num_pairs)
    block = max(_BLOCK_ELEMENTS // value_dim // WIDE, 1) * WIDE
    scores = np.empty((ROWS, block), query.dtype)
    summed, weight = np.zeros((_CHUNK, value_dim), query.dtype), np.zeros(_CHUNK, query.dtype)
    largest_score = np.full(_CHUNK, -math.inf, query.dtype)
    least_weight = np.full(1, 2 * np.finfo(query.dtype).tiny, query.dtype)  # `exp` gives half of it for -inf
    if sinks.shape[1]:
        for i in range(_CHUNK):
            largest_score[i], weight[i] = sinks[head, (first + i) % group], 1
    at_query, at_key = head * num_pairs * head_dim, head * num_blocks * head_dim * WIDE
    begin = max(num_older + first // group + 1 - window, 0) // WIDE * WIDE
    end = min(num_older + (last - 1) // group + 1, num_keys)
    for low in range(begin, end, block):
        at_value = (head * num_keys + low) * value_dim
        for tile in range(first, last, ROWS):
            stop = min(num_older + (tile + ROWS - 1) // group + 1, num_keys) - low
            start = max(num_older + tile // group + 1 - window, 0) - low
            if stop <= 0 or start >= block:
                continue
            width = min(-(-stop // WIDE) * WIDE, block)
            for c in range(0, width, WIDE):
                place = at_key + (low + c) * head_dim
                multiply_wide(
                    query, at_query + tile * head_dim, head_dim, key, place, WIDE, head_dim, scores, c, block, True
                )
            most, least = 0, width  # the columns that all pairs of the tile read are most .. least - 1
            for r in range(ROWS):
                before, after = _own_columns(tile + r, num_older, group, window, num_keys, low, width)
                i = tile - first + r
                _weigh(scores, r * block, before, after, width, least_weight[0], largest_score, weight, summed, i)
                most, least = max(most, before), min(least, after)
            least = max(most, least)
            for r in range(ROWS):
                before, after = _own_columns(tile + r, num_older, group, window, num_keys, low, width)
                _add_values(scores, r * block, before, min(most, after), value, at_value, summed, tile - first + r)
            if most < least:
                for d in range(0, value_dim - value_dim % WIDE, WIDE):
                    place = at_value + most * value_dim + d
                    at_sum = (tile - first) * value_dim + d
                    multiply_wide(
                        scores, most, block, value, place, value_dim, least - most, summed, at_sum, value_dim, False
                    )
                for d in range(value_dim - value_dim % WIDE, value_dim, LANES):
                    place = at_value + most * value_dim + d
                    at_sum = (tile - first) * value_dim + d
                    multiply_narrow(
                        scores, most, block, value, place, value_dim, least - most, summed, at_sum, value_dim, False
                    )
            for r in range(ROWS):
                before, after = _own_columns(tile + r, num_older, group, window, num_keys, low, width)
                _add_values(scores, r * block, max(least, before), after, value, at_value, summed, tile - first + r)
    num_rows = -(-len(output) // output_row)
    for i in range(last - first):
        row, member = (first + i) // group, (first + i) % group
        if row < num_rows:
            place = row * output_row + (head * group + member) * value_dim
            weight[i] = 1 / weight[i]  # in the array's precision
            factor = splat(weight[i])
            for d in range(0, value_dim, LANES):
                store(output, place + d, multiply_add(load(summed, i * value_dim + d), factor, zeros(summed)))


@compiled
def attend_chunks(team, query, key, value, sinks, num_older, group, window, output, output_row):
    """Attention of rows to all keys of their windows, up to their own.

    Args:
        team: what `team.own_team` gives.
        query: [num_key_value_heads, pairs, head_dim], scaled; pairs are a multiple of ROWS, those after the last row
            mean nothing.
        key: [num_key_value_heads, blocks, head_dim, WIDE]: N keys and zeros, WIDE of them side by side.
        value: [num_key_value_heads, N, value_dim].
        sinks: [num_key_value_heads, group], or without columns.
        num_older: keys that are older than the first row's own.
        window: keys that a row reads, its own among them.
        output: flat [R, num_key_value_heads, group, value_dim], each row of `output_row` elements.
    """
    num_kv_heads, num_pairs, _ = query.shape
    turns = num_kv_heads * (-(-num_pairs // _CHUNK))
    share(team, turns, _attend_chunk, (query, key, value, sinks, num_older, group, window, output, output_row))
