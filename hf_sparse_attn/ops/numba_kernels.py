"""The compiled part of `ops.numba`: everything that is done row by row and key by key."""

from __future__ import annotations

import math

import numba
import numpy as np

from hf_sparse_attn.ops.simd import (
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
    store_totals,
    total,
    zeros,
)
from hf_sparse_attn.routing import UNROUTABLE

_BLOCK = 128  # columns whose values are read for one head after the other
_HIDDEN = -1e30  # score of a column that holds no key

# Sums may be reordered; infinities and NaN stay what they are.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})


@compiled
def add_keys(key, bucket, reach, which, target, sign, sums, counts):
    """Add keys reach[which] .. target - 1 to their buckets (sign 1), or take them away (sign -1)."""
    for j in range(reach[which], target):
        b = bucket[j]
        if b < len(counts):
            counts[b] += sign
            for d in range(key.shape[1]):
                sums[b, d] += sign * key[j, d]
            if counts[b] == 0:
                sums[b] = 0
    reach[which] = max(reach[which], target)


@compiled
def count_keys(bucket, reach, which, target, counts):
    """Count keys reach[which] .. target - 1 in their buckets."""
    target = min(target, len(bucket))
    for j in range(reach[which], target):
        if bucket[j] < len(counts):
            counts[bucket[j]] += 1
    reach[which] = max(reach[which], target)


@compiled
def average_keys(sums, counts, means):
    for b in range(len(counts)):
        scale = 1 / max(counts[b], 1)
        for d in range(sums.shape[1]):
            means[b, d] = sums[b, d] * scale


@compiled
def label_buckets(scores, bits, counts):
    """Hide buckets of which nothing is known, and write each bucket's number into the lowest bits of its score."""
    mask = len(counts) - 1
    for r in range(len(scores)):
        for b in range(len(counts)):
            if counts[b] <= 0:
                scores[r, b] = UNROUTABLE
        for b in range(len(counts)):
            bits[r, b] = (bits[r, b] & ~mask) | b


@compiled
def _score(query, at_query, key, slots, low, high, scores, at):
    """Products of a row's queries with the keys in columns low .. high - 1; up to three columns behind are written too.

    The first head's columns begin at flat index `at`. Of the slots behind `high`, three are set as well.
    """
    group, head_dim, width = query.shape[1], key.shape[1], scores.shape[2]
    for c in range(high, high + 3):
        slots[c] = 0
    for column in range(low, high, 4):
        first, second = slots[column] * head_dim, slots[column + 1] * head_dim
        third, fourth = slots[column + 2] * head_dim, slots[column + 3] * head_dim
        for g in range(group):
            a = b = c = e = zeros(query)
            for d in range(0, head_dim, LANES):
                q = load(query, at_query + g * head_dim + d)
                a = multiply_add(q, load(key, first + d), a)
                b = multiply_add(q, load(key, second + d), b)
                c = multiply_add(q, load(key, third + d), c)
                e = multiply_add(q, load(key, fourth + d), e)
            store_totals(scores, at + g * width + column, a, b, c, e)


@compiled
def _fill(slots, n, start, number):
    """Write start, start + 1, ... to slots[n : n + number], and up to LANES - 1 more behind; returns n + number."""
    for i in range(0, number, LANES):
        for lane in range(LANES):
            slots[n + i + lane] = start + i + lane
    return n + number


@compiled
def _add_weighted(weights, at, picked, num_picked, slots, value, output, at_output):
    """Add weights[at + c] * value[slots[c]] over the picked columns c to the row of `output` at a flat index."""
    head_dim = value.shape[1]
    d = 0
    while d + 4 * LANES <= head_dim:
        a, b = load(output, at_output + d), load(output, at_output + d + LANES)
        c, e = load(output, at_output + d + 2 * LANES), load(output, at_output + d + 3 * LANES)
        for i in range(num_picked):
            weight, row = splat(weights.flat[at + picked[i]]), slots[picked[i]] * head_dim + d
            a = multiply_add(weight, load(value, row), a)
            b = multiply_add(weight, load(value, row + LANES), b)
            c = multiply_add(weight, load(value, row + 2 * LANES), c)
            e = multiply_add(weight, load(value, row + 3 * LANES), e)
        store(output, at_output + d, a)
        store(output, at_output + d + LANES, b)
        store(output, at_output + d + 2 * LANES, c)
        store(output, at_output + d + 3 * LANES, e)
        d += 4 * LANES
    while d < head_dim:
        a = load(output, at_output + d)
        for i in range(num_picked):
            row = slots[picked[i]] * head_dim + d
            a = multiply_add(splat(weights.flat[at + picked[i]]), load(value, row), a)
        store(output, at_output + d, a)
        d += LANES


@compiled
def _pick(weights, at, low, high, picked):
    """Write the columns from low to high - 1 whose weight is not zero to `picked`; returns how many they are."""
    n = 0
    for c in range(low, high):
        picked[n] = c
        n += weights.flat[at + c] != 0
    return n


@compiled
def _sum_values(weights, at, low, high, slots, value, picked, output, at_output):
    """Add the weighted values of columns low .. high - 1 to every head's row of `output`.

    In blocks, so that values stay in the nearest cache from one head to the next.
    """
    group, width, value_dim = weights.shape[1], weights.shape[2], value.shape[1]
    for block in range(low, high, _BLOCK):
        for g in range(group):
            picks = _pick(weights, at + g * width, block, min(block + _BLOCK, high), picked)
            _add_weighted(weights, at + g * width, picked, picks, slots, value, output, at_output + g * value_dim)


@compiled
def _softmax(scores, at, num_fixed, first_found, num_columns, sinks, g, min_weight):
    """Turn one head's scores into weights exp(score - largest), those of light found keys into 0; returns their sum.

    The fixed columns come first, the found ones from `first_found` on; both are filled up to multiples of LANES.
    """
    for c in range(num_fixed, first_found):
        scores.flat[at + c] = _HIDDEN
    stop = first_found + -(-(num_columns - first_found) // LANES) * LANES
    for c in range(num_columns, stop):
        scores.flat[at + c] = _HIDDEN
    most = load(scores, at)
    for c in range(at, at + stop, LANES):
        most = maximum(load(scores, c), most)
    shift = largest(most)
    if len(sinks):
        shift = max(shift, sinks[g])
    lowered = splat(-shift)
    fixed, found = zeros(scores), zeros(scores)
    for c in range(at, at + first_found, LANES):
        weight = exp(add(load(scores, c), lowered))
        store(scores, c, weight)
        fixed = add(fixed, weight)
    for c in range(at + first_found, at + stop, LANES):
        weight = exp(add(load(scores, c), lowered))
        store(scores, c, weight)
        found = add(found, weight)
    sum_of_fixed = total(fixed)
    if len(sinks):
        sum_of_fixed += math.exp(sinks[g] - shift)
    if min_weight > 0:
        least = splat(min_weight * (sum_of_fixed + total(found)))
        found = zeros(scores)
        for c in range(at + first_found, at + stop, LANES):
            weight = drop_below(load(scores, c), least)
            store(scores, c, weight)
            found = add(found, weight)
    return sum_of_fixed + total(found)


@compiled
def _find(ranked, ranked_bits, first, upper, lower, budget, slots, n):
    """Append the keys of a row's best buckets to its slots, the newest of each bucket; returns the new number."""
    stop = n + budget
    for rank in range(len(ranked) - 1, -1, -1):
        if n == stop or ranked[rank] < UNROUTABLE / 2:
            break
        b = ranked_bits[rank] & (len(first) - 1)
        taken = min(upper[b] - lower[b], stop - n)
        n = _fill(slots, n, first[b] + upper[b] - taken, taken)
    return n


@compiled
def find_rows(position, num_rows, ranked, ranked_bits, first, bucket, upper, lower, reach, lags, budget, slots):
    """What `attend_rows` finds, row after row into the same slots: to measure what that costs."""
    for r in range(num_rows):
        count_keys(bucket, reach, 2, position + r - lags[0] + 1, upper)
        count_keys(bucket, reach, 3, position + r - lags[1] + 1, lower)
        _find(ranked[r], ranked_bits[r], first, upper, lower, budget, slots, 0)


@compiled
def attend_rows(
    position,
    query,
    key,
    value,
    key_offset,
    table_key,
    table_value,
    order,
    first,
    ranked,
    ranked_bits,
    bucket,
    upper,
    lower,
    reach,
    window,
    sliding_window,
    static,
    budget,
    min_weights,
    softcap,
    sinks,
    drawn,
    output,
    all_weights,
    all_slots,
    sizes,
    keep,
):
    """Rows at consecutive positions of one page. Columns: static keys, window, random keys; then the found keys."""
    num_rows, group, head_dim = query.shape
    width, value_dim = all_weights.shape[2], value.shape[1]
    oldest_static = newest_static = 0
    picked = np.empty(_BLOCK, np.int32)
    sums = np.empty(group, query.dtype)
    for r in range(num_rows):
        p = position + r
        slots = all_slots[r if keep else 0]
        at = r * group * width if keep else 0
        at_query = r * group * head_dim
        oldest = max(p - sliding_window + 1, key_offset)
        # Static keys behind the window.
        while newest_static < len(static) and static[newest_static] <= p - window:
            newest_static += 1
        while oldest_static < newest_static and static[oldest_static] < oldest:
            oldest_static += 1
        n = 0
        for s in range(oldest_static, newest_static):
            slots[n] = static[s] - key_offset
            n += 1
        low = max(p - window + 1, oldest)
        n = _fill(slots, n, low - key_offset, p + 1 - low)
        for i in range(drawn.shape[1]):
            if drawn[r, i] >= 0:
                slots[n] = drawn[r, i]
                n += 1
        num_fixed = n
        _score(query, at_query, key, slots, 0, n, all_weights, at)
        first_found = -(-n // LANES) * LANES
        count_keys(bucket, reach, 2, p - window + 1 - key_offset, upper)
        count_keys(bucket, reach, 3, p - sliding_window + 1 - key_offset, lower)
        n = _find(ranked[r], ranked_bits[r], first, upper, lower, budget, slots, first_found)
        for i in range(drawn.shape[1]):  # what is a random key already does not count as found
            if drawn[r, i] >= 0:
                for c in range(first_found, n):
                    if order[slots[c]] == drawn[r, i]:
                        n -= 1
                        slots[c] = slots[n]
                        break
        _score(query, at_query, table_key, slots, first_found, n, all_weights, at)
        if softcap > 0:
            for g in range(group):
                for c in range(at + g * width, at + g * width + n):
                    all_weights.flat[c] = softcap * math.tanh(all_weights.flat[c] / softcap)
        for g in range(group):
            sums[g] = _softmax(all_weights, at + g * width, num_fixed, first_found, n, sinks, g, min_weights[g])
        if len(output):
            at_output = r * group * value_dim
            output[r] = 0
            _sum_values(all_weights, at, 0, num_fixed, slots, value, picked, output, at_output)
            _sum_values(all_weights, at, first_found, n, slots, table_value, picked, output, at_output)
            for g in range(group):
                for d in range(at_output + g * value_dim, at_output + (g + 1) * value_dim):
                    output.flat[d] /= sums[g]
        if keep:
            for g in range(group):
                for c in range(at + g * width, at + g * width + n):
                    all_weights.flat[c] /= sums[g]
            sizes[r, 0], sizes[r, 1], sizes[r, 2] = num_fixed, first_found, n


@compiled
def _add_outer(weights, slots, low, high, rows, at_rows, grad):
    """Add weights[0, g, c] * row g, over the heads g, to grad[slots[c]] for columns c; row 0 begins at a flat index."""
    group, width, head_dim = weights.shape[1], weights.shape[2], grad.shape[1]
    for i in range(low, high):
        d = 0
        while d + 4 * LANES <= head_dim:
            at = slots[i] * head_dim + d
            a, b = load(grad, at), load(grad, at + LANES)
            c, e = load(grad, at + 2 * LANES), load(grad, at + 3 * LANES)
            for g in range(group):
                weight, row = splat(weights.flat[g * width + i]), at_rows + g * head_dim + d
                a = multiply_add(weight, load(rows, row), a)
                b = multiply_add(weight, load(rows, row + LANES), b)
                c = multiply_add(weight, load(rows, row + 2 * LANES), c)
                e = multiply_add(weight, load(rows, row + 3 * LANES), e)
            store(grad, at, a)
            store(grad, at + LANES, b)
            store(grad, at + 2 * LANES, c)
            store(grad, at + 3 * LANES, e)
            d += 4 * LANES
        while d < head_dim:
            at = slots[i] * head_dim + d
            a = load(grad, at)
            for g in range(group):
                a = multiply_add(splat(weights.flat[g * width + i]), load(rows, at_rows + g * head_dim + d), a)
            store(grad, at, a)
            d += LANES


@compiled
def _gather_read(weights, slots, r, low, high, near, kept, n):
    """Append the columns low .. high - 1 that any head reads to `near` (their slots) and `kept` (their weights)."""
    for c in range(low, high):
        near[n] = slots[r, c]
        is_read = False
        for g in range(weights.shape[1]):
            kept[0, g, n] = weights[r, g, c]
            is_read |= weights[r, g, c] != 0
        n += is_read
    return n


@compiled
def differentiate_rows(
    upstream,
    query,
    key,
    value,
    table_key,
    table_value,
    weights,
    slots,
    sizes,
    softcap,
    near,
    kept,
    slopes,
    capped,
    query_grad,
    key_grad,
    value_grad,
    table_key_grad,
    table_value_grad,
    sinks_grad,
):
    """Add a page's gradients in the scaled queries, the keys, the values (in both orders) and the sinks.

    `near`, `kept`, `slopes` and `capped` are room for one row: its keys, and per head their weights, the gradients in
    their scores, and what a softcap needs.
    """
    num_rows, group, head_dim = query.shape
    value_dim = value.shape[1]
    picked = np.empty(_BLOCK, np.int32)
    for r in range(num_rows):
        at_query, at_output = r * group * head_dim, r * group * value_dim
        m = _gather_read(weights, slots, r, 0, sizes[r, 0], near, kept, 0)
        _score(upstream, at_output, value, near, 0, m, slopes, 0)
        n = _gather_read(weights, slots, r, sizes[r, 1], sizes[r, 2], near, kept, m)
        _score(upstream, at_output, table_value, near, m, n, slopes, 0)
        for g in range(group):
            mean = rest = query.dtype.type(0)
            for i in range(n):
                mean += kept[0, g, i] * slopes[0, g, i]
                rest += kept[0, g, i]
            for i in range(n):
                slopes[0, g, i] = kept[0, g, i] * (slopes[0, g, i] - mean)
            if len(sinks_grad):
                sinks_grad[g] -= (1 - rest) * mean
        if softcap > 0:
            _score(query, at_query, table_key, near, m, n, capped, 0)
            for g in range(group):
                for i in range(m, n):
                    slopes[0, g, i] *= 1 - math.tanh(capped[0, g, i] / softcap) ** 2
            found = near[m : m + 3].copy()
            _score(query, at_query, key, near, 0, m, capped, 0)
            near[m : m + 3] = found
            for g in range(group):
                for i in range(m):
                    slopes[0, g, i] *= 1 - math.tanh(capped[0, g, i] / softcap) ** 2
        _add_outer(slopes, near, 0, m, query, at_query, key_grad)
        _add_outer(kept, near, 0, m, upstream, at_output, value_grad)
        _add_outer(slopes, near, m, n, query, at_query, table_key_grad)
        _add_outer(kept, near, m, n, upstream, at_output, table_value_grad)
        _sum_values(slopes, 0, 0, m, near, key, picked, query_grad, at_query)
        _sum_values(slopes, 0, m, n, near, table_key, picked, query_grad, at_query)
