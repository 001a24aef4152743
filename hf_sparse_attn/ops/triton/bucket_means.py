"""The mean key of each bucket, as the rows of each refresh interval may know it."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import BucketMeans
from hf_sparse_attn.ops.triton.document_keys import DocumentKeys, Span
from hf_sparse_attn.ops.triton.launch import TL, block_dim, strided
from hf_sparse_attn.ops.triton.primitives import NEVER, load_keys
from hf_sparse_attn.routing import MEANS_LAG


@triton.jit
def _sum_until(
    key,
    head,
    order,
    slot,
    stop,
    limit,
    total,
    sign,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to `total` [D] the keys from `slot` on whose index is under `limit`; the first slot after them."""
    d = tl.arange(0, BLOCK_DIM)
    n = tl.arange(0, BLOCK)
    index = tl.load(order + slot + n, mask=slot + n < stop, other=NEVER)
    number = tl.sum((index < limit).to(tl.int32))
    while number > 0:
        x = load_keys(key, head, index, index < limit, d, HEAD_DIM)
        total += sign * tl.sum(x.to(total.dtype), 0)
        slot += number
        index = tl.load(order + slot + n, mask=slot + n < stop, other=NEVER)
        number = tl.sum((index < limit).to(tl.int32))
    return total, slot


@triton.jit(do_not_specialize=["num_keys", "key_offset", "first_position", "num_intervals"])
def mean_buckets_kernel(
    key,
    keys,
    sums,
    means,
    num_keys,
    key_offset,
    first_position,
    num_intervals,
    refresh_interval,
    means_lag,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    SLIDING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The means of each bucket's keys, and their numbers, interval after interval from `first_position` on.

    `sums` are those of the chunk before, and are moved on.
    """
    bucket = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_DIM)
    row = head * NUM_BUCKETS + bucket
    stop = tl.load(keys.first + head * (NUM_BUCKETS + 1) + bucket + 1)
    total = tl.load(sums.total + row * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    newest = tl.load(sums.entered + row)
    oldest = tl.load(sums.left + row)
    order = keys.order + head * num_keys
    for interval in range(num_intervals):
        position = first_position + interval * refresh_interval - key_offset
        total, newest = _sum_until(
            key, head, order, newest, stop, position - means_lag + 1, total, 1.0, HEAD_DIM, BLOCK_DIM, BLOCK
        )
        if SLIDING:
            limit = position + refresh_interval - sliding_window
            total, oldest = _sum_until(key, head, order, oldest, newest, limit, total, -1.0, HEAD_DIM, BLOCK_DIM, BLOCK)
        number = newest - oldest
        place = (head * num_intervals + interval).to(tl.int64) * NUM_BUCKETS + bucket
        mean = total / tl.maximum(number, 1).to(ACC)
        tl.store(means.mean + place * HEAD_DIM + d, mean, mask=d < HEAD_DIM)
        tl.store(means.number + place, number)
    tl.store(sums.total + row * HEAD_DIM + d, total, mask=d < HEAD_DIM)
    tl.store(sums.entered + row, newest)
    tl.store(sums.left + row, oldest)


def mean_buckets(keys: DocumentKeys, span: Span) -> BucketMeans:
    """The means that the chunk's intervals may know; chunks come in order."""
    refresh_interval = keys.call.pattern.config.page_size
    means = BucketMeans(
        keys.empty(span.num_intervals, keys.num_buckets, keys.head_dim, dtype=keys.acc),
        keys.empty(span.num_intervals, keys.num_buckets),
    )
    triton_launch.launch(
        mean_buckets_kernel,
        (keys.num_buckets, keys.num_kv_heads),
        strided(keys.key),
        keys.sorted,
        keys.sums,
        means,
        keys.num_keys,
        keys.call.key_offset,
        span.base // refresh_interval * refresh_interval,
        span.num_intervals,
        refresh_interval,
        MEANS_LAG,
        keys.sliding_window,
        NUM_BUCKETS=keys.num_buckets,
        SLIDING=keys.sliding,
        HEAD_DIM=keys.head_dim,
        BLOCK_DIM=block_dim(keys.head_dim),
        BLOCK=16,
        ACC=TL[keys.acc],
        num_warps=1,
    )
    return means
