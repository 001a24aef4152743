"""The compiled part of `ops.numba`: everything that is done row by row and key by key."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.ops.numba.compiled_files import cached
from hf_sparse_attn.ops.numba.simd import (
    LANES,
    add,
    add_if_at_least,
    drop_below,
    exp,
    highest_bit,
    lanes_at_least,
    largest,
    load,
    maximum,
    minimum,
    multiply_add,
    prefetch,
    smallest,
    splat,
    store,
    store_run,
    store_totals,
    total,
    whole_total,
    zeros,
)
from hf_sparse_attn.ops.numba.team import share

STAGES = ("bucket scores", "keys found", "key scores", "softmax", "values")  # of `attend_rows`
_FOUND, _SCORED, _WEIGHED, _ALL = range(1, len(STAGES))
_ADDED, _LEFT, _UPPER, _LOWER, _LISTED = range(5)  # places in State.reach
_BLOCK = 128  # columns, at most, whose values are read for one head after the other
_BLOCK_ELEMENTS = 8192  # of these values, which stay in the nearest cache meanwhile
_TOGETHER = 16  # lists that are followed at a time
_HIDDEN = -math.inf  # score of a column that holds no key
_SCORED_ROWS = 256  # of a page, whose buckets are scored at a time

Array = NDArray[Any]

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT turns off the compiler")

_OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},  # sums may be reordered; infinities and NaN stay what they are
}


def compiled(function):
    return cached(numba.njit(**_OPTIONS)(function))


def inlined(function):
    """A call that is not inlined counts the references to each array, one atomic operation after the other."""
    return cached(numba.njit(**_OPTIONS, forceinline=True)(function))


class Head(NamedTuple):
    """The inputs that all rows of one KV head of one document share.

    Args:
        key, value: [N, head_dim], head_dim filled up with zeros to a multiple of LANES.
        key_offset: position of the first key.
        static: sorted positions of the static keys, int64.
        bucket: [N] int32; keys that are never routed have the number of buckets.
        order: [N] int32, keys by bucket, oldest first; empty where `previous` is given.
        first: [num_buckets] int32, where each bucket begins in `order`; empty if nothing is routed.
        table_key, table_value: key[order], value[order]; key and value themselves where `previous` is given.
        previous: [N] int32, the key before each one in its bucket, -1 for the first; empty where `order` is given.
    """

    key: Array
    value: Array
    key_offset: int
    static: Array
    bucket: Array
    order: Array
    first: Array
    table_key: Array
    table_value: Array
    previous: Array


class State(NamedTuple):
    """The state of the buckets that rows may know; it moves on with them.

    Args:
        sums, counts: [num_buckets, head_dim] and [num_buckets]: sums and numbers of the keys before a row's page.
        upper: [num_buckets], keys that are older than a row's window.
        newest: [num_buckets] int32, index of the last one that is counted in `upper`, or -1.
        lower: [num_buckets], of these, keys that are outside of the model's own window.
        place: [num_buckets], where each bucket stands in the list of those with a count, or -1.
        listed: [C] int32, the list; C is at least num_buckets.
        means: [C / LANES, head_dim, LANES], of the list's buckets; what follows the list is finite.
        available: [C] int32, upper - lower, and 0 after the list.
        reach: [5] int64: how many keys have been added to sums, taken away again, counted in upper, and in lower; and
            the length of the list.
    """

    sums: Array
    counts: Array
    upper: Array
    newest: Array
    lower: Array
    place: Array
    listed: Array
    means: Array
    available: Array
    reach: Array


class Rules(NamedTuple):
    """The rules for what rows attend to; see `SparseAttentionConfig`.

    Args:
        means_lag: how much older than a page's first row the newest key is that its means know.
        min_weights, sinks: [group]; sinks [0] if there are none.
    """

    page_size: int
    window: int
    sliding_window: int
    means_lag: int
    budget: int
    min_weights: Array
    softcap: float
    sinks: Array


class Read(NamedTuple):
    """The keys that rows attended to.

    Args:
        weights: [R, group, C]; 0 for keys that were found and are not read.
        slots: [R, C] int32, index of each weight's key; of found keys, in the tables.
        sizes: [R, 3] int32: the columns up to the first number hold the fixed keys, from the second to the third the
            found ones.
    """

    weights: Array
    slots: Array
    sizes: Array


@inlined
def _forget_bucket(b, place, listed, means, available, reach):
    """Take a bucket off the list; the last one moves to its place."""
    reach[_LISTED] -= 1
    i, last = place[b], reach[_LISTED]
    moved = listed[last]
    listed[i], available[i] = moved, available[last]
    for d in range(means.shape[1]):
        means[i // LANES, d, i % LANES] = means[last // LANES, d, last % LANES]
    place[moved] = i
    place[b] = -1
    available[last] = 0


@compiled
def _add_keys(head, state, which, target, sign):
    """Add the keys before index `target` to their buckets (sign 1), or take them away (sign -1)."""
    key, bucket = head.key, head.bucket
    sums, counts, upper, _, lower, place, listed, means, available, reach = state
    head_dim, number = key.shape[1], sums.dtype.type
    factor = splat(number(sign))
    for j in range(reach[which], min(target, len(bucket))):
        b = bucket[j]
        if b == len(counts):
            continue
        counts[b] += sign
        for d in range(0, head_dim, LANES):
            store(
                sums, b * head_dim + d, multiply_add(factor, load(key, j * head_dim + d), load(sums, b * head_dim + d))
            )
        if counts[b] == 0:
            for d in range(head_dim):
                sums[b, d] = 0
        if counts[b] <= 0:  # less than 0 where keys leave a short window before their page knows them
            if place[b] >= 0:
                _forget_bucket(b, place, listed, means, available, reach)
            continue
        if place[b] < 0:
            i = reach[_LISTED]
            reach[_LISTED] += 1
            place[b], listed[i] = i, b
            available[i] = upper[b] - lower[b]
        scale = number(1) / number(counts[b])
        at = place[b] // LANES * head_dim * LANES + place[b] % LANES
        for d in range(head_dim):
            means.flat[at + d * LANES] = sums[b, d] * scale
    reach[which] = max(reach[which], min(target, len(bucket)))


@inlined
def _count_keys(bucket, which, target, counts, newest, place, available, reach):
    """Count the keys before index `target` as older than the window or as outside of the model's own."""
    for j in range(reach[which], min(target, len(bucket))):
        b = bucket[j]
        if b == len(counts):
            continue
        counts[b] += 1
        if which == _UPPER:
            newest[b] = j
        if place[b] >= 0:
            available[place[b]] += 1 if which == _UPPER else -1
    reach[which] = max(reach[which], min(target, len(bucket)))


@compiled
def move(head, state, rules, row):
    """Bring the state to the row at this position."""
    bucket, upper, newest, lower = head.bucket, state.upper, state.newest, state.lower
    place, available, reach = state.place, state.available, state.reach
    if len(place) == 0:
        return
    page = row // rules.page_size * rules.page_size - head.key_offset
    own_lag = rules.sliding_window - rules.page_size + 1
    _add_keys(head, state, _ADDED, page - rules.means_lag + 1, 1)
    _add_keys(head, state, _LEFT, page - own_lag + 1, -1)
    row -= head.key_offset
    _count_keys(bucket, _UPPER, row - rules.window + 1, upper, newest, place, available, reach)
    _count_keys(bucket, _LOWER, row - rules.sliding_window + 1, lower, newest, place, available, reach)


@inlined
def _score_buckets(summed, low, high, means, num_buckets, scores):
    """Products of summed[low:high] with the first means (at least num_buckets of them) into scores."""
    head_dim, width = summed.shape[1], scores.shape[1]
    for c in range(0, num_buckets, 2 * LANES):
        for r in range(low, high, 4):
            # Beyond the last row, that row again.
            second, third, fourth = min(r + 1, high - 1), min(r + 2, high - 1), min(r + 3, high - 1)
            a0 = a1 = b0 = b1 = c0 = c1 = e0 = e1 = zeros(scores)
            for d in range(head_dim):
                mean0, mean1 = load(means, c * head_dim + d * LANES), load(means, (c + LANES) * head_dim + d * LANES)
                query = splat(summed[r, d])
                a0, a1 = multiply_add(query, mean0, a0), multiply_add(query, mean1, a1)
                query = splat(summed[second, d])
                b0, b1 = multiply_add(query, mean0, b0), multiply_add(query, mean1, b1)
                query = splat(summed[third, d])
                c0, c1 = multiply_add(query, mean0, c0), multiply_add(query, mean1, c1)
                query = splat(summed[fourth, d])
                e0, e1 = multiply_add(query, mean0, e0), multiply_add(query, mean1, e1)
            store(scores, (r - low) * width + c, a0)
            store(scores, (r - low) * width + c + LANES, a1)
            store(scores, (second - low) * width + c, b0)
            store(scores, (second - low) * width + c + LANES, b1)
            store(scores, (third - low) * width + c, c0)
            store(scores, (third - low) * width + c + LANES, c1)
            store(scores, (fourth - low) * width + c, e0)
            store(scores, (fourth - low) * width + c + LANES, e1)


@inlined
def _score(query, at_query, key, slots, low, high, scores, at):
    """Products of a row's queries with the keys in columns low .. high - 1; up to three more are written too.

    The first head's columns begin at flat index `at`. Three slots after `high` are set as well. Three heads at
    a time fill the registers: each key is loaded once for them.
    """
    group, head_dim, width = query.shape[1], key.shape[1], scores.shape[2]
    for c in range(high, high + 3):
        slots[c] = 0
    for column in range(low, high, 4):
        first, second = slots[column] * head_dim, slots[column + 1] * head_dim
        third, fourth = slots[column + 2] * head_dim, slots[column + 3] * head_dim
        for g in range(0, group - 2, 3):
            a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = e0 = e1 = e2 = zeros(query)
            head = at_query + g * head_dim
            for d in range(0, head_dim, LANES):
                q0, q1 = load(query, head + d), load(query, head + head_dim + d)
                q2 = load(query, head + 2 * head_dim + d)
                k = load(key, first + d)
                a0, a1, a2 = multiply_add(q0, k, a0), multiply_add(q1, k, a1), multiply_add(q2, k, a2)
                k = load(key, second + d)
                b0, b1, b2 = multiply_add(q0, k, b0), multiply_add(q1, k, b1), multiply_add(q2, k, b2)
                k = load(key, third + d)
                c0, c1, c2 = multiply_add(q0, k, c0), multiply_add(q1, k, c1), multiply_add(q2, k, c2)
                k = load(key, fourth + d)
                e0, e1, e2 = multiply_add(q0, k, e0), multiply_add(q1, k, e1), multiply_add(q2, k, e2)
            to = at + g * width + column
            store_totals(scores, to, a0, b0, c0, e0)
            store_totals(scores, to + width, a1, b1, c1, e1)
            store_totals(scores, to + 2 * width, a2, b2, c2, e2)
        for g in range(group - group % 3, group):
            a = b = c = e = zeros(query)
            for d in range(0, head_dim, LANES):
                q = load(query, at_query + g * head_dim + d)
                a = multiply_add(q, load(key, first + d), a)
                b = multiply_add(q, load(key, second + d), b)
                c = multiply_add(q, load(key, third + d), c)
                e = multiply_add(q, load(key, fourth + d), e)
            store_totals(scores, at + g * width + column, a, b, c, e)


@inlined
def _fill(slots, n, start, number):
    """Write start, start + 1, ... to slots[n : n + number], and up to LANES - 1 more after them; returns n + number."""
    for i in range(0, number, LANES):
        store_run(slots, n + i, start + i)
    return n + number


@inlined
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


@inlined
def _pick(weights, at, low, high, picked):
    """Write the columns from low to high - 1 whose weight is not zero to `picked`; returns how many they are."""
    n = 0
    for c in range(low, high):
        picked[n] = c
        n += weights.flat[at + c] != 0
    return n


@inlined
def _sum_values(weights, at, low, high, slots, value, picked, output, at_output):
    """Add the weighted values of columns low .. high - 1 to every head's row of `output`.

    In blocks, so that values stay in the nearest cache from one head to the next.
    """
    group, width, value_dim = weights.shape[1], weights.shape[2], value.shape[1]
    num_columns = max(min(_BLOCK, _BLOCK_ELEMENTS // value_dim), 1)
    for block in range(low, high, num_columns):
        for g in range(group):
            picks = _pick(weights, at + g * width, block, min(block + num_columns, high), picked)
            _add_weighted(weights, at + g * width, picked, picks, slots, value, output, at_output + g * value_dim)


@inlined
def _sum_all_values(weights, at, low, high, slots, value, picked, output, at_output):
    """As `_sum_values`, for columns that nearly all heads read: three heads share a load of each value."""
    group, width, value_dim = weights.shape[1], weights.shape[2], value.shape[1]
    num_columns = max(min(_BLOCK, _BLOCK_ELEMENTS // value_dim), 1)
    for block in range(low, high, num_columns):
        stop = min(block + num_columns, high)
        for g in range(0, group - 2, 3):
            first, second, third = at + g * width, at + (g + 1) * width, at + (g + 2) * width
            for d in range(0, value_dim - 2 * LANES + 1, 2 * LANES):
                to = at_output + g * value_dim + d
                a0, a1 = load(output, to), load(output, to + LANES)
                b0, b1 = load(output, to + value_dim), load(output, to + value_dim + LANES)
                c0, c1 = load(output, to + 2 * value_dim), load(output, to + 2 * value_dim + LANES)
                for c in range(block, stop):
                    row = slots[c] * value_dim + d
                    v0, v1 = load(value, row), load(value, row + LANES)
                    weight = splat(weights.flat[first + c])
                    a0, a1 = multiply_add(weight, v0, a0), multiply_add(weight, v1, a1)
                    weight = splat(weights.flat[second + c])
                    b0, b1 = multiply_add(weight, v0, b0), multiply_add(weight, v1, b1)
                    weight = splat(weights.flat[third + c])
                    c0, c1 = multiply_add(weight, v0, c0), multiply_add(weight, v1, c1)
                store(output, to, a0)
                store(output, to + LANES, a1)
                store(output, to + value_dim, b0)
                store(output, to + value_dim + LANES, b1)
                store(output, to + 2 * value_dim, c0)
                store(output, to + 2 * value_dim + LANES, c1)
            if value_dim % (2 * LANES):
                for h in range(g, g + 3):
                    to, d = at_output + h * value_dim, value_dim - LANES
                    a0 = load(output, to + d)
                    for c in range(block, stop):
                        a0 = multiply_add(
                            splat(weights.flat[at + h * width + c]), load(value, slots[c] * value_dim + d), a0
                        )
                    store(output, to + d, a0)
        for g in range(group - group % 3, group):
            picks = _pick(weights, at + g * width, block, stop, picked)
            _add_weighted(weights, at + g * width, picked, picks, slots, value, output, at_output + g * value_dim)


@inlined
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


@inlined
def _lanes_between(scores, at, low, high):
    """The lanes from flat index `at` on with low <= score < high, as the bits of an integer."""
    score = load(scores, at)
    return lanes_at_least(score, splat(low)) & ~lanes_at_least(score, splat(high))


@inlined
def _bisect(scores, at, num_buckets, available, budget, low, high, number, enough):
    """Bring scores low < high together while buckets from `low` up hold the budget and those from `high` up do not.

    Stops when at most `enough` of the `number` buckets are between them, or only equal scores. Returns low, high, that
    number, and what buckets from `high` up hold.
    """
    one = splat(np.int32(1))
    num_high, held_high = 0, 0
    while number > enough:
        middle = low * scores.dtype.type(0.5) + high * scores.dtype.type(0.5)  # their difference may be infinite
        if not low < middle < high:
            break
        held = counted = zeros(available)
        threshold = splat(middle)
        for c in range(0, num_buckets, LANES):
            score = load(scores, at + c)
            held = add_if_at_least(held, load(available, c), score, threshold)
            counted = add_if_at_least(counted, one, score, threshold)
        num_middle, held_middle = whole_total(counted), whole_total(held)
        if held_middle >= budget:
            low, number = middle, num_middle - num_high
        else:
            high, number = middle, number + num_high - num_middle
            num_high, held_high = num_middle, held_middle
    return low, high, number, held_high


@inlined
def _cut(scores, at, num_buckets, available, budget, few_scores, few_available):
    """Scores low < high: buckets from `high` up hold less than the budget, those from `low` up at least the budget.

    Between them lie one bucket or some of equal score. If all buckets together are within the budget, both are
    -infinity. The last two arguments are room for LANES * 2 buckets.
    """
    infinity = scores.dtype.type(math.inf)
    most = least = load(scores, at)
    held = zeros(available)
    for c in range(0, num_buckets, LANES):
        score = load(scores, at + c)
        most, least = maximum(score, most), minimum(score, least)
        held = add_if_at_least(held, load(available, c), score, splat(-infinity))
    if whole_total(held) <= budget:
        return -infinity, -infinity
    low, high = smallest(least), np.nextafter(largest(most), infinity)
    low, high, number, held_high = _bisect(
        scores, at, num_buckets, available, budget, low, high, num_buckets, len(few_scores)
    )
    if 1 < number <= len(few_scores):
        n = 0
        for c in range(0, num_buckets, LANES):
            lanes = _lanes_between(scores, at + c, low, high)
            while lanes:
                lane = highest_bit(lanes)
                lanes ^= 1 << lane
                few_scores[n], few_available[n] = scores.flat[at + c + lane], available[c + lane]
                n += 1
        few_scores[n:] = -infinity
        low, high, _, _ = _bisect(few_scores, 0, len(few_scores), few_available, budget - held_high, low, high, n, 1)
    return low, high


@inlined
def _take(i, listed, available, first, upper, previous, newest, slots, n, stop, chains, num_chains):
    """Append the newest keys of the list's bucket i, until there are `stop` slots; returns the new number.

    Linked keys are only noted: chains [3, C] get their newest key, their number and the last of their slots.
    """
    b, taken = listed[i], min(available[i], stop - n)
    if len(previous) == 0:
        return _fill(slots, n, first[b] + upper[b] - taken, taken)
    chains[0, num_chains], chains[1, num_chains], chains[2, num_chains] = newest[b], taken, n + taken - 1
    return n + taken


@inlined
def _bring(weights, at, low, high, slots, value):
    """Prefetch the values of columns low .. high - 1 that any head reads, as they are all over the memory."""
    group, width, value_dim, line = weights.shape[1], weights.shape[2], value.shape[1], 64 // value.itemsize
    for c in range(low, high):
        is_read = False
        for g in range(group):
            is_read |= weights.flat[at + g * width + c] != 0
        if is_read:
            for d in range(0, value_dim, line):
                prefetch(value, slots[c] * value_dim + d)


@inlined
def _follow(chains, num_chains, previous, slots, key):
    """Write the linked keys of the chains to their slots: several chains at a time, as each step waits for memory."""
    head_dim, line = key.shape[1], 64 // key.itemsize
    for low in range(0, num_chains, _TOGETHER):
        high = min(low + _TOGETHER, num_chains)
        going = True
        while going:
            going = False
            for c in range(low, high):
                if chains[1, c] > 0:
                    j, going = chains[0, c], True
                    slots[chains[2, c]] = j
                    for d in range(0, head_dim, line):
                        prefetch(key, j * head_dim + d)
                    chains[0, c] = previous[j]
                    chains[1, c] -= 1
                    chains[2, c] -= 1


@inlined
def _find(
    scores,
    at,
    num_buckets,
    place,
    listed,
    available,
    first,
    upper,
    previous,
    newest,
    budget,
    slots,
    n,
    few_scores,
    few_available,
    tied,
    key,
    chains,
):
    """Append the keys of a row's best buckets to its slots, the newest of the last bucket; returns the new number.

    The row's scores of the list's buckets begin at flat index `at`. Of equal scores, the larger bucket's number wins.
    """
    low, high = _cut(scores, at, num_buckets, available, budget, few_scores, few_available)
    num_tied, num_chains, stop = 0, 0, n + budget
    for c in range(0, num_buckets, LANES):
        lanes = lanes_at_least(load(scores, at + c), splat(high))
        while lanes:
            lane = highest_bit(lanes)
            lanes ^= 1 << lane
            n = _take(c + lane, listed, available, first, upper, previous, newest, slots, n, stop, chains, num_chains)
            num_chains += 1
        lanes = _lanes_between(scores, at + c, low, high)
        while lanes:
            lane = highest_bit(lanes)
            lanes ^= 1 << lane
            if available[c + lane]:
                tied[num_tied] = listed[c + lane]
                num_tied += 1
    if num_tied > 1:
        tied[:num_tied].sort()
    for i in range(num_tied - 1, -1, -1):
        at_list = np.int64(place[tied[i]])
        n = _take(at_list, listed, available, first, upper, previous, newest, slots, n, stop, chains, num_chains)
        num_chains += 1
    if len(previous):
        _follow(chains, num_chains, previous, slots, key)
    return n


@compiled
def attend_rows(position, query, summed, head, state, rules, drawn, output, output_stride, read, keep, last_stage):
    """Rows at consecutive positions. Columns: static keys, window, random keys; then the found keys.

    Args:
        position: of the first row; the state is moved to the last one.
        query: [R, group, head_dim], scaled.
        summed: [R, head_dim], sums over the group.
        drawn: [R, number of random keys], indices, -1 where there is none.
        output: flat; row r's [group, head_dim] begins at r * output_stride.
        read: is written; holds all rows if `keep`, else it is room for one.
        last_stage: index in STAGES of the last that is computed.
    """
    num_rows, group, head_dim = query.shape
    key, value, key_offset, static, bucket, order, first, table_key, table_value, previous = head
    _, _, upper, newest, lower, place, listed, means, available, reach = state
    page_size, window, sliding_window, _, budget, min_weights, softcap, sinks = rules
    all_weights, all_slots, sizes = read
    width, value_dim = all_weights.shape[2], value.shape[1]
    num_buckets = first_scored = oldest_static = newest_static = 0
    scores = np.empty((min(page_size, num_rows, _SCORED_ROWS), len(available)), query.dtype)
    few_scores, few_available = np.empty(2 * LANES, query.dtype), np.empty(2 * LANES, np.int32)
    tied = np.empty(len(listed), np.int32)
    chains = np.empty((3, len(listed) if len(previous) else 0), np.int32)
    picked = np.empty(_BLOCK, np.int32)
    sums = np.empty(group, query.dtype)
    for r in range(num_rows):
        p = position + r
        if r == 0 or p % page_size == 0 or r - first_scored == len(scores):
            move(head, state, rules, p)
            num_buckets, first_scored = -(-reach[_LISTED] // LANES) * LANES, r
            stop = min(r + page_size - p % page_size, r + len(scores), num_rows)
            _score_buckets(summed, r, stop, means, num_buckets, scores)
        if last_stage < _FOUND:
            continue
        slots = all_slots[r if keep else 0]
        at = r * group * width if keep else 0
        at_query = r * group * head_dim
        oldest = max(p - sliding_window + 1, key_offset)
        n = 0
        # Static keys older than the window.
        while newest_static < len(static) and static[newest_static] <= p - window:
            newest_static += 1
        while oldest_static < newest_static and static[oldest_static] < oldest:
            oldest_static += 1
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
        if last_stage > _FOUND:
            _score(query, at_query, key, slots, 0, num_fixed, all_weights, at)
        n = first_found = -(-n // LANES) * LANES
        if len(place):
            own = p - key_offset
            _count_keys(bucket, _UPPER, own - window + 1, upper, newest, place, available, reach)
            _count_keys(bucket, _LOWER, own - sliding_window + 1, lower, newest, place, available, reach)
        if num_buckets:
            n = _find(
                scores,
                (r - first_scored) * scores.shape[1],
                num_buckets,
                place,
                listed,
                available,
                first,
                upper,
                previous,
                newest,
                budget,
                slots,
                n,
                few_scores,
                few_available,
                tied,
                key,
                chains,
            )
        for i in range(drawn.shape[1]):  # what is a random key already does not count as found
            if drawn[r, i] >= 0:
                for c in range(first_found, n):
                    if (slots[c] if len(previous) else order[slots[c]]) == drawn[r, i]:
                        n -= 1
                        slots[c] = slots[n]
                        break
        if last_stage < _SCORED:
            continue
        _score(query, at_query, table_key, slots, first_found, n, all_weights, at)
        if last_stage < _WEIGHED:
            continue
        if softcap > 0:
            for g in range(group):
                for c in range(at + g * width, at + g * width + n):
                    all_weights.flat[c] = softcap * math.tanh(all_weights.flat[c] / softcap)
        for g in range(group):
            sums[g] = _softmax(all_weights, at + g * width, num_fixed, first_found, n, sinks, g, min_weights[g])
        if last_stage == _ALL:
            at_output = r * output_stride
            output[at_output : at_output + group * value_dim] = 0
            if len(previous):
                _bring(all_weights, at, first_found, n, slots, table_value)
            _sum_all_values(all_weights, at, 0, num_fixed, slots, value, picked, output, at_output)
            _sum_values(all_weights, at, first_found, n, slots, table_value, picked, output, at_output)
            for g in range(group):
                for d in range(at_output + g * value_dim, at_output + (g + 1) * value_dim):
                    output[d] /= sums[g]
        if keep:
            for g in range(group):
                for c in range(at + g * width, at + g * width + n):
                    all_weights.flat[c] /= sums[g]
            sizes[r, 0], sizes[r, 1], sizes[r, 2] = num_fixed, first_found, n


@compiled
def count_read(read):
    """How many keys all rows read, by head [group] int64, and scored."""
    weights, _, sizes = read
    group = weights.shape[1]
    num_read, num_scored = np.zeros(group, np.int64), 0
    for r in range(len(sizes)):
        num_fixed, low, high = sizes[r]
        num_scored += num_fixed + high - low
        for g in range(group):
            n = num_fixed
            for c in range(low, high):
                n += weights[r, g, c] != 0
            num_read[g] += n
    return num_read, num_scored


@compiled
def hash_keys(key, weight, bias, codebook_size, bucket, start):
    """`BucketHash.assign` of a few keys [num_key_value_heads, n, head_dim] into bucket[:, start : start + n].

    weight: [num_key_value_heads, head_dim, num_codebooks * codebook_size]; bias: the same without head_dim.
    """
    for h in range(len(key)):
        for i in range(key.shape[1]):
            scores = bias[h].copy()
            for d in range(key.shape[2]):
                for c in range(len(scores)):
                    scores[c] += key[h, i, d] * weight[h, d, c]
            number = 0
            for first in range(0, len(scores), codebook_size):
                best = first
                for c in range(first + 1, first + codebook_size):
                    if scores[c] > scores[best]:
                        best = c
                number = number * codebook_size + best - first
            bucket[h, start + i] = number


@compiled
def link_keys(bucket, previous, tail, start, stop):
    """Append the keys start .. stop - 1 to the lists of their buckets, which `tail` [num_key_value_heads, num_buckets]
    ends; `bucket` and `previous` are [num_key_value_heads, N]."""
    for h in range(len(bucket)):
        for j in range(start, stop):
            b = bucket[h, j]
            if b < tail.shape[1]:
                previous[h, j] = tail[h, b]
                tail[h, b] = j


@compiled
def unlink_keys(bucket, previous, tail, start, stop):
    """Take the keys start .. stop - 1 off their lists again."""
    for h in range(len(bucket)):
        for j in range(stop - 1, start - 1, -1):
            if bucket[h, j] < tail.shape[1]:
                tail[h, bucket[h, j]] = previous[h, j]


@compiled
def move_back(bucket, previous, states, num_older, first_of_page):
    """Bring the states of all KV heads back to a row with `num_older` keys older than its window.

    A state whose means know keys from `first_of_page` on, which the row's may not, begins anew: sums cannot be taken
    apart to the last bit.
    """
    num_buckets = states.upper.shape[1]
    for h in range(len(bucket)):
        reach = states.reach[h]
        if reach[_ADDED] > max(first_of_page, 0) or reach[_LEFT] or reach[_LOWER]:
            states.sums[h] = 0
            states.counts[h] = states.upper[h] = states.lower[h] = states.available[h] = 0
            states.newest[h] = states.place[h] = -1
            reach[:] = 0
            continue
        while reach[_UPPER] > max(num_older, 0):
            reach[_UPPER] -= 1
            j = reach[_UPPER]
            b = bucket[h, j]
            if b < num_buckets:
                states.upper[h, b] -= 1
                states.newest[h, b] = previous[h, j]
                if states.place[h, b] >= 0:
                    states.available[h, states.place[h, b]] -= 1


@compiled
def _attend_head(
    h, position, query, summed, keys, key_offset, static, index, rules, budgets, drawn, output, read, keep
):
    """The part of the KV head `h`."""
    num_heads, _, group, head_dim = query.shape
    num_keys, flat_key, flat_value, key_step, value_step, value_dim = keys
    bucket, previous, states = index
    no_order = np.empty(0, np.int32)
    num_buckets = states.upper.shape[1] if budgets[h] else 0
    key = flat_key[h * key_step :][: num_keys * head_dim].reshape(num_keys, head_dim)
    value = flat_value[h * value_step :][: num_keys * value_dim].reshape(num_keys, value_dim)
    head = Head(
        key,
        value,
        key_offset,
        static,
        bucket[h, :num_keys],
        no_order,
        no_order,
        key,
        value,
        previous[h, :num_keys],
    )
    state = State(
        states.sums[h],
        states.counts[h],
        states.upper[h],
        states.newest[h],
        states.lower[h],
        states.place[h][:num_buckets],
        states.listed[h],
        states.means[h],
        states.available[h],
        states.reach[h],
    )
    own = Rules(
        rules.page_size,
        rules.window,
        rules.sliding_window,
        rules.means_lag,
        budgets[h],
        rules.min_weights[h],
        rules.softcap,
        rules.sinks[h],
    )
    own_read = Read(read.weights[h], read.slots[h], read.sizes[h])
    flat = output[h * group * value_dim :]
    attend_rows(
        position,
        query[h],
        summed[h],
        head,
        state,
        own,
        drawn,
        flat,
        num_heads * group * value_dim,
        own_read,
        keep,
        _ALL,
    )


@compiled
def attend_heads(
    team, position, query, summed, keys, key_offset, static, index, rules, budgets, drawn, output, read, keep
):
    """`attend_rows` for a document whose keys are linked by bucket, KV head by KV head.

    Args:
        team: what `team.own_team` gives; its threads share the heads.
        position: of the first row.
        query: [num_key_value_heads, R, group, head_dim], scaled.
        summed: [num_key_value_heads, R, head_dim].
        keys: (N, flat keys, flat values, steps of both from one KV head to the next, size of a value); as `simd.load`
            takes them.
        key_offset, static: as of `Head`.
        index: (bucket, previous, states): [num_key_value_heads, N or more] each, and a State of all KV heads.
        rules: Rules with min_weights and sinks of all KV heads.
        budgets: [num_key_value_heads].
        drawn: as for `attend_rows`.
        output: flat [R, num_key_value_heads, group, head_dim].
        read: Read of all KV heads; room for R rows of each if `keep`, else for one.
    """
    others = (position, query, summed, keys, key_offset, static, index, rules, budgets, drawn, output, read, keep)
    share(team, len(query), _attend_head, others)
