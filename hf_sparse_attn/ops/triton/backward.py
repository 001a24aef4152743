"""The gradients of queries, keys and values.

Gradients of queries go over the tile's list again. Gradients of keys and values are summed by programs that own the
keys, in a fixed order: no atomics, so that the same inputs give the same gradients. The keys in a row's window have one
kernel, those outside of it another.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import AttentionConstants, Choice, KeyLists, Readers, Statistics
from hf_sparse_attn.ops.triton.document_keys import DocumentKeys, Span
from hf_sparse_attn.ops.triton.forward import num_warps
from hf_sparse_attn.ops.triton.launch import strided
from hf_sparse_attn.ops.triton.primitives import load_keys, load_listed, load_rows, score_keys, store_rows, tile_pairs
from hf_sparse_attn.ops.triton.readers import keys_of_block, read_older


def bwd_preprocess(output: Tensor, grad: Tensor, logsumexp: Tensor, least: Tensor) -> Statistics:
    """The tensors that the kernels below need of each row: output, grad [H, R, D], the others [H, R] of the forward."""
    delta = (output.to(logsumexp.dtype) * grad).sum(-1)
    return Statistics(logsumexp.contiguous(), least.contiguous(), delta.contiguous())


@triton.jit
def _load_statistics(statistics, place, inside, DROP: tl.constexpr):
    """Logsumexp, least score and delta of each pair: [M] each; the second has no meaning where nothing is dropped."""
    logsumexp = tl.load(statistics.logsumexp + place, mask=inside, other=0.0)
    least = logsumexp
    if DROP:
        least = tl.load(statistics.least + place, mask=inside, other=0.0)
    return logsumexp, least, tl.load(statistics.delta + place, mask=inside, other=0.0)


@triton.jit
def _weights(
    q,
    k,
    valid,
    droppable,
    logsumexp,
    least,
    SCORE: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Softmax weights [M, C] of queries [M, D] on keys k [D, C], and a score's derivative in its scaled product."""
    SOFTCAP: tl.constexpr = SCORE.SOFTCAP
    score = score_keys(q, k, SCORE, PRECISION, ACC)
    slope = tl.full(score.shape, 1.0, ACC)
    if SOFTCAP is not None:
        slope = 1 - (score / SOFTCAP) * (score / SOFTCAP)
    if DROP:
        valid = valid & ((score >= least[:, None]) | (droppable == 0))
    return tl.where(valid, tl.exp(score - logsumexp[:, None]), 0.0), slope


@triton.jit(do_not_specialize=["base", "start", "end", "num_rows", "num_tiles"])
def bwd_dq_kernel(
    query,
    key,
    value,
    grad,
    query_grad,
    lists,
    statistics,
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
    """Gradient of the queries [H, R, D] of a tile, from that of the output; other arguments as for `fwd_kernel`."""
    ROWS: tl.constexpr = TILE.ROWS
    GROUP_PADDED: tl.constexpr = TILE.GROUP_PADDED
    HEAD_DIM: tl.constexpr = TILE.HEAD_DIM
    BLOCK_DIM: tl.constexpr = TILE.BLOCK_DIM
    VALUE_DIM: tl.constexpr = TILE.VALUE_DIM
    BLOCK_VALUE_DIM: tl.constexpr = TILE.BLOCK_VALUE_DIM
    BLOCK: tl.constexpr = TILE.BLOCK
    SCALING: tl.constexpr = SCORE.SCALING
    tile = tl.program_id(0)
    head = tl.program_id(1)
    r, _, position, heads, inside = tile_pairs(tile, head, base, start, end, interval_size, TILE)
    row = position - start
    q = load_rows(query, heads, row, inside, HEAD_DIM, BLOCK_DIM)
    g = load_rows(grad, heads, row, inside, VALUE_DIM, BLOCK_VALUE_DIM)
    logsumexp, least, delta = _load_statistics(statistics, heads.to(tl.int64) * num_rows + row, inside, DROP)
    list_ = (head * num_tiles + tile).to(tl.int64)
    num_fixed = tl.load(lists.fixed + list_)
    stop = tl.load(lists.total + list_)
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_VALUE_DIM)
    summed = tl.zeros((ROWS * GROUP_PADDED, BLOCK_DIM), ACC)
    for low in range(0, stop, BLOCK):
        c = low + tl.arange(0, BLOCK)
        index, valid = load_listed(lists, list_ * capacity, c, stop, r)
        k = load_keys(key, head, index, None, d, HEAD_DIM)
        v = load_keys(value, head, index, None, e, VALUE_DIM, TRANSPOSED=True)
        droppable = (c >= num_fixed).to(tl.int32)[None, :]
        p, slope = _weights(q, tl.trans(k), valid, droppable, logsumexp, least, SCORE, DROP, PRECISION, ACC)
        change = p * (tl.dot(g, v, input_precision=PRECISION, out_dtype=ACC) - delta[:, None]) * slope
        summed = tl.dot(change.to(k.dtype), k, summed, input_precision=PRECISION, out_dtype=ACC)
    store_rows(query_grad, heads, row, inside, summed * SCALING, HEAD_DIM, BLOCK_DIM)


def bwd_dq(
    query_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lists: KeyLists,
    statistics: Statistics,
    span: Span,
    constants: AttentionConstants,
) -> None:
    """Fill query_grad [H, R, D] of a chunk for the output's gradient [H, R, D] and the arguments of `fwd`."""
    num_kv_heads, num_tiles, capacity = lists.keys.shape
    triton_launch.launch(
        bwd_dq_kernel,
        (num_tiles, num_kv_heads),
        *(strided(x) for x in (query, key, value, grad, query_grad)),
        lists,
        statistics,
        num_rows=query.shape[1],
        num_tiles=num_tiles,
        capacity=capacity,
        num_warps=num_warps(constants.TILE),
        **span.place,
        **constants._asdict(),
    )


@triton.jit
def _add_tile(
    key_sum,
    value_sum,
    query,
    grad,
    statistics,
    heads,
    row,
    inside,
    k,
    v,
    valid,
    droppable,
    num_rows,
    TILE: tl.constexpr,
    SCORE: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add a tile's part to the gradients [C, D] of keys k and values v, [C, D], where `valid` [M, C]."""
    q = load_rows(query, heads, row, inside, TILE.HEAD_DIM, TILE.BLOCK_DIM)
    g = load_rows(grad, heads, row, inside, TILE.VALUE_DIM, TILE.BLOCK_VALUE_DIM)
    logsumexp, least, delta = _load_statistics(statistics, heads.to(tl.int64) * num_rows + row, inside, DROP)
    p, slope = _weights(q, tl.trans(k), valid, droppable, logsumexp, least, SCORE, DROP, PRECISION, ACC)
    value_sum = tl.dot(tl.trans(p.to(g.dtype)), g, value_sum, input_precision=PRECISION, out_dtype=ACC)
    change = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC) - delta[:, None]) * slope
    key_sum = tl.dot(tl.trans(change.to(q.dtype)), q, key_sum, input_precision=PRECISION, out_dtype=ACC)
    return key_sum, value_sum


@triton.jit
def _add(table, head, index, inside, number, values, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """table[head, index] += values, of [Hkv, number, DIM]; nobody else writes to these keys now."""
    d = tl.arange(0, BLOCK_DIM)
    place = table + (head.to(tl.int64) * number + index)[:, None] * DIM + d[None, :]
    mask = inside[:, None] & (d < DIM)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + values, mask=mask)


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_rows"])
def bwd_dkv_window_kernel(
    query,
    key,
    value,
    grad,
    statistics,
    key_grad,
    value_grad,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_rows,
    interval_size,
    window,
    TILE: tl.constexpr,
    SCORE: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of keys and values [Hkv, N, D] from the rows that have them in their window; blocks of positions.

    No key of the window is dropped, whatever DROP says.
    """
    ROWS: tl.constexpr = TILE.ROWS
    HEAD_DIM: tl.constexpr = TILE.HEAD_DIM
    BLOCK_DIM: tl.constexpr = TILE.BLOCK_DIM
    VALUE_DIM: tl.constexpr = TILE.VALUE_DIM
    BLOCK_VALUE_DIM: tl.constexpr = TILE.BLOCK_VALUE_DIM
    BLOCK: tl.constexpr = TILE.BLOCK
    SCALING: tl.constexpr = SCORE.SCALING
    head = tl.program_id(1)
    low = tl.maximum(start - window + 1, key_offset) + tl.program_id(0) * BLOCK
    j = low + tl.arange(0, BLOCK)
    known = j < end
    index = j - key_offset
    heads_of_keys = tl.zeros((BLOCK,), tl.int32) + head
    k = load_rows(key, heads_of_keys, index, known, HEAD_DIM, BLOCK_DIM)
    v = load_rows(value, heads_of_keys, index, known, VALUE_DIM, BLOCK_VALUE_DIM)
    key_sum = tl.zeros((BLOCK, BLOCK_DIM), ACC)
    value_sum = tl.zeros((BLOCK, BLOCK_VALUE_DIM), ACC)
    per_interval = tl.cdiv(interval_size, ROWS)
    first = tl.maximum(low, start) - base
    last = tl.minimum(low + BLOCK + window - 1, end) - 1 - base
    first_tile = (first // interval_size) * per_interval + (first % interval_size) // ROWS
    last_tile = (last // interval_size) * per_interval + (last % interval_size) // ROWS
    for tile in range(first_tile, last_tile + 1):
        _, _, position, heads, inside = tile_pairs(tile, head, base, start, end, interval_size, TILE)
        row = position - start
        valid = (j[None, :] <= position[:, None]) & (j[None, :] > position[:, None] - window)
        valid = valid & inside[:, None] & known[None, :]
        key_sum, value_sum = _add_tile(
            key_sum, value_sum, query, grad, statistics, heads, row, inside, k, v, valid, 0, num_rows, TILE, SCORE,
            False, PRECISION, ACC,
        )  # fmt: skip
    _add(key_grad, head, index, known, num_keys, key_sum * SCALING, HEAD_DIM, BLOCK_DIM)
    _add(value_grad, head, index, known, num_keys, value_sum, VALUE_DIM, BLOCK_VALUE_DIM)


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "num_rows", "num_local"])
def bwd_dkv_older_kernel(
    query,
    key,
    value,
    grad,
    keys,
    choice,
    drawn,
    readers,
    statistics,
    key_grad,
    value_grad,
    num_keys,
    key_offset,
    base,
    start,
    num_rows,
    num_local,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
    TILE: tl.constexpr,
    SCORE: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of keys and values from the rows that read them outside their window; blocks of slots of `order`.

    ROWS of the rows that read a block are taken together, whatever tiles they are of.
    """
    ROWS: tl.constexpr = TILE.ROWS
    GROUP: tl.constexpr = TILE.GROUP
    GROUP_PADDED: tl.constexpr = TILE.GROUP_PADDED
    HEAD_DIM: tl.constexpr = TILE.HEAD_DIM
    BLOCK_DIM: tl.constexpr = TILE.BLOCK_DIM
    VALUE_DIM: tl.constexpr = TILE.VALUE_DIM
    BLOCK_VALUE_DIM: tl.constexpr = TILE.BLOCK_VALUE_DIM
    BLOCK: tl.constexpr = TILE.BLOCK
    SCALING: tl.constexpr = SCORE.SCALING
    block = tl.program_id(0)
    head = tl.program_id(1)
    place = (head * tl.num_programs(0) + block).to(tl.int64)
    number = tl.load(readers.number + place)
    if number == 0:
        return
    slot, known, index, bucket = keys_of_block(keys, head, block, num_keys, BLOCK)
    heads_of_keys = tl.zeros((BLOCK,), tl.int32) + head
    k = load_rows(key, heads_of_keys, index, known, HEAD_DIM, BLOCK_DIM)
    v = load_rows(value, heads_of_keys, index, known, VALUE_DIM, BLOCK_VALUE_DIM)
    key_sum = tl.zeros((BLOCK, BLOCK_DIM), ACC)
    value_sum = tl.zeros((BLOCK, BLOCK_VALUE_DIM), ACC)
    m = tl.arange(0, ROWS * GROUP_PADDED)
    heads = head * GROUP + m % GROUP_PADDED
    for low in range(0, number, ROWS):
        i = low + m // GROUP_PADDED
        inside = (i < number) & (m % GROUP_PADDED < GROUP)
        local = tl.load(readers.rows + place * num_local + i, mask=inside, other=0).to(tl.int32)
        valid, droppable = read_older(
            choice, drawn, head, local, inside, base, slot, known, index, bucket, num_local, key_offset, window,
            sliding_window, NUM_BUCKETS, NUM_RANDOM,
        )  # fmt: skip
        row = base + local - start
        key_sum, value_sum = _add_tile(
            key_sum, value_sum, query, grad, statistics, heads, row, inside, k, v, valid, droppable, num_rows, TILE,
            SCORE, DROP, PRECISION, ACC,
        )  # fmt: skip
    _add(key_grad, head, index, known, num_keys, key_sum * SCALING, HEAD_DIM, BLOCK_DIM)
    _add(value_grad, head, index, known, num_keys, value_sum, VALUE_DIM, BLOCK_VALUE_DIM)


def bwd_dkv_window(
    key_grad: Tensor,
    value_grad: Tensor,
    query: Tensor,
    value: Tensor,
    grad: Tensor,
    statistics: Statistics,
    keys: DocumentKeys,
    span: Span,
    constants: AttentionConstants,
) -> None:
    """Add to the gradients of all keys and values [Hkv, N, D] what the chunk's rows give to those in their windows."""
    first = max(span.start - keys.window + 1, keys.call.key_offset)
    triton_launch.launch(
        bwd_dkv_window_kernel,
        (triton.cdiv(span.end - first, constants.TILE.BLOCK), keys.num_kv_heads),
        *(strided(x) for x in (query, keys.key, value, grad)),
        statistics,
        key_grad,
        value_grad,
        num_rows=query.shape[1],
        num_warps=8,
        num_stages=triton_launch.stages_of_key_gradients(query, most=3),
        **_of_keys(keys),
        **span.place,
        **constants._asdict(),
    )


def bwd_dkv_older(
    key_grad: Tensor,
    value_grad: Tensor,
    query: Tensor,
    value: Tensor,
    grad: Tensor,
    statistics: Statistics,
    choice: Choice,
    drawn: Tensor,
    readers: Readers,
    keys: DocumentKeys,
    span: Span,
    constants: AttentionConstants,
) -> None:
    """The same for the keys and values outside of the rows' windows."""
    num_blocks = readers.number.shape[1]
    triton_launch.launch(
        bwd_dkv_older_kernel,
        (num_blocks, keys.num_kv_heads),
        *(strided(x) for x in (query, keys.key, value, grad)),
        keys.sorted,
        choice,
        drawn,
        readers,
        statistics,
        key_grad,
        value_grad,
        num_rows=query.shape[1],
        num_local=span.num_local,
        base=span.base,
        start=span.start,
        sliding_window=keys.sliding_window,
        NUM_BUCKETS=keys.num_buckets,
        NUM_RANDOM=drawn.shape[1],
        num_warps=8,
        num_stages=triton_launch.stages_of_key_gradients(query, most=2),  # three do not fit into shared memory
        **_of_keys(keys),
        **constants._asdict(),
    )


def _of_keys(keys: DocumentKeys) -> dict[str, Any]:
    return {"num_keys": keys.num_keys, "key_offset": keys.call.key_offset, "window": keys.window}
