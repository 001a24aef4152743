"""The compiled part of the backward of sparse rows: gradients by tiles of rows that share most of the keys they read.

A pair is a row of one query head. The keys that any pair of a tile reads are gathered, so that all gradients are
products of small matrices, in which the pairs stand side by side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from hf_sparse_attn.ops.numba.kernels import Array, compiled, inlined
from hf_sparse_attn.ops.numba.simd import (
    LANES,
    add,
    highest_bit,
    lanes_at_least,
    load,
    multiply_add,
    negative,
    store,
    zeros,
)
from hf_sparse_attn.ops.numba.tile import ROWS, multiply, multiply_transposed

PAIRS = 48  # of a tile, about


class Space(NamedTuple):
    """Room for what is known of one tile, whose numbers of pairs and keys are filled up to multiples.

    Args:
        place: [N] int32, where each key stands among those that the tile reads, else -1; all -1 between tiles.
        listed: [K] int32, these keys.
        columns, keys: [rows, C] int32, the columns that each row reads, and their keys.
        ends: [rows] int32, how many they are.
        weights, slopes, scores: flat [K, pairs]; gradients of the scores, and the scores where there is a softcap.
        key, value, grad: flat [K, head_dim or value_dim], gathered, and gradients before they are added.
        query_columns, upstream_columns: [head_dim or value_dim, pairs].
        query_grad: flat [pairs, head_dim].
        mean, rest: [pairs].
    """

    place: Array
    listed: Array
    columns: Array
    keys: Array
    ends: Array
    weights: Array
    slopes: Array
    scores: Array
    key: Array
    value: Array
    grad: Array
    query_columns: Array
    upstream_columns: Array
    query_grad: Array
    mean: Array
    rest: Array


@inlined
def _pick_columns(weights, r, low, high, columns, n):
    """Append the columns low .. high - 1 that any head of row r reads; how many there are then."""
    _, group, width = weights.shape
    at, nothing = r * group * width, zeros(weights)
    for c in range(low, high, LANES):
        summed = load(weights, at + c)
        for g in range(1, group):
            summed = add(summed, load(weights, at + g * width + c))
        bits = ~lanes_at_least(nothing, summed) & ((1 << min(LANES, high - c)) - 1)
        while bits != 0:
            lane = highest_bit(bits)
            columns[n] = c + lane
            n += 1
            bits ^= 1 << lane
    return n


@inlined
def _list_keys(read, order, first, stop, space):
    """List the keys that rows first .. stop - 1 read, and the columns of each row; how many keys they are."""
    weights, slots, sizes = read
    n = 0
    for r in range(first, stop):
        columns, own = space.columns[r - first], slots[r]
        fixed = _pick_columns(weights, r, 0, sizes[r, 0], columns, 0)
        stop_column = _pick_columns(weights, r, sizes[r, 1], sizes[r, 2], columns, fixed)
        space.ends[r - first] = stop_column
        for i in range(stop_column):
            key = own[columns[i]] if i < fixed else order[own[columns[i]]]
            space.keys[r - first, i] = key
            if space.place[key] < 0:
                space.place[key] = n
                space.listed[n] = key
                n += 1
    return n


@inlined
def _spread_weights(weights, first, stop, space, n, step):
    """Write the rows' weights to `space.weights`, [n, step], and zeros elsewhere, up to a multiple of ROWS."""
    group, table = weights.shape[1], space.weights
    for i in range(0, -(-n // ROWS) * ROWS * step, LANES):
        store(table, i, zeros(table))
    for r in range(first, stop):
        pair = (r - first) * group
        for i in range(space.ends[r - first]):
            at, column = space.place[space.keys[r - first, i]] * step + pair, space.columns[r - first, i]
            for g in range(group):
                table[at + g] = weights[r, g, column]


@inlined
def _gather(source, listed, n, near):
    """Copy the rows of `source` that are listed to `near`, flat, with zeros up to a multiple of ROWS."""
    size = source.shape[1]
    for i in range(n):
        for d in range(0, size, LANES):
            store(near, i * size + d, load(source, listed[i] * size + d))
    for i in range(n * size, -(-n // ROWS) * ROWS * size, LANES):
        store(near, i, zeros(near))


@inlined
def _scatter(near, listed, n, target):
    """Add the rows of `near`, flat, to those of `target` that are listed."""
    size = target.shape[1]
    for i in range(n):
        for d in range(0, size, LANES):
            place = listed[i] * size + d
            store(target, place, add(load(target, place), load(near, i * size + d)))


@inlined
def _transpose(rows, at, num_pairs, columns):
    """Write the rows [num_pairs, D] from the flat index `at` on to `columns` [D, pairs], with zeros after them."""
    size, step = columns.shape
    for d in range(size):
        for i in range(num_pairs):
            columns[d, i] = rows.flat[at + i * size + d]
        for i in range(num_pairs, step):
            columns[d, i] = 0


@inlined
def _multiply(left, left_step, right, at_right, right_step, n, out, size, num_rows):
    """Write to `out` [num_rows, size] the rows of `left`, n numbers of each, times n rows of `right`.

    `left` and `out` are flat and begin at their first element; rows are filled up to a multiple of ROWS.
    """
    for i in range(0, num_rows, ROWS):
        multiply(left, i * left_step, left_step, right, at_right, right_step, n, out, i * size, size, True)


@inlined
def _slopes(space, n, step):
    """Turn the gradients of the weights into those of the scores: weight * (gradient - their mean)."""
    for p in range(0, step, LANES):
        mean, rest = zeros(space.mean), zeros(space.rest)
        for i in range(p, n * step, step):
            mean = multiply_add(load(space.weights, i), load(space.slopes, i), mean)
            rest = add(rest, load(space.weights, i))
        store(space.mean, p, mean)
        store(space.rest, p, rest)
    for p in range(0, step, LANES):
        lower = negative(load(space.mean, p))
        for i in range(p, n * step, step):
            slope = multiply_add(load(space.weights, i), add(load(space.slopes, i), lower), zeros(space.mean))
            store(space.slopes, i, slope)


@compiled
def differentiate_rows(upstream, query, head, softcap, read, space, query_grad, key_grad, value_grad, sinks_grad):
    """Add rows' gradients in the scaled queries, the keys, the values and the sinks.

    Args:
        upstream: [R, group, value_dim], the gradient in the rows' output.
        query: [R, group, head_dim], scaled.
        head, softcap, read: what `attend_rows` had, and left of these rows.
        space: Space.
    """
    num_rows, group, head_dim = query.shape
    value_dim, step, tile_rows = head.value.shape[1], len(space.mean), len(space.ends)
    for first in range(0, num_rows, tile_rows):
        stop = min(first + tile_rows, num_rows)
        num_pairs, n = (stop - first) * group, _list_keys(read, head.order, first, stop, space)
        at_query, at_output = first * group * head_dim, first * group * value_dim
        _spread_weights(read.weights, first, stop, space, n, step)
        for i in range(n):
            space.place[space.listed[i]] = -1
        _gather(head.key, space.listed, n, space.key)
        _gather(head.value, space.listed, n, space.value)
        _transpose(upstream, at_output, num_pairs, space.upstream_columns)
        _multiply(space.value, value_dim, space.upstream_columns, 0, step, value_dim, space.slopes, step, n)
        _slopes(space, n, step)
        for p in range(num_pairs if len(sinks_grad) else 0):
            sinks_grad[p % group] -= (1 - space.rest[p]) * space.mean[p]
        if softcap > 0:
            _transpose(query, at_query, num_pairs, space.query_columns)
            _multiply(space.key, head_dim, space.query_columns, 0, step, head_dim, space.scores, step, n)
            for i in range(n * step):
                if space.weights[i] != 0:
                    space.slopes[i] *= 1 - math.tanh(space.scores[i] / softcap) ** 2
        for p in range(0, num_pairs, ROWS):
            multiply_transposed(
                space.slopes, p, step, space.key, 0, head_dim, n, space.query_grad, p * head_dim, head_dim, True
            )
        for i in range(0, num_pairs * head_dim, LANES):
            store(query_grad, at_query + i, load(space.query_grad, i))
        _multiply(space.slopes, step, query, at_query, head_dim, num_pairs, space.grad, head_dim, n)
        _scatter(space.grad, space.listed, n, key_grad)
        _multiply(space.weights, step, upstream, at_output, value_dim, num_pairs, space.grad, value_dim, n)
        _scatter(space.grad, space.listed, n, value_grad)
