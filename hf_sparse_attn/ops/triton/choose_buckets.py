"""Which buckets each row takes keys of: the buckets' scores, and the best of them up to the row's budget of keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import BucketMeans, Choice
from hf_sparse_attn.ops.triton.document_keys import DocumentKeys, Span
from hf_sparse_attn.ops.triton.launch import TL, precision, strided
from hf_sparse_attn.ops.triton.primitives import NEVER, tile_rows

_CHOOSING_ROWS = 8  # that choose their buckets in turn
HALVINGS = tl.constexpr(12)  # of the range of a row's scores, before single scores are told apart
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
def take_best(score, available, budget):
    """Keys that a row takes of each bucket, [BLOCK]: from the best down, all that are available, up to `budget`.

    Among equal scores the higher bucket comes first. Scores are finite here, as in `routing`, so that their
    differences are; NaN only where nothing is available.
    """
    LARGEST: tl.constexpr = 2.0**1022 if score.dtype == tl.float64 else 2.0**126
    score = tl.minimum(tl.maximum(score, -LARGEST), LARGEST)
    score = tl.where(available > 0, score, float("-inf"))
    threshold = last_score(score, available, budget)
    whole = tl.where(score > threshold, available, 0)
    last = tl.where(score == threshold, available, 0)
    rest = budget - tl.sum(whole, 0) - tl.sum(last, 0) + tl.cumsum(last, 0)  # the higher bucket first
    return whole + tl.minimum(tl.maximum(rest, 0), last)


@triton.jit
def last_score(score, available, budget):
    """The highest score that `budget` keys reach, -inf where there are no more keys; score [BLOCK], -inf if none.

    It lies between `low` and `high`, and the keys over their middle tell in which half. A step that only halves the
    range takes a third of the instructions of one that also moves both ends to the next score inside of it. So the
    first steps do the former; as a rule they leave one or two scores, and the latter tell these apart, whatever the
    range.
    """
    few = tl.sum(available, 0) <= budget
    low = tl.where(few, 0.0, tl.min(tl.where(available > 0, score, float("inf")), 0))
    high = tl.where(few, 0.0, tl.max(score, 0))
    for _ in range(HALVINGS):
        middle = low + (high - low) * 0.5
        reached = tl.sum(tl.where(score >= middle, available, 0), 0)
        low = tl.where(reached >= budget, middle, low)
        high = tl.where(reached >= budget, high, middle)
    low = tl.where(few, 0.0, tl.min(tl.where(score >= low, score, float("inf")), 0))
    high = tl.where(few, 0.0, tl.max(tl.where(score <= high, score, float("-inf")), 0))
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)  # numbers side by side
        reached = tl.sum(tl.where(score >= middle, available, 0), 0)
        if reached >= budget:
            low = tl.min(tl.where(score >= middle, score, float("inf")), 0)
        else:
            high = tl.max(tl.where(score < middle, score, float("-inf")), 0)
    return tl.where(few, float("-inf"), low)


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
):
    """Each row's buckets from the best down until its budget of keys is used; ROWS rows of an interval in turn.

    Only the newest keys of a row's last bucket are taken.

    Args:
        scores: [Hkv, local rows, B].
        budgets: [Hkv].
    """
    head = tl.program_id(1)
    order = keys.order + head * num_keys
    bucket = keys.bucket + head * num_keys
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    w = tl.arange(0, BLOCK // 32)
    budget = tl.load(budgets + head)
    first_row, _ = tile_rows(tl.program_id(0), 0, base, start, end, interval_size, ROWS)
    before = base + first_row - key_offset - 1  # index of the key before the first row
    lowest = tl.load(keys.first + head * (NUM_BUCKETS + 1) + b, mask=known, other=0)
    run_stop = tl.load(keys.first + head * (NUM_BUCKETS + 1) + b + 1, mask=known, other=0)
    highest = first_newer(order, lowest, run_stop, before - window)
    if SLIDING:
        lowest = first_newer(order, lowest, run_stop, before - sliding_window)
    for i in range(ROWS):
        highest += (b == bucket_of(bucket, before + 1 + i - window, num_keys)).to(tl.int32)
        if SLIDING:
            lowest += (b == bucket_of(bucket, before + 1 + i - sliding_window, num_keys)).to(tl.int32)
        r = i + tl.arange(0, 1)
        local, computed = tile_rows(tl.program_id(0), r, base, start, end, interval_size, ROWS)
        row = (head * num_intervals * interval_size + local).to(tl.int64)
        score = tl.load(scores + row * NUM_BUCKETS + b, mask=known & computed, other=float("-inf"))
        available = tl.where(score > float("-inf"), highest - lowest, 0)
        taken = take_best(score, available, budget)
        bits = tl.reshape((taken > 0).to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
        tl.store(choice.words + row * (BLOCK // 32) + w, tl.sum(bits, 1), mask=computed)
        partly = (taken > 0) & (taken < available)
        tl.store(choice.cut + row * 2, tl.sum(tl.where(partly, lowest, 0), 0), mask=computed)
        tl.store(choice.cut + row * 2 + 1, tl.sum(tl.where(partly, highest - taken, 0), 0), mask=computed)


@triton.jit
def bucket_of(bucket, index, num_keys):
    """The bucket of a key, -1 where there is no such key."""
    return tl.load(bucket + index, mask=(index >= 0) & (index < num_keys), other=-1)


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
        num_warps=1,  # one row at a time: a warp needs no barriers
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
