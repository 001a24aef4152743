"""Triton kernels of the attention over listed keys: forward, and the gradients of queries, keys and values.

A program takes a tile of rows of all query heads that share a KV head, so every key is loaded once for M = ROWS *
GROUP_PADDED (row, head) pairs; `triton_routing.list_keys` says which row scores it. Gradients of keys are summed by
programs that own the keys, in a fixed order: no atomics, so that the same inputs give the same gradients.

Keys found through buckets whose softmax weight among all that a row scored is under the head's `min_weight` are not
read: a first pass over the keys finds the logsumexp, a second one the output (one pass where nothing is dropped).

Shapes: query, output [H, R, D] with the first row at position `start`; key, value [Hkv, N, D]; per (head, row) tables
[H, R] in the dtype that is accumulated in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_sparse_attn.ops.triton.routing import tile_rows


@triton.jit
def _pairs(
    tile, head, base, start, end, page_size, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """For each of the tile's M pairs: row in the tile, local row, position, query head, and whether it is computed."""
    m = tl.arange(0, ROWS * GROUP_PADDED)
    r = m // GROUP_PADDED
    member = m % GROUP_PADDED
    local, computed = tile_rows(tile, r, base, start, end, page_size, ROWS)
    return r, local, base + local, head * GROUP + member, computed & (member < GROUP)


@triton.jit
def _load_rows(x, head_stride, row_stride, head, row, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[M, BLOCK_DIM]: rows `row` of heads `head`."""
    d = tl.arange(0, BLOCK_DIM)
    place = head.to(tl.int64) * head_stride + row.to(tl.int64) * row_stride
    return tl.load(x + place[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(x, head_stride, row_stride, head, row, inside, values, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    d = tl.arange(0, BLOCK_DIM)
    place = head.to(tl.int64) * head_stride + row.to(tl.int64) * row_stride
    values = values.to(x.dtype.element_ty)
    tl.store(x + place[:, None] + d[None, :], values, mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def _cap(scores, softcap: tl.constexpr):
    """softcap * tanh(scores / softcap)."""
    return softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))


@triton.jit
def _scores(
    q,
    k,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores [M, C] of queries [M, D] on keys k [D, C]."""
    score = tl.dot(q, k, input_precision=PRECISION, out_dtype=ACC) * scaling
    if SOFTCAP:
        score = _cap(score, softcap)
    return score


@triton.jit
def _listed(keys, rows, place, c, stop, r):
    """Indices [C] of the listed keys at the columns c, and which pairs [M, C] score them."""
    index = tl.load(keys + place + c, mask=c < stop, other=0)
    taken = tl.load(rows + place + c, mask=c < stop, other=0)
    return index, ((taken[None, :] >> r[:, None]) & 1) != 0


@triton.jit(do_not_specialize=["base", "start", "end", "num_rows", "num_tiles"])
def attend(
    query,
    query_head,
    query_row,
    key,
    key_head,
    key_row,
    value,
    value_head,
    value_row,
    output,
    output_head,
    output_row,
    keys,
    rows,
    fixed,
    total,
    sinks,
    log_min_weight,
    logsumexp,
    least,
    kept,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    base,
    start,
    end,
    num_rows,
    num_tiles,
    page_size,
    capacity,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DROP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Exact softmax attention of a tile's rows over the listed keys that are theirs.

    Args:
        log_min_weight: [H], logarithm of the smallest weight of a found key.
        logsumexp: [H, R], of the scores that are read, the sink's included.
        least: [H, R], score under which a found key is not read.
        kept: [Hkv, tiles, M, capacity] int8, set where a pair reads the key, if KEEP.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    r, _, position, heads, inside = _pairs(tile, head, base, start, end, page_size, GROUP, GROUP_PADDED, ROWS)
    q = _load_rows(query, query_head, query_row, heads, position - start, inside, HEAD_DIM, BLOCK_DIM)
    list_ = (head * num_tiles + tile).to(tl.int64)
    num_fixed = tl.load(fixed + list_)
    stop = tl.load(total + list_)
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_VALUE_DIM)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * value_head
    largest = tl.full((ROWS * GROUP_PADDED,), float("-inf"), ACC)
    if SINKS:
        largest = tl.load(sinks + heads, mask=inside, other=float("-inf")).to(ACC)
    sink = largest
    least_row = largest
    if DROP:
        weight = tl.where(largest > float("-inf"), 1.0, 0.0).to(ACC)
        for low in range(0, stop, BLOCK):
            c = low + tl.arange(0, BLOCK)
            index, valid = _listed(keys, rows, list_ * capacity, c, stop, r)
            k = tl.load(
                key + index.to(tl.int64)[None, :] * key_row + d[:, None], mask=(d < HEAD_DIM)[:, None], other=0.0
            )
            score = _scores(q, k, scaling, softcap, SOFTCAP, PRECISION, ACC)
            score = tl.where(valid, score, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            shift = tl.where(higher > float("-inf"), higher, 0.0)
            weight = weight * tl.exp(largest - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
            largest = higher
        minimum = tl.load(log_min_weight + heads, mask=inside, other=float("-inf"))
        least_row = largest + tl.log(tl.where(weight > 0, weight, 1.0)) + minimum
    shift = tl.where(largest > float("-inf"), largest, 0.0)
    weight = tl.exp(sink - shift)  # 0 without a sink
    summed = tl.zeros((ROWS * GROUP_PADDED, BLOCK_VALUE_DIM), ACC)
    for low in range(0, stop, BLOCK):
        c = low + tl.arange(0, BLOCK)
        index, valid = _listed(keys, rows, list_ * capacity, c, stop, r)
        k = tl.load(key + index.to(tl.int64)[None, :] * key_row + d[:, None], mask=(d < HEAD_DIM)[:, None], other=0.0)
        v = tl.load(
            value + index.to(tl.int64)[:, None] * value_row + e[None, :], mask=(e < VALUE_DIM)[None, :], other=0.0
        )
        score = _scores(q, k, scaling, softcap, SOFTCAP, PRECISION, ACC)
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
        if KEEP:
            m = tl.arange(0, ROWS * GROUP_PADDED)
            place = (list_ * ROWS * GROUP_PADDED + m)[:, None] * capacity + c[None, :]
            tl.store(kept + place, (valid & inside[:, None]).to(tl.int8), mask=(c < stop)[None, :])
    weight = tl.where(weight > 0, weight, 1.0)
    _store_rows(
        output,
        output_head,
        output_row,
        heads,
        position - start,
        inside,
        summed / weight[:, None],
        VALUE_DIM,
        BLOCK_VALUE_DIM,
    )
    place = heads.to(tl.int64) * num_rows + position - start
    tl.store(logsumexp + place, shift + tl.log(weight), mask=inside)
    if DROP:
        tl.store(least + place, least_row, mask=inside)


@triton.jit
def _of_rows(logsumexp, least, delta, place, inside, DROP: tl.constexpr):
    """What the forward left of each pair: [M] three times; the second has no meaning where nothing is dropped."""
    lse = tl.load(logsumexp + place, mask=inside, other=0.0)
    low_score = lse
    if DROP:
        low_score = tl.load(least + place, mask=inside, other=0.0)
    return lse, low_score, tl.load(delta + place, mask=inside, other=0.0)


@triton.jit
def _weights(
    q,
    k,
    valid,
    droppable,
    logsumexp,
    least,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    DROP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Softmax weights [M, C] of queries [M, D] on keys k [D, C], and a score's derivative in its scaled product."""
    score = _scores(q, k, scaling, softcap, SOFTCAP, PRECISION, ACC)
    slope = tl.full(score.shape, 1.0, ACC)
    if SOFTCAP:
        slope = 1 - (score / softcap) * (score / softcap)
    if DROP:
        valid = valid & ((score >= least[:, None]) | (droppable == 0))
    return tl.where(valid, tl.exp(score - logsumexp[:, None]), 0.0), slope


@triton.jit(do_not_specialize=["base", "start", "end", "num_rows", "num_tiles"])
def differentiate_queries(
    query,
    query_head,
    query_row,
    key,
    key_head,
    key_row,
    value,
    value_head,
    value_row,
    upstream,
    upstream_head,
    upstream_row,
    keys,
    rows,
    fixed,
    total,
    logsumexp,
    least,
    delta,
    grad,
    grad_head,
    grad_row,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    base,
    start,
    end,
    num_rows,
    num_tiles,
    page_size,
    capacity,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DROP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of the queries; delta [H, R] is the product of each row's output and the gradient `upstream` of it."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    r, _, position, heads, inside = _pairs(tile, head, base, start, end, page_size, GROUP, GROUP_PADDED, ROWS)
    row = position - start
    q = _load_rows(query, query_head, query_row, heads, row, inside, HEAD_DIM, BLOCK_DIM)
    g = _load_rows(upstream, upstream_head, upstream_row, heads, row, inside, VALUE_DIM, BLOCK_VALUE_DIM)
    lse, low_score, product = _of_rows(logsumexp, least, delta, heads.to(tl.int64) * num_rows + row, inside, DROP)
    list_ = (head * num_tiles + tile).to(tl.int64)
    num_fixed = tl.load(fixed + list_)
    stop = tl.load(total + list_)
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_VALUE_DIM)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * value_head
    summed = tl.zeros((ROWS * GROUP_PADDED, BLOCK_DIM), ACC)
    for low in range(0, stop, BLOCK):
        c = low + tl.arange(0, BLOCK)
        index, valid = _listed(keys, rows, list_ * capacity, c, stop, r)
        k = tl.load(key + index.to(tl.int64)[:, None] * key_row + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(
            value + index.to(tl.int64)[None, :] * value_row + e[:, None], mask=(e < VALUE_DIM)[:, None], other=0.0
        )
        droppable = (c >= num_fixed).to(tl.int32)[None, :]
        p, slope = _weights(
            q, tl.trans(k), valid, droppable, lse, low_score, scaling, softcap, DROP, SOFTCAP, PRECISION, ACC
        )
        change = p * (tl.dot(g, v, input_precision=PRECISION, out_dtype=ACC) - product[:, None]) * slope
        summed = tl.dot(change.to(k.dtype), k, summed, input_precision=PRECISION, out_dtype=ACC)
    _store_rows(grad, grad_head, grad_row, heads, row, inside, summed * scaling, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _key_gradients(
    query,
    query_head,
    query_row,
    upstream,
    upstream_head,
    upstream_row,
    logsumexp,
    least,
    delta,
    heads,
    row,
    inside,
    k,
    v,
    valid,
    droppable,
    key_grad,
    value_grad,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    DROP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add a tile's part to the gradients [C, D] of keys k and values v, [C, D], where `valid` [M, C]."""
    q = _load_rows(query, query_head, query_row, heads, row, inside, HEAD_DIM, BLOCK_DIM)
    g = _load_rows(upstream, upstream_head, upstream_row, heads, row, inside, VALUE_DIM, BLOCK_VALUE_DIM)
    lse, low_score, product = _of_rows(logsumexp, least, delta, heads.to(tl.int64) * num_rows + row, inside, DROP)
    p, slope = _weights(
        q, tl.trans(k), valid, droppable, lse, low_score, scaling, softcap, DROP, SOFTCAP, PRECISION, ACC
    )
    value_grad = tl.dot(tl.trans(p.to(g.dtype)), g, value_grad, input_precision=PRECISION, out_dtype=ACC)
    change = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC) - product[:, None]) * slope
    key_grad = tl.dot(tl.trans(change.to(q.dtype)), q, key_grad, input_precision=PRECISION, out_dtype=ACC)
    return key_grad, value_grad


@triton.jit
def _add(table, head, index, inside, number, values, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """table[head, index] += values, of [Hkv, number, DIM]; nobody else writes to these keys now."""
    d = tl.arange(0, BLOCK_DIM)
    place = table + (head.to(tl.int64) * number + index)[:, None] * DIM + d[None, :]
    mask = inside[:, None] & (d < DIM)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + values, mask=mask)


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_rows"])
def differentiate_window(
    query,
    query_head,
    query_row,
    key,
    key_head,
    key_row,
    value,
    value_head,
    value_row,
    upstream,
    upstream_head,
    upstream_row,
    logsumexp,
    least,
    delta,
    key_grad,
    value_grad,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_rows,
    page_size,
    window,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of keys and values [Hkv, N, D] from the rows that have them in their window; blocks of positions."""
    head = tl.program_id(1)
    low = tl.maximum(start - window + 1, key_offset) + tl.program_id(0) * BLOCK
    j = low + tl.arange(0, BLOCK)
    known = j < end
    index = j - key_offset
    heads_of_keys = tl.zeros((BLOCK,), tl.int32) + head
    k = _load_rows(key, key_head, key_row, heads_of_keys, index, known, HEAD_DIM, BLOCK_DIM)
    v = _load_rows(value, value_head, value_row, heads_of_keys, index, known, VALUE_DIM, BLOCK_VALUE_DIM)
    key_sum = tl.zeros((BLOCK, BLOCK_DIM), ACC)
    value_sum = tl.zeros((BLOCK, BLOCK_VALUE_DIM), ACC)
    per_page = tl.cdiv(page_size, ROWS)
    first = tl.maximum(low, start) - base
    last = tl.minimum(low + BLOCK + window - 1, end) - 1 - base
    first_tile = (first // page_size) * per_page + (first % page_size) // ROWS
    last_tile = (last // page_size) * per_page + (last % page_size) // ROWS
    for tile in range(first_tile, last_tile + 1):
        _, _, position, heads, inside = _pairs(tile, head, base, start, end, page_size, GROUP, GROUP_PADDED, ROWS)
        valid = (j[None, :] <= position[:, None]) & (j[None, :] > position[:, None] - window)
        valid = valid & inside[:, None] & known[None, :]
        key_sum, value_sum = _key_gradients(
            query,
            query_head,
            query_row,
            upstream,
            upstream_head,
            upstream_row,
            logsumexp,
            least,
            delta,
            heads,
            position - start,
            inside,
            k,
            v,
            valid,
            0,
            key_sum,
            value_sum,
            scaling,
            softcap,
            num_rows,
            HEAD_DIM,
            BLOCK_DIM,
            VALUE_DIM,
            BLOCK_VALUE_DIM,
            False,
            SOFTCAP,
            PRECISION,
            ACC,
        )
    _add(key_grad, head, index, known, num_keys, key_sum * scaling, HEAD_DIM, BLOCK_DIM)
    _add(value_grad, head, index, known, num_keys, value_sum, VALUE_DIM, BLOCK_VALUE_DIM)


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_rows", "num_local", "num_tiles"])
def differentiate_older(
    query,
    query_head,
    query_row,
    key,
    key_head,
    key_row,
    value,
    value_head,
    value_row,
    upstream,
    upstream_head,
    upstream_row,
    bucket,
    order,
    words,
    cut,
    drawn,
    tiles,
    num_reading,
    logsumexp,
    least,
    delta,
    key_grad,
    value_grad,
    scaling: tl.constexpr,
    softcap: tl.constexpr,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_rows,
    num_local,
    num_tiles,
    page_size,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DROP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of keys and values from the rows that read them outside their window; blocks of slots of `order`."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    known = slot < num_keys
    index = tl.load(order + head * num_keys + slot, mask=known, other=0)
    own_bucket = tl.load(bucket + head * num_keys + index, mask=known, other=0)
    routable = known & (own_bucket < NUM_BUCKETS)
    is_static = known & (own_bucket == NUM_BUCKETS)
    j = index + key_offset
    heads_of_keys = tl.zeros((BLOCK,), tl.int32) + head
    k = _load_rows(key, key_head, key_row, heads_of_keys, index, known, HEAD_DIM, BLOCK_DIM)
    v = _load_rows(value, value_head, value_row, heads_of_keys, index, known, VALUE_DIM, BLOCK_VALUE_DIM)
    key_sum = tl.zeros((BLOCK, BLOCK_DIM), ACC)
    value_sum = tl.zeros((BLOCK, BLOCK_VALUE_DIM), ACC)
    place = (head * tl.num_programs(0) + block).to(tl.int64)
    count = tl.load(num_reading + place)
    if count == 0:
        return
    for i in range(count):
        tile = tl.load(tiles + place * num_tiles + i)
        _, local, position, heads, inside = _pairs(tile, head, base, start, end, page_size, GROUP, GROUP_PADDED, ROWS)
        row = (head * num_local + local).to(tl.int64)
        word = tl.load(
            words + row[:, None] * NUM_WORDS + (own_bucket >> 5)[None, :],
            mask=inside[:, None] & routable[None, :],
            other=0,
        )
        cut_low = tl.load(cut + row * 2, mask=inside, other=0)
        cut_high = tl.load(cut + row * 2 + 1, mask=inside, other=0)
        found = ((word >> (own_bucket & 31)[None, :]) & 1) != 0
        found = found & ((slot[None, :] < cut_low[:, None]) | (slot[None, :] >= cut_high[:, None]))
        older = (j[None, :] <= position[:, None] - window) & (j[None, :] > position[:, None] - sliding_window)
        drew = j[None, :] < (position[:, None] - position[:, None])
        for draw in tl.static_range(NUM_RANDOM):
            own = tl.load(drawn + local.to(tl.int64) * NUM_RANDOM + draw, mask=inside, other=-1)
            drew = drew | ((own[:, None] == index[None, :]) & known[None, :])
        valid = (((found | is_static[None, :]) & older) | drew) & inside[:, None]
        droppable = (routable[None, :] & ~drew).to(tl.int32)
        key_sum, value_sum = _key_gradients(
            query,
            query_head,
            query_row,
            upstream,
            upstream_head,
            upstream_row,
            logsumexp,
            least,
            delta,
            heads,
            position - start,
            inside,
            k,
            v,
            valid,
            droppable,
            key_sum,
            value_sum,
            scaling,
            softcap,
            num_rows,
            HEAD_DIM,
            BLOCK_DIM,
            VALUE_DIM,
            BLOCK_VALUE_DIM,
            DROP,
            SOFTCAP,
            PRECISION,
            ACC,
        )
    _add(key_grad, head, index, known, num_keys, key_sum * scaling, HEAD_DIM, BLOCK_DIM)
    _add(value_grad, head, index, known, num_keys, value_sum, VALUE_DIM, BLOCK_VALUE_DIM)
