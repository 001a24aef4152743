"""Which buckets each row takes keys of: the buckets' scores, and the best of them up to the row's budget of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import BucketMeans, Choice
from hf_sparse_attn.ops.triton.document_keys import DocumentKeys, Span
from hf_sparse_attn.ops.triton.launch import TL, precision, strided
from hf_sparse_attn.ops.triton.primitives import NEVER, tile_rows

_CHOOSING_ROWS = 4  # that choose their buckets together
_SCORING_ROWS = 64  # that score buckets together


@triton.jit(do_not_specialize=["base", "start", "end", "num_intervals"])
def score_buckets_kernel(
    query,
    means,
    scores,
    base,
    start,
    end,
    num_intervals,
    interval_size,
    NUM_BUCKETS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """scores [Hkv, local rows, B]: the group's summed query times the bucket's mean; -inf if it has no keys yet.

    query [H, R, D], whose first row is at position `start`.
    """
    blocks = tl.cdiv(interval_size, BLOCK_ROWS)
    interval = tl.program_id(0) // blocks
    head = tl.program_id(2)
    row = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    local = interval * interval_size + row
    position = base + local
    inside = (row < interval_size) & (position >= start) & (position < end)
    bucket = tl.program_id(1) * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    known = bucket < NUM_BUCKETS
    table = (head * num_intervals + interval).to(tl.int64) * NUM_BUCKETS + bucket
    total = tl.zeros((BLOCK_ROWS, BLOCK_BUCKETS), ACC)
    rows = query.pointer + (position - start).to(tl.int64)[:, None] * query.row
    for low in range(0, HEAD_DIM, BLOCK_K):
        d = low + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        summed = tl.zeros((BLOCK_ROWS, BLOCK_K), ACC)
        for member in tl.static_range(GROUP):
            place = (head * GROUP + member).to(tl.int64) * query.head
            summed += tl.load(rows + place + d[None, :], mask=mask, other=0.0).to(ACC)
        mean = tl.load(
            means.mean + table[None, :] * HEAD_DIM + d[:, None],
            mask=known[None, :] & (d < HEAD_DIM)[:, None],
            other=0.0,
        )
        total = tl.dot(summed, mean, total, input_precision=PRECISION, out_dtype=ACC)
    number = tl.load(means.number + table, mask=known, other=0)
    total = tl.where((number > 0)[None, :], total, float("-inf"))
    place = (head * num_intervals * interval_size + local).to(tl.int64) * NUM_BUCKETS
    tl.store(scores + place[:, None] + bucket[None, :], total, mask=inside[:, None] & known[None, :])


def score_buckets(query: Tensor, means: BucketMeans, keys: DocumentKeys, span: Span) -> Tensor:
    """The scores that the chunk's rows, query [H, R, D], give each bucket: [Hkv, local rows, B]."""
    scores = keys.empty(span.num_local, keys.num_buckets, dtype=keys.acc)
    block_buckets = min(max(keys.num_buckets, 16), 128)
    triton_launch.launch(
        score_buckets_kernel,
        (
            span.num_intervals * triton.cdiv(span.interval_size, _SCORING_ROWS),
            triton.cdiv(keys.num_buckets, block_buckets),
            keys.num_kv_heads,
        ),
        strided(query),
        means,
        scores,
        num_intervals=span.num_intervals,
        NUM_BUCKETS=keys.num_buckets,
        GROUP=keys.group,
        HEAD_DIM=keys.head_dim,
        BLOCK_ROWS=_SCORING_ROWS,
        BLOCK_BUCKETS=block_buckets,
        BLOCK_K=32,
        PRECISION=precision(keys.acc),
        ACC=TL[keys.acc],
        **span.place,
    )
    return scores


@triton.jit
def first_newer(order, low, high, limit):
    """For each run of slots low .. high - 1, the first one whose key's index is over `limit` (binary search)."""
    while tl.max(high - low) > 0:
        open_ = low < high
        middle = (low + high) // 2
        index = tl.load(order + middle, mask=open_, other=NEVER)
        low = tl.where(open_ & (index <= limit), middle + 1, low)
        high = tl.where(open_ & (index > limit), middle, high)
    return low


@triton.jit
def take_best(score, available, budget, SCORE_BITS: tl.constexpr):
    """Keys that rows take of each bucket, [ROWS, BLOCK]: from the best down, all that are available, up to `budget`.

    Among equal scores the higher bucket comes first.
    """
    score = tl.where(score == 0.0, 0.0, score)  # no negative zero
    # The score at which the budget ends: the highest number whose bits, from the first down, keep enough keys.
    unsigned: tl.constexpr = tl.uint64 if SCORE_BITS == 64 else tl.uint32
    raw = score.to(unsigned, bitcast=True)
    one = tl.full((1, 1), 1, unsigned)
    ranked = tl.where(raw >> (SCORE_BITS - 1) != 0, ~raw, raw | (one << (SCORE_BITS - 1)))
    threshold = tl.zeros((score.shape[0], 1), unsigned)
    for i in range(SCORE_BITS):
        candidate = threshold | (one << (SCORE_BITS - 1 - i))
        reached = tl.sum(tl.where(ranked >= candidate, available, 0), 1)
        threshold = tl.where((reached >= budget)[:, None], candidate, threshold)
    whole = tl.where(ranked > threshold, available, 0)
    last = tl.where(ranked == threshold, available, 0)
    rest = (budget - tl.sum(whole, 1) - tl.sum(last, 1))[:, None] + tl.cumsum(last, 1)  # the higher bucket first
    return whole + tl.minimum(tl.maximum(rest, 0), last)


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_intervals"])
def choose_buckets_kernel(
    scores,
    keys,
    budgets,
    choice,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_intervals,
    interval_size,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
    SCORE_BITS: tl.constexpr,
):
    """Each row's buckets from the best down until its budget of keys is used; ROWS rows of an interval at a time.

    Only the newest keys of a row's last bucket are taken.

    Args:
        scores: [Hkv, local rows, B].
        budgets: [Hkv].
    """
    head = tl.program_id(1)
    order = keys.order + head * num_keys
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    r = tl.arange(0, ROWS)
    local, computed = tile_rows(tl.program_id(0), r, base, start, end, interval_size, ROWS)
    oldest = base + tl.min(local) - key_offset  # index of the key at the first row
    run_first = tl.load(keys.first + head * (NUM_BUCKETS + 1) + b, mask=known, other=0)
    run_stop = tl.load(keys.first + head * (NUM_BUCKETS + 1) + b + 1, mask=known, other=0)
    highest = first_newer(order, run_first, run_stop, oldest - window)[None, :] + tl.zeros((ROWS, BLOCK), tl.int32)
    lowest = run_first[None, :] + tl.zeros((ROWS, BLOCK), tl.int32)
    if SLIDING:
        lowest = first_newer(order, run_first, run_stop, oldest - sliding_window)[None, :] + tl.zeros(
            (ROWS, BLOCK), tl.int32
        )
    for i in range(1, ROWS):  # the key that is older than the window from row i on
        index = oldest + i - window
        entering = tl.load(keys.bucket + head * num_keys + index, mask=(index >= 0) & (index < num_keys), other=-1)
        highest += ((b == entering)[None, :] & (r >= i)[:, None]).to(tl.int32)
        if SLIDING:
            index = oldest + i - sliding_window
            leaving = tl.load(keys.bucket + head * num_keys + index, mask=(index >= 0) & (index < num_keys), other=-1)
            lowest += ((b == leaving)[None, :] & (r >= i)[:, None]).to(tl.int32)

    row = (head * num_intervals * interval_size + local).to(tl.int64)
    inside = computed[:, None] & known[None, :]
    score = tl.load(scores + row[:, None] * NUM_BUCKETS + b[None, :], mask=inside, other=float("-inf"))
    available = tl.where(score > float("-inf"), highest - lowest, 0)
    taken = take_best(score, available, tl.load(budgets + head), SCORE_BITS)

    chosen = taken > 0
    bits = tl.reshape(chosen.to(tl.int32), (ROWS, BLOCK // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = tl.sum(bits, 2)
    w = tl.arange(0, BLOCK // 32)
    tl.store(choice.words + row[:, None] * (BLOCK // 32) + w[None, :], word, mask=computed[:, None])
    partly = chosen & (taken < available)
    tl.store(choice.cut + row * 2, tl.sum(tl.where(partly, lowest, 0), 1), mask=computed)
    tl.store(choice.cut + row * 2 + 1, tl.sum(tl.where(partly, highest - taken, 0), 1), mask=computed)


def choose_buckets(scores: Tensor, keys: DocumentKeys, span: Span) -> Choice:
    """The buckets that the chunk's rows take keys of, by their scores [Hkv, local rows, B]."""
    choice = empty_choice(keys, span)
    triton_launch.launch(
        choose_buckets_kernel,
        (span.num_intervals * triton.cdiv(span.interval_size, _CHOOSING_ROWS), keys.num_kv_heads),
        scores,
        keys.sorted,
        keys.budget_table,
        choice,
        keys.num_keys,
        keys.call.key_offset,
        num_intervals=span.num_intervals,
        window=keys.window,
        sliding_window=keys.sliding_window,
        NUM_BUCKETS=keys.num_buckets,
        BLOCK=keys.bucket_bits,
        ROWS=_CHOOSING_ROWS,
        SLIDING=keys.sliding,
        SCORE_BITS=64 if keys.acc == torch.float64 else 32,
        **span.place,
    )
    return choice


def choose_none(keys: DocumentKeys, span: Span) -> Choice:
    """The choice of rows without a budget: nothing."""
    choice = empty_choice(keys, span)
    for table in choice:
        table.zero_()
    return choice


def empty_choice(keys: DocumentKeys, span: Span) -> Choice:
    """Room for the choice of a chunk's rows."""
    return Choice(keys.empty(span.num_local, keys.bucket_bits // 32), keys.empty(span.num_local, 2))
