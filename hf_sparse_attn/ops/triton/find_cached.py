"""The keys that a few rows find among many cached ones, without sorting any.

Every cached key has its bucket and its rank in it, the number of older keys there. What a row takes of a bucket are the
newest keys older than its window, ranks low .. high - 1, so that each key tells by itself whether it is taken, and its
place in the row's list: the keys of buckets before its own, and its rank. All of a row's list is written at once, in
the same order every time, for 8 bytes per key and KV head where attention to all keys reads hundreds.

Shapes: N cached keys in room for more, D head_dim, B buckets, Hkv KV heads, R rows at consecutive positions of one
refresh interval.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import CachedKeys, HashTables, TakenRanks
from hf_sparse_attn.ops.triton.choose_buckets import take_best
from hf_sparse_attn.ops.triton.hash_keys import buckets_of, hash_sizes
from hf_sparse_attn.ops.triton.launch import TL, block_dim, strided
from hf_sparse_attn.ops.triton.primitives import load_keys
from hf_sparse_attn.patterns import LayerPattern

FEW = 16  # new keys and rows that one launch takes
_BLOCK_KEYS = 1024


@triton.jit(do_not_specialize=["start", "stop", "room"])
def add_to_sums_kernel(
    key,
    cached,
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
    """Add the keys start .. stop - 1 to the sums and numbers of their buckets."""
    head = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    d = tl.arange(0, BLOCK_DIM)
    known = b < NUM_BUCKETS
    number_places = cached.numbers + head * NUM_BUCKETS + b
    places = cached.sums + (head * NUM_BUCKETS + b)[:, None] * HEAD_DIM + d[None, :]
    inside = known[:, None] & (d < HEAD_DIM)[None, :]
    number = tl.load(number_places, mask=known, other=0)
    total = tl.load(places, mask=inside, other=0.0)
    for low in range(start, stop, BLOCK):
        n = low + tl.arange(0, BLOCK)
        own = tl.load(cached.bucket + head.to(tl.int64) * room + n, mask=n < stop, other=-1)
        x = load_keys(key, head, n, n < stop, d, HEAD_DIM)
        member = (b[:, None] == own[None, :]) & known[:, None]
        number += tl.sum(member.to(tl.int32), 1)
        total = tl.dot(member.to(x.dtype), x, total, input_precision=PRECISION, out_dtype=ACC)
    tl.store(number_places, number, mask=known)
    tl.store(places, total, mask=inside)


def add_to_sums(cached: CachedKeys, key: Tensor, start: int, stop: int) -> None:
    """Add the keys start .. stop - 1 of [Hkv, N, D] to the sums and numbers of their buckets."""
    num_buckets, head_dim = cached.sums.shape[1:]
    block_buckets = _block_buckets(num_buckets)
    triton_launch.launch(
        add_to_sums_kernel,
        (triton.cdiv(num_buckets, block_buckets), len(key)),
        strided(key),
        cached,
        start,
        stop,
        cached.bucket.shape[1],
        NUM_BUCKETS=num_buckets,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim(head_dim),
        BLOCK_BUCKETS=block_buckets,
        BLOCK=triton_launch.block_keys(key, head_dim),
        PRECISION="ieee",
        ACC=TL[cached.sums.dtype],
    )


def _block_buckets(num_buckets: int) -> int:
    """Buckets that a program takes."""
    return min(max(num_buckets, 16), 32)


@triton.jit(do_not_specialize=["start", "stop", "room", "static_bits", "num_rows"])
def append_and_score_kernel(
    query,
    key,
    tables,
    cached,
    scores,
    start,
    stop,
    room,
    static_bits,
    num_rows,
    NUM_BUCKETS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
    HASH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program 0 of a head puts up to BLOCK new keys into their buckets, the others score the buckets for all rows.

    Args:
        query: [H, R, D].
        tables: `HashTables`.
        cached: `CachedKeys`; the keys start .. stop - 1 get a bucket and a rank and are counted.
        scores: [Hkv, R, B], the group's summed query times the bucket's mean; -inf where the mean is of no key.
        static_bits: bit i is set where the key start + i is static.
    """
    HEAD_DIM: tl.constexpr = HASH.HEAD_DIM
    head = tl.program_id(1)
    if tl.program_id(0) == 0:
        i = tl.arange(0, BLOCK)
        n = start + i
        new = n < stop
        own = buckets_of(key, head, n, stop, tables, HASH, BLOCK, ACC)
        own = tl.where(((static_bits >> i) & 1) != 0, NUM_BUCKETS, own)
        place = cached.counts + head * (NUM_BUCKETS + 1) + own
        same = (own[:, None] == own[None, :]) & new[None, :]
        before = tl.load(place, mask=new, other=0)
        own_rank = before + tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
        later = tl.sum((same & (i[None, :] > i[:, None])).to(tl.int32), 1)
        tl.debug_barrier()  # all have read the counts
        tl.store(place, own_rank + 1, mask=new & (later == 0))
        tl.store(cached.bucket + head.to(tl.int64) * room + n, own, mask=new)
        tl.store(cached.rank + head.to(tl.int64) * room + n, own_rank, mask=new)
        return
    b = (tl.program_id(0) - 1) * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    d = tl.arange(0, BLOCK_DIM)
    known = b < NUM_BUCKETS
    number = tl.load(cached.numbers + head * NUM_BUCKETS + b, mask=known, other=0)
    inside = known[:, None] & (d < HEAD_DIM)[None, :]
    total = tl.load(cached.sums + (head * NUM_BUCKETS + b)[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    mean = total / tl.maximum(number, 1).to(ACC)[:, None]
    for row in range(num_rows):
        summed = tl.zeros((BLOCK_DIM,), ACC)
        for member in tl.static_range(GROUP):
            place = (head * GROUP + member).to(tl.int64) * query.head + row * query.row
            summed += tl.load(query.pointer + place + d, mask=d < HEAD_DIM, other=0.0).to(ACC)
        score = tl.sum(mean * summed[None, :], 1)
        score = tl.where(number > 0, score, float("-inf"))
        tl.store(scores + (head * num_rows + row) * NUM_BUCKETS + b, score, mask=known)


def append_and_score(
    cached: CachedKeys,
    tables: HashTables,
    pattern: LayerPattern,
    query: Tensor,
    key: Tensor,
    start: int,
    static: Tensor,
) -> Tensor:
    """Append the keys from index `start` on, at most FEW, and score the buckets.

    Args:
        cached: with room for all of the keys.
        tables: of the pattern's hash.
        pattern: the layer's pattern.
        query: [H, R, D].
        key: [Hkv, N, D].
        start: of the first new key.
        static: indices of the static keys among the new ones.

    Returns:
        The buckets' scores, [Hkv, R, B].
    """
    num_kv_heads, num_buckets, head_dim = cached.sums.shape
    block_buckets, num_rows = _block_buckets(num_buckets), query.shape[1]
    scores = cached.sums.new_empty(num_kv_heads, num_rows, num_buckets)
    triton_launch.launch(
        append_and_score_kernel,
        (1 + triton.cdiv(num_buckets, block_buckets), num_kv_heads),
        strided(query),
        strided(key),
        tables,
        cached,
        scores,
        start,
        key.shape[1],
        cached.bucket.shape[1],
        sum(1 << i for i in (static - start).tolist()) if len(static) else 0,
        num_rows,
        NUM_BUCKETS=num_buckets,
        GROUP=len(query) // num_kv_heads,
        BLOCK_DIM=block_dim(head_dim),
        BLOCK_BUCKETS=block_buckets,
        HASH=hash_sizes(pattern),
        BLOCK=FEW,
        ACC=TL[cached.sums.dtype],
    )
    return scores


@triton.jit(do_not_specialize=["room", "num_older", "first_older"])
def choose_ranks_kernel(
    scores,
    bucket,
    older,
    older_next,
    budgets,
    taken_ranks,
    num_found,
    room,
    num_older,
    first_older,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's buckets from the best down until its budget of keys is used: the ranks that it takes of each.

    Args:
        bucket: [Hkv, room].
        older: [Hkv, B], how many of the first `num_older` keys are in each bucket.
        older_next: [Hkv, B], the same for the keys older than the last row's window, written.
        budgets: [Hkv].
        taken_ranks: `TakenRanks`, written.
        num_found: [Hkv, R], keys that each row takes, written.
        first_older: keys older than the first row's window; under 0 while the window reaches over the first key.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    count = tl.load(older + head * NUM_BUCKETS + b, mask=known, other=0)
    target = tl.maximum(first_older + row, 0)
    bucket += head.to(tl.int64) * room
    for i in range(num_older, target):
        count += ((b == tl.load(bucket + i)) & known).to(tl.int32)
    for i in range(target, num_older):
        count -= ((b == tl.load(bucket + i)) & known).to(tl.int32)
    if row == tl.num_programs(0) - 1:
        tl.store(older_next + head * NUM_BUCKETS + b, count, mask=known)
    place = head * tl.num_programs(0) + row
    score = tl.load(scores + place * NUM_BUCKETS + b, mask=known, other=float("-inf"))
    available = tl.where(score > float("-inf"), count, 0)
    taken = take_best(score, available, tl.load(budgets + head))
    table = place * NUM_BUCKETS + b
    tl.store(taken_ranks.low + table, count - taken, mask=known)
    tl.store(taken_ranks.high + table, count, mask=known)
    tl.store(taken_ranks.shift + table, tl.cumsum(taken, 0) - count, mask=known)
    tl.store(num_found + place, tl.sum(taken, 0))


def choose_ranks(
    scores: Tensor, cached: CachedKeys, older: Tensor, budgets: Tensor, num_older: int, first_older: int
) -> tuple[TakenRanks, Tensor, Tensor]:
    """The keys that each row takes, by the buckets' scores [Hkv, R, B].

    Args:
        scores, cached: of `append_and_score`.
        older: [Hkv, B] int32, how many of the first `num_older` keys are in each bucket.
        budgets: [Hkv] int32.
        num_older: see above.
        first_older: keys older than the first row's window; under 0 while the window reaches over the first key.

    Returns:
        The ranks, how many keys they are, [Hkv, R] int32, and `older` for the keys older than the last row's window.
    """
    num_kv_heads, num_rows, num_buckets = scores.shape
    taken = TakenRanks(*(torch.empty(scores.shape, dtype=torch.int32, device=scores.device) for _ in range(3)))
    num_found = torch.empty(num_kv_heads, num_rows, dtype=torch.int32, device=scores.device)
    older_next = torch.empty_like(older)
    triton_launch.launch(
        choose_ranks_kernel,
        (num_rows, num_kv_heads),
        scores,
        cached.bucket,
        older,
        older_next,
        budgets,
        taken,
        num_found,
        cached.bucket.shape[1],
        num_older,
        first_older,
        NUM_BUCKETS=num_buckets,
        BLOCK=num_buckets,
    )
    return taken, num_found, older_next


@triton.jit(do_not_specialize=["room", "num_keys", "capacity"])
def list_found_kernel(
    cached,
    taken_ranks,
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
    own = tl.load(cached.bucket + head.to(tl.int64) * room + n, mask=n < num_keys, other=NUM_BUCKETS)
    routed = own < NUM_BUCKETS
    own_rank = tl.load(cached.rank + head.to(tl.int64) * room + n, mask=routed, other=0)
    table = row * NUM_BUCKETS + own
    taken = own_rank < tl.load(taken_ranks.high + table, mask=routed, other=0)
    taken = taken & (own_rank >= tl.load(taken_ranks.low + table, mask=routed, other=0)) & routed
    place = tl.load(taken_ranks.shift + table, mask=taken, other=0) + own_rank
    tl.store(found + row * capacity + place, n, mask=taken)


def list_found(cached: CachedKeys, taken: TakenRanks, num_keys: int, capacity: int) -> Tensor:
    """Each row's keys among the first `num_keys`: [Hkv, R, capacity] int32."""
    num_kv_heads, num_rows, num_buckets = taken.low.shape
    found = torch.empty(num_kv_heads, num_rows, capacity, dtype=torch.int32, device=taken.low.device)
    if num_keys:
        triton_launch.launch(
            list_found_kernel,
            (triton.cdiv(num_keys, _BLOCK_KEYS), num_kv_heads, num_rows),
            cached,
            taken,
            found,
            cached.bucket.shape[1],
            num_keys,
            capacity,
            NUM_BUCKETS=num_buckets,
            BLOCK=_BLOCK_KEYS,
        )
    return found
