"""Triton kernels of decoding steps: few rows that find their keys among many cached ones, without sorting any.

Every cached key has its bucket and its rank in it, the number of earlier keys there. What a row takes of a bucket are
the newest keys behind its window, ranks low .. high - 1, so that each key tells by itself whether it is taken, and its
place in the row's list: the keys of buckets before its own, and its rank. All of a row's list is written at once, in
the same order every time, for 8 bytes per key and KV head where attention to all keys reads hundreds.

Shapes: N cached keys in room for more, D head_dim, B buckets, Hkv KV heads, R rows at consecutive positions of one
page, G query heads per KV head. A list's columns are the window, static keys, random keys, and those that were found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_sparse_attn.ops.triton.attention import _scores
from hf_sparse_attn.ops.triton.routing import buckets_of, take_best


@triton.jit(do_not_specialize=["start", "stop", "room"])
def add_to_sums(
    key,
    key_head,
    key_row,
    bucket,
    sums,
    numbers,
    start,
    stop,
    room,
    NUM_BUCKETS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add the keys start .. stop - 1 to the sums [Hkv, B, D] and numbers [Hkv, B] of their buckets [Hkv, room]."""
    head = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    d = tl.arange(0, BLOCK_DIM)
    known = b < NUM_BUCKETS
    number_places = numbers + head * NUM_BUCKETS + b
    places = sums + (head * NUM_BUCKETS + b)[:, None] * HEAD_DIM + d[None, :]
    inside = known[:, None] & (d < HEAD_DIM)[None, :]
    number = tl.load(number_places, mask=known, other=0)
    total = tl.load(places, mask=inside, other=0.0)
    for low in range(start, stop, BLOCK):
        n = low + tl.arange(0, BLOCK)
        own = tl.load(bucket + head.to(tl.int64) * room + n, mask=n < stop, other=-1)
        x = tl.load(
            key + head.to(tl.int64) * key_head + n.to(tl.int64)[:, None] * key_row + d[None, :],
            mask=(n < stop)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        member = (b[:, None] == own[None, :]) & known[:, None]
        number += tl.sum(member.to(tl.int32), 1)
        total = tl.dot(member.to(x.dtype), x, total, input_precision=PRECISION, out_dtype=ACC)
    tl.store(number_places, number, mask=known)
    tl.store(places, total, mask=inside)


@triton.jit(do_not_specialize=["start", "stop", "room", "static_bits", "num_rows"])
def append_and_score(
    query,
    query_head,
    query_row,
    key,
    key_head,
    key_row,
    weight,
    bias,
    bucket,
    rank,
    counts,
    sums,
    numbers,
    scores,
    start,
    stop,
    room,
    static_bits,
    num_rows,
    NUM_BUCKETS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
    CODEBOOKS: tl.constexpr,
    CODEBOOKS_PADDED: tl.constexpr,
    CODE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program 0 of a head puts up to BLOCK new keys into their buckets, the others score the buckets for all rows.

    Args:
        query: [H, R, D].
        weight, bias: of the hash, as of `triton_routing.hash_keys`.
        bucket, rank: [Hkv, room], filled in for the keys start .. stop - 1.
        counts: [Hkv, B + 1], keys of each bucket, static ones last.
        sums, numbers: of the keys that the rows' page knows.
        scores: [Hkv, R, B], the group's summed query times the bucket's mean; -inf where the page knows no key.
        static_bits: bit i is set where the key start + i is static.
    """
    head = tl.program_id(1)
    if tl.program_id(0) == 0:
        i = tl.arange(0, BLOCK)
        n = start + i
        new = n < stop
        columns: tl.constexpr = CODEBOOKS * 2**CODE_BITS
        own = buckets_of(
            key + head.to(tl.int64) * key_head,
            key_row,
            n,
            stop,
            weight + head * HEAD_DIM * columns,
            bias + head * columns,
            HEAD_DIM,
            CODEBOOKS,
            CODEBOOKS_PADDED,
            CODE_BITS,
            BLOCK,
            BLOCK_K,
            ACC,
        )
        own = tl.where(((static_bits >> i) & 1) != 0, NUM_BUCKETS, own)
        place = counts + head * (NUM_BUCKETS + 1) + own
        same = (own[:, None] == own[None, :]) & new[None, :]
        before = tl.load(place, mask=new, other=0)
        own_rank = before + tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
        later = tl.sum((same & (i[None, :] > i[:, None])).to(tl.int32), 1)
        tl.debug_barrier()  # all have read the counts
        tl.store(place, own_rank + 1, mask=new & (later == 0))
        tl.store(bucket + head.to(tl.int64) * room + n, own, mask=new)
        tl.store(rank + head.to(tl.int64) * room + n, own_rank, mask=new)
        return
    b = (tl.program_id(0) - 1) * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    d = tl.arange(0, BLOCK_DIM)
    known = b < NUM_BUCKETS
    number = tl.load(numbers + head * NUM_BUCKETS + b, mask=known, other=0)
    inside = known[:, None] & (d < HEAD_DIM)[None, :]
    total = tl.load(sums + (head * NUM_BUCKETS + b)[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    mean = total / tl.maximum(number, 1).to(ACC)[:, None]
    for row in range(num_rows):
        summed = tl.zeros((BLOCK_DIM,), ACC)
        for member in tl.static_range(GROUP):
            place = (head * GROUP + member).to(tl.int64) * query_head + row * query_row
            summed += tl.load(query + place + d, mask=d < HEAD_DIM, other=0.0).to(ACC)
        score = tl.sum(mean * summed[None, :], 1)
        score = tl.where(number > 0, score, float("-inf"))
        tl.store(scores + (head * num_rows + row) * NUM_BUCKETS + b, score, mask=known)


@triton.jit(do_not_specialize=["room", "num_behind", "first_behind"])
def choose_ranks(
    scores,
    bucket,
    behind,
    behind_next,
    budgets,
    low,
    high,
    shift,
    num_found,
    room,
    num_behind,
    first_behind,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE_BITS: tl.constexpr,
):
    """Each row's buckets from the best down until its budget of keys is used: the ranks that it takes of each.

    Args:
        behind: [Hkv, B], how many of the first `num_behind` keys are in each bucket.
        behind_next: [Hkv, B], the same for the keys behind the last row's window, written.
        budgets: [Hkv].
        low, high, shift: [Hkv, R, B], the ranks low .. high - 1 are taken; a rank's place in the list is shift + rank.
        num_found: [Hkv, R].
        first_behind: keys behind the first row's window; under 0 while the window reaches over the first key.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    older = tl.load(behind + head * NUM_BUCKETS + b, mask=known, other=0)
    target = tl.maximum(first_behind + row, 0)
    bucket += head.to(tl.int64) * room
    for i in range(num_behind, target):
        older += ((b == tl.load(bucket + i)) & known).to(tl.int32)
    for i in range(target, num_behind):
        older -= ((b == tl.load(bucket + i)) & known).to(tl.int32)
    if row == tl.num_programs(0) - 1:
        tl.store(behind_next + head * NUM_BUCKETS + b, older, mask=known)
    place = head * tl.num_programs(0) + row
    score = tl.load(scores + place * NUM_BUCKETS + b, mask=known, other=float("-inf"))[None, :]
    available = tl.where(score > float("-inf"), older[None, :], 0)
    taken = tl.sum(take_best(score, available, tl.load(budgets + head), SCORE_BITS), 0)
    table = place * NUM_BUCKETS + b
    tl.store(low + table, older - taken, mask=known)
    tl.store(high + table, older, mask=known)
    tl.store(shift + table, tl.cumsum(taken, 0) - older, mask=known)
    tl.store(num_found + place, tl.sum(taken, 0))


@triton.jit(do_not_specialize=["room", "num_keys", "capacity"])
def list_found(
    bucket,
    rank,
    low,
    high,
    shift,
    found,
    room,
    num_keys,
    capacity,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found [Hkv, R, capacity]: the first `num_keys` keys, of those that each row takes."""
    head = tl.program_id(1)
    row = head * tl.num_programs(2) + tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(bucket + head.to(tl.int64) * room + n, mask=n < num_keys, other=NUM_BUCKETS)
    routed = own < NUM_BUCKETS
    own_rank = tl.load(rank + head.to(tl.int64) * room + n, mask=routed, other=0)
    table = row * NUM_BUCKETS + own
    taken = own_rank < tl.load(high + table, mask=routed, other=0)
    taken = taken & (own_rank >= tl.load(low + table, mask=routed, other=0)) & routed
    place = tl.load(shift + table, mask=taken, other=0) + own_rank
    tl.store(found + row * capacity + place, n, mask=taken)


@triton.jit(do_not_specialize=["key_offset", "first_row", "num_static", "max_found", "capacity"])
def score_listed(
    query,
    query_head,
    query_row,
    key,
    key_head,
    key_row,
    static,
    drawn,
    found,
    num_found,
    listed,
    scores,
    largest,
    weights,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    key_offset,
    first_row,
    window,
    num_static,
    max_found,
    capacity,
    NUM_RANDOM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores of all keys that the rows may read; each program takes BLOCK columns of a row's list.

    Args:
        query: [H, R, D], the first row at position `first_row`.
        static: [num_static], positions.
        drawn: [R, NUM_RANDOM], indices of random keys, -1 for none.
        found, num_found: [Hkv, R, max_found] and [Hkv, R].
        listed: [Hkv, R, capacity], the key of each column, 0 where there is none.
        scores: [Hkv, R, GROUP_PADDED, capacity], -inf where there is no key.
        largest, weights: [Hkv, R, programs, GROUP_PADDED], largest score of a program, and sum of exp(score - largest).
    """
    head = tl.program_id(1)
    row = tl.program_id(2)
    place = head * tl.num_programs(2) + row
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before_random = window + num_static
    before_found = before_random + NUM_RANDOM
    stop = before_found + tl.load(num_found + place)
    oldest = first_row + row - window + 1  # of the window
    index = oldest + c - key_offset
    is_static = (c >= window) & (c < before_random)
    index = tl.where(is_static, tl.load(static + c - window, mask=is_static, other=0) - key_offset, index)
    valid = (index >= 0) & ((c < window) | (is_static & (index + key_offset < oldest)))
    is_found = (c >= before_found) & (c < stop)
    index = tl.where(is_found, tl.load(found + place * max_found + c - before_found, mask=is_found, other=0), index)
    valid = valid | is_found
    for i in tl.static_range(NUM_RANDOM):
        own = tl.load(drawn + row * NUM_RANDOM + i) + tl.zeros((BLOCK,), tl.int32)
        valid = valid & ((index != own) | (c < before_random))  # found as well
        draws = (c == before_random + i) & (own >= 0)
        index = tl.where(draws, own, index)
        valid = valid | draws
    index = tl.where(valid, index, 0)
    m = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, BLOCK_DIM)
    heads = (head * GROUP + m).to(tl.int64)
    q = tl.load(
        query + heads[:, None] * query_head + row * query_row + d[None, :],
        mask=(m < GROUP)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    k = tl.load(
        key + head.to(tl.int64) * key_head + index.to(tl.int64)[None, :] * key_row + d[:, None],
        mask=valid[None, :] & (d < HEAD_DIM)[:, None],
        other=0.0,
    )
    score = _scores(q, k, scaling, softcap, SOFTCAP, PRECISION, ACC)
    score = tl.where(valid[None, :], score, float("-inf"))
    tl.store(listed + place * capacity + c, index)
    tl.store(scores + (place * GROUP_PADDED + m)[:, None] * capacity + c[None, :], score)
    top = tl.max(score, 1)
    weight = tl.sum(tl.exp(score - tl.where(top > float("-inf"), top, 0.0)[:, None]), 1)
    part = (place * tl.num_programs(0) + tl.program_id(0)) * GROUP_PADDED + m
    tl.store(largest + part, top)
    tl.store(weights + part, weight)


@triton.jit(do_not_specialize=["num_static", "num_parts", "capacity"])
def sum_listed(
    value,
    value_head,
    value_row,
    output,
    output_head,
    output_row,
    listed,
    scores,
    largest,
    weights,
    num_found,
    sinks,
    log_min_weight,
    window,
    num_static,
    num_parts,
    capacity,
    NUM_RANDOM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    DROP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """output [H, R, D] of the listed keys' values; each program takes BLOCK_VALUE_DIM of a value's numbers.

    Found keys of a weight under the head's smallest one are not read.
    """
    head = tl.program_id(1)
    row = tl.program_id(2)
    place = head * tl.num_programs(2) + row
    m = tl.arange(0, GROUP_PADDED)
    heads = head * GROUP + m
    inside = m < GROUP
    part = tl.arange(0, PARTS_PADDED)[:, None]
    parts = (place * num_parts + part) * GROUP_PADDED + m[None, :]
    tops = tl.load(largest + parts, mask=part < num_parts, other=float("-inf"))
    sink = tl.full((GROUP_PADDED,), float("-inf"), ACC)
    if SINKS:
        sink = tl.load(sinks + heads, mask=inside, other=float("-inf")).to(ACC)
    top = tl.maximum(tl.max(tops, 0), sink)
    part_weights = tl.load(weights + parts, mask=part < num_parts, other=0.0)
    logsumexp = top + tl.log(tl.sum(part_weights * tl.exp(tops - top[None, :]), 0) + tl.exp(sink - top))
    least = logsumexp
    if DROP:
        least = logsumexp + tl.load(log_min_weight + heads, mask=inside, other=float("-inf"))
    before_found = window + num_static + NUM_RANDOM
    stop = before_found + tl.load(num_found + place)
    e = tl.program_id(0) * BLOCK_VALUE_DIM + tl.arange(0, BLOCK_VALUE_DIM)
    weight = tl.exp(sink - logsumexp)
    summed = tl.zeros((GROUP_PADDED, BLOCK_VALUE_DIM), ACC)
    for low in range(0, stop, BLOCK):
        c = low + tl.arange(0, BLOCK)
        index = tl.load(listed + place * capacity + c)
        score = tl.load(scores + (place * GROUP_PADDED + m)[:, None] * capacity + c[None, :])
        p = tl.exp(score - logsumexp[:, None])
        if DROP:
            p = tl.where((c < before_found)[None, :] | (score >= least[:, None]), p, 0.0)
        weight += tl.sum(p, 1)
        v = tl.load(
            value + head.to(tl.int64) * value_head + index.to(tl.int64)[:, None] * value_row + e[None, :],
            mask=(e < VALUE_DIM)[None, :],
            other=0.0,
        )
        summed = tl.dot(p.to(v.dtype), v, summed, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        output + heads.to(tl.int64)[:, None] * output_head + row * output_row + e[None, :],
        (summed / weight[:, None]).to(output.dtype.element_ty),
        mask=inside[:, None] & (e < VALUE_DIM)[None, :],
    )
