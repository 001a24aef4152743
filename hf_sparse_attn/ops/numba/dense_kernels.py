"""The compiled part of `dense_rows`: exact softmax attention, block of keys after block (FlashAttention, 2205.14135).

A pair is a row of one query head. The pairs of a KV head lie side by side, so that a tile of them shares each key.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hf_sparse_attn.ops.numba.kernels import Array, compiled, inlined
from hf_sparse_attn.ops.numba.simd import (
    LANES,
    add,
    drop_below,
    exp,
    largest,
    load,
    maximum,
    multiply_add,
    negative,
    splat,
    store,
    total,
    zeros,
)
from hf_sparse_attn.ops.numba.team import share
from hf_sparse_attn.ops.numba.tile import ROWS, WIDE, multiply, multiply_transposed, product

_CHUNK = 8 * ROWS  # pairs that go through a block of keys together
_BLOCK_ELEMENTS = 32768  # of a block's keys, which stay in the nearer caches meanwhile
_BACKWARD_BLOCK_ELEMENTS = 16384
_SCORES = 131072  # of rows that keep all of theirs at a time


class Rows(NamedTuple):
    """The rows of a call, and what they read.

    Args:
        query: [num_key_value_heads, pairs, head_dim], scaled; pairs are a multiple of ROWS, those after the last row
            mean nothing.
        key: [num_key_value_heads, blocks, head_dim, WIDE]: N keys and zeros, WIDE of them side by side.
        num_keys: N.
        num_older: keys that are older than the first row's own.
        group: query heads of a KV head.
        window: keys that a row reads, its own among them.
    """

    query: Array
    key: Array
    num_keys: int
    num_older: int
    group: int
    window: int


@inlined
def _columns(pair, rows, low, width):
    """The columns that a pair reads of `width` keys from `low` on: the first, and where they end."""
    own = rows.num_older + pair // rows.group + 1
    return min(max(own - rows.window - low, 0), width), min(max(min(own, rows.num_keys) - low, 0), width)


@inlined
def _multiply_keys(left, head, tile, key, low, width, out, at):
    """Products of a tile's pairs with the keys from `low` on, written to `out` [.., block] from the flat index `at` on.

    left: [num_key_value_heads, pairs, D]; key: [num_key_value_heads, blocks, D, WIDE].
    """
    _, num_pairs, size = left.shape
    at_left, at_key = (head * num_pairs + tile) * size, (head * key.shape[1] * WIDE + low) * size
    for c in range(0, width, WIDE):
        product(left, at_left, size, key, at_key + c * size, WIDE, size, out, at + c, out.shape[1], True)


@inlined
def _hide(scores, at, low, high, width):
    """Let nothing but the columns low .. high - 1 of `width` have a weight."""
    for c in range(at, at + low):
        scores.flat[c] = -math.inf
    for c in range(at + high, at + width):
        scores.flat[c] = -math.inf


@inlined
def _largest(scores, at, width):
    top = load(scores, at)
    for c in range(at + LANES, at + width, LANES):
        top = maximum(load(scores, c), top)
    return largest(top)


@inlined
def _least_weight(scores):
    """What is under it is the `exp` of -inf, which is half of it."""
    return np.full(1, 2 * np.finfo(scores.dtype).tiny, scores.dtype)[0]


@inlined
def _exponentiate(scores, at, width, shift, least_weight):
    """Turn a pair's scores into exp(score - shift), 0 for -inf; returns their sum."""
    lowered, added, least = splat(-shift), zeros(scores), splat(least_weight)
    for c in range(at, at + width, LANES):
        weights = drop_below(exp(add(load(scores, c), lowered)), least)
        added = add(added, weights)
        store(scores, c, weights)
    return total(added)


@inlined
def _weigh(scores, at, width, least_weight, largest_score, weight, summed, i):
    """Turn a pair's scores into weights; what the pair had before is scaled to the new largest score."""
    new = max(_largest(scores, at, width), largest_score[i])
    change = math.exp(largest_score[i] - new)
    largest_score[i] = new
    weight[i] = weight[i] * change + _exponentiate(scores, at, width, new, least_weight)
    if change != 1:
        factor, value_dim = splat(change), summed.shape[1]
        for d in range(i * value_dim, (i + 1) * value_dim, LANES):
            store(summed, d, multiply_add(load(summed, d), factor, zeros(summed)))


@inlined
def _add_values(weights, at, low, high, value, at_value, summed, i):
    """Add a pair's values of the columns low .. high - 1 to its sum."""
    value_dim = summed.shape[1]
    for c in range(low, high):
        factor = splat(weights.flat[at + c])
        for d in range(0, value_dim, LANES):
            place = i * value_dim + d
            store(summed, place, multiply_add(load(value, at_value + c * value_dim + d), factor, load(summed, place)))


@inlined
def _num_pairs(rows, output, output_row):
    """Pairs of the rows, without those that they are filled up with."""
    return -(-len(output) // output_row) * rows.group


@inlined
def _write(rows, head, first, last, summed, weight, output, output_row):
    """Write the sums of the pairs first .. last - 1, divided by their weights, but of those after the last row."""
    value_dim = summed.shape[1]
    for i in range(min(last, _num_pairs(rows, output, output_row)) - first):
        row, member = (first + i) // rows.group, (first + i) % rows.group
        weight[i] = 1 / weight[i]  # in the array's precision
        factor, place = splat(weight[i]), row * output_row + (head * rows.group + member) * value_dim
        for d in range(0, value_dim, LANES):
            store(output, place + d, multiply_add(load(summed, i * value_dim + d), factor, zeros(summed)))


@compiled
def _attend_chunk(turn, rows, value, sinks, output, output_row, logsumexp):
    """Chunk by chunk from the last one, which has most to do; the KV heads in turn. See `attend_chunks`."""
    num_kv_heads, num_pairs, _ = rows.query.shape
    head, chunk = turn % num_kv_heads, (num_pairs - 1) // _CHUNK - turn // num_kv_heads
    first, last = chunk * _CHUNK, min((chunk + 1) * _CHUNK, num_pairs)
    num_keys, value_dim, dtype = rows.num_keys, value.shape[2], rows.query.dtype
    block = max(_BLOCK_ELEMENTS // value_dim // WIDE, 1) * WIDE
    weights, summed = np.empty((ROWS, block), dtype), np.zeros((_CHUNK, value_dim), dtype)
    weight, largest_score = np.zeros(_CHUNK, dtype), np.full(_CHUNK, -math.inf, dtype)
    least_weight = _least_weight(weights)
    if sinks.shape[1]:
        for i in range(_CHUNK):
            largest_score[i], weight[i] = sinks[head, (first + i) % rows.group], 1
    begin = _columns(first, rows, 0, num_keys)[0] // WIDE * WIDE
    for low in range(begin, _columns(last - 1, rows, 0, num_keys)[1], block):
        at_value = (head * num_keys + low) * value_dim
        for tile in range(first, last, ROWS):
            start, stop = _columns(tile, rows, low, block)[0], _columns(tile + ROWS - 1, rows, low, block)[1]
            if start >= stop:
                continue
            width = -(-stop // WIDE) * WIDE
            _multiply_keys(rows.query, head, tile, rows.key, low, width, weights, 0)
            # All pairs of the tile read the columns common .. end - 1; some of them read others, which must not reach
            # the rest, whatever they hold.
            common, end = _columns(tile + ROWS - 1, rows, low, width)[0], _columns(tile, rows, low, width)[1]
            for r in range(ROWS):
                at, i = r * block, tile - first + r
                before, after = _columns(tile + r, rows, low, width)
                if before < after:
                    _hide(weights, at, before, after, width)
                    _weigh(weights, at, width, least_weight, largest_score, weight, summed, i)
                    _add_values(weights, at, before, min(common, after), value, at_value, summed, i)
            if common < end:
                at_sum, at_common, n = (tile - first) * value_dim, at_value + common * value_dim, end - common
                multiply(weights, common, block, value, at_common, value_dim, n, summed, at_sum, value_dim, False)
            for r in range(ROWS):
                before, after = _columns(tile + r, rows, low, width)
                start = max(end, common, before)
                _add_values(weights, r * block, start, after, value, at_value, summed, tile - first + r)
    if logsumexp.shape[1]:
        for i in range(min(last, _num_pairs(rows, output, output_row)) - first):
            logsumexp[head, first + i] = largest_score[i] + math.log(weight[i])
    _write(rows, head, first, last, summed, weight, output, output_row)


@compiled
def attend_chunks(team, rows, value, sinks, output, output_row, logsumexp):
    """Attention of rows to all keys of their windows, up to their own.

    Args:
        team: what `team.own_team` gives.
        rows: Rows.
        value: [num_key_value_heads, N, value_dim].
        sinks: [num_key_value_heads, group], or without columns.
        output: flat [R, num_key_value_heads, group, value_dim], each row of `output_row` elements.
        logsumexp: [num_key_value_heads, pairs], of each pair's scores and sink, written, or without columns.
    """
    num_kv_heads, num_pairs, _ = rows.query.shape
    turns = num_kv_heads * (-(-num_pairs // _CHUNK))
    share(team, turns, _attend_chunk, (rows, value, sinks, output, output_row, logsumexp))


@compiled
def _differentiate_part(turn, rows, key, value, grad, logsumexp, delta, query_grad, key_grad, value_grad):
    """Every chunk of a part, of one KV head. See `differentiate_chunks`."""
    num_kv_heads, num_pairs, head_dim = rows.query.shape
    num_keys, value_dim, dtype, num_parts = rows.num_keys, grad.shape[2], rows.query.dtype, len(key_grad)
    head, part = turn % num_kv_heads, turn // num_kv_heads
    block = max(_BACKWARD_BLOCK_ELEMENTS // max(head_dim, value_dim) // WIDE, 1) * WIDE
    weights, slopes = np.empty((_CHUNK, block), dtype), np.empty((_CHUNK, block), dtype)
    least_weight = splat(_least_weight(weights))
    at_grads = (part * num_kv_heads + head) * key_grad.shape[2]
    for first in range(part * _CHUNK, num_pairs, num_parts * _CHUNK):
        last = min(first + _CHUNK, num_pairs)
        begin = _columns(first, rows, 0, num_keys)[0] // WIDE * WIDE
        end = _columns(last - 1, rows, 0, num_keys)[1]
        for low in range(begin, end, block):
            width = min(-(-(end - low) // WIDE) * WIDE, block)
            for tile in range(first, last, ROWS):
                pair, at_tile = head * num_pairs + tile, (tile - first) * block
                _multiply_keys(rows.query, head, tile, rows.key, low, width, weights, at_tile)
                _multiply_keys(grad, head, tile, value, low, width, slopes, at_tile)  # gradients of the weights
                for r in range(ROWS):
                    at = at_tile + r * block
                    before, after = _columns(tile + r, rows, low, width)
                    _hide(weights, at, before, after, width)
                    shift, mean = splat(-logsumexp.flat[pair + r]), splat(-delta.flat[pair + r])
                    for c in range(at, at + width, LANES):
                        weight = drop_below(exp(add(load(weights, c), shift)), least_weight)
                        store(weights, c, weight)
                        store(slopes, c, multiply_add(weight, add(load(slopes, c), mean), zeros(slopes)))
                place, n = (head * num_keys + low) * head_dim, min(width, num_keys - low)
                multiply(slopes, at_tile, block, key, place, head_dim, n, query_grad, pair * head_dim, head_dim, False)
            pair, n = head * num_pairs + first, last - first
            for c in range(0, width, ROWS):
                of_key, of_value = (at_grads + low + c) * head_dim, (at_grads + low + c) * value_dim
                multiply_transposed(
                    slopes, c, block, rows.query, pair * head_dim, head_dim, n, key_grad, of_key, head_dim, False
                )
                multiply_transposed(
                    weights, c, block, grad, pair * value_dim, value_dim, n, value_grad, of_value, value_dim, False
                )


@compiled
def differentiate_chunks(team, rows, key, value, grad, logsumexp, delta, query_grad, key_grad, value_grad):
    """The gradients of `attend_chunks`.

    Args:
        team, rows: as of `attend_chunks`.
        key: [num_key_value_heads, N, head_dim].
        value: [num_key_value_heads, blocks, value_dim, WIDE], as `Rows.key`.
        grad: [num_key_value_heads, pairs, value_dim], of the output; zeros after the last row.
        logsumexp: [num_key_value_heads, pairs], what `attend_chunks` wrote.
        delta: [num_key_value_heads, pairs], sums over grad times output.
        query_grad: [num_key_value_heads, pairs, head_dim], of the scaled queries, added to.
        key_grad, value_grad: [parts, num_key_value_heads, blocks * WIDE, head_dim and value_dim], added to: each part
            is some of the chunks.
    """
    others = (rows, key, value, grad, logsumexp, delta, query_grad, key_grad, value_grad)
    share(team, len(rows.query) * len(key_grad), _differentiate_part, others)


@inlined
def _drop_light(weights, at, stop, least):
    """Let the columns before `stop` have no weight where it is under `least`; the sum of what is dropped."""
    light, limit, whole = zeros(weights), splat(least), stop - stop % LANES
    for c in range(at, at + whole, LANES):
        weight = load(weights, c)
        heavy = drop_below(weight, limit)
        light = add(light, add(weight, negative(heavy)))
        store(weights, c, heavy)
    dropped = total(light)
    for c in range(at + whole, at + stop):
        if weights.flat[c] < least:
            dropped += weights.flat[c]
            weights.flat[c] = 0
    return dropped


@inlined
def _weigh_scored(weights, at, own, older, width, static, held, sinks, g, min_weight, least_weight):
    """Turn a pair's scores of `own` keys into softmax weights, not divided by their sum, which is returned.

    Of the first `older` keys those are dropped whose part of all is under `min_weight`, unless they are static.
    """
    _hide(weights, at, 0, own, width)
    shift = _largest(weights, at, width)
    if len(sinks):
        shift = max(shift, sinks[g])
    summed = _exponentiate(weights, at, width, shift, least_weight)
    if len(sinks):
        summed += math.exp(sinks[g] - shift)
    if min_weight > 0 and older > 0:
        num_static = 0
        while num_static < len(static) and static[num_static] < older:
            held[num_static] = weights.flat[at + static[num_static]]
            weights.flat[at + static[num_static]] = 0
            num_static += 1
        summed -= _drop_light(weights, at, older, min_weight * summed)
        for i in range(num_static):
            weights.flat[at + static[i]] = held[i]
    return summed


@compiled
def attend_scored_rows(rows, value, sinks, min_weights, static, own_window, output, output_row):
    """Rows of one KV head that score every key up to their own, and attend to those of enough weight.

    Args:
        rows: Rows, of one KV head.
        value: [1, N, value_dim].
        sinks: [group], or empty.
        min_weights: [group], smallest weight of a key older than the row's window.
        static: sorted indices of the keys that are attended to whatever their weight, int64.
        own_window: keys of a row's window, its own among them.
        output: flat [R, group, value_dim], each row of `output_row` elements.
    """
    _, num_pairs, _ = rows.query.shape
    num_keys, value_dim, dtype = rows.num_keys, value.shape[2], rows.query.dtype
    room = -(-num_keys // WIDE) * WIDE
    together = min(max(_SCORES // (room * ROWS), 1) * ROWS, _CHUNK)
    block = max(_BLOCK_ELEMENTS // value_dim // WIDE, 1) * WIDE
    weights, summed = np.empty((together, room), dtype), np.empty((together, value_dim), dtype)
    weight, held = np.empty(together, dtype), np.empty(len(static), dtype)
    least_weight = _least_weight(weights)
    for first in range(0, num_pairs, together):
        last = min(first + together, num_pairs)
        stop = _columns(last - 1, rows, 0, num_keys)[1]
        width = -(-stop // WIDE) * WIDE
        for low in range(0, width, block):
            for tile in range(first, last, ROWS):
                at = (tile - first) * room + low
                _multiply_keys(rows.query, 0, tile, rows.key, low, min(block, width - low), weights, at)
        for i in range(last - first):
            own, g = _columns(first + i, rows, 0, num_keys)[1], (first + i) % rows.group
            older = max(own - own_window, 0)
            weight[i] = _weigh_scored(
                weights, i * room, own, older, width, static, held, sinks, g, min_weights[g], least_weight
            )
            for d in range(value_dim):
                summed[i, d] = 0
        for low in range(0, width, block):
            for tile in range(first, last, ROWS):
                common, i = min(_columns(tile, rows, low, block)[1], width - low), tile - first
                if common > 0:
                    at, at_value, at_sum = i * room + low, low * value_dim, i * value_dim
                    multiply(weights, at, room, value, at_value, value_dim, common, summed, at_sum, value_dim, False)
                for r in range(i, i + ROWS):
                    own = _columns(first + r, rows, low, block)[1]
                    _add_values(weights, r * room + low, common, own, value, low * value_dim, summed, r)
        _write(rows, 0, first, last, summed, weight, output, output_row)
