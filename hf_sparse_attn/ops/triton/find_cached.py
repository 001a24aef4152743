"""The keys that a few rows find among many cached ones, without sorting any.

Every cached key has its bucket and its rank in it, the number of older keys there. What a row takes of a bucket are the
newest keys older than its window, ranks low .. high - 1, so that each key tells by itself whether it is taken, and its
place in the row's list: the keys of buckets before its own, and its rank. All of a row's list is written at once, in
the same order every time, for 8 bytes per key and KV head where attention to all keys reads hundreds.

What changes from step to step is read from the device: `newest`, [1] int64, is the index of the newest key. All else
counts back from there (`Progress`) and is the same in every step of one token, so that a CUDA graph can replay it.

Shapes: N cached keys or room for so many, D head_dim, B buckets, Hkv KV heads, R rows at consecutive positions of one
refresh interval.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import CachedKeys, HashTables, Progress, TakenRanks
from hf_sparse_attn.ops.triton.choose_buckets import take_best
from hf_sparse_attn.ops.triton.hash_keys import buckets_of, hash_sizes
from hf_sparse_attn.ops.triton.launch import TL, block_dim, strided
from hf_sparse_attn.ops.triton.primitives import load_keys
from hf_sparse_attn.patterns import LayerPattern
from hf_sparse_attn.routing import MEANS_LAG

FEW = 16  # new keys and rows that one launch takes
_BLOCK_KEYS = 1024


def _block_buckets(num_buckets: int) -> int:
    """Buckets that a program takes."""
    return min(max(num_buckets, 16), 32)


@triton.jit
def num_known_keys(row, key_offset, PAGE_SIZE: tl.constexpr, LAG: tl.constexpr):
    """How many keys the bucket means of a row at this position are of."""
    row = tl.maximum(row, 0)
    return tl.maximum(row // PAGE_SIZE * PAGE_SIZE - LAG + 1 - key_offset, 0)


@triton.jit(do_not_specialize=["room", "key_offset", "num_new", "rows_to_end", "since_known", "num_rows"])
def append_and_score_kernel(
    query,
    key,
    tables,
    cached,
    scores,
    newest,
    room,
    key_offset,
    num_new,
    rows_to_end,
    since_known,
    num_rows,
    NUM_BUCKETS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
    HASH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LAG: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program 0 of a head puts up to BLOCK new keys into their buckets, the others score the buckets for all rows.

    Before, these add to the buckets' sums the keys that the rows know and the row `since_known` before them did not.

    Args:
        query: [H, R, D].
        tables: `HashTables`.
        cached: `CachedKeys`; the last `num_new` keys get a bucket and a rank and are counted.
        scores: [Hkv, R, B], the group's summed query times the bucket's mean; -inf where the mean is of no key.
        newest: [1], index of the newest key.
        rows_to_end, since_known: see `Progress`.
    """
    HEAD_DIM: tl.constexpr = HASH.HEAD_DIM
    head = tl.program_id(1)
    stop = tl.load(newest).to(tl.int32) + 1
    if tl.program_id(0) == 0:
        i = tl.arange(0, BLOCK)
        n = stop - num_new + i
        new = i < num_new
        bucket_places = cached.bucket + head.to(tl.int64) * room + n
        own = buckets_of(key, head, n, stop, tables, HASH, BLOCK, ACC)
        is_static = tl.load(bucket_places, mask=new, other=0) == NUM_BUCKETS
        own = tl.where(is_static, NUM_BUCKETS, own)
        place = cached.counts + head * (NUM_BUCKETS + 1) + own
        same = (own[:, None] == own[None, :]) & new[None, :]
        before = tl.load(place, mask=new, other=0)
        own_rank = before + tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
        later = tl.sum((same & (i[None, :] > i[:, None])).to(tl.int32), 1)
        tl.debug_barrier()  # all have read the counts
        tl.store(place, own_rank + 1, mask=new & (later == 0))
        tl.store(bucket_places, own, mask=new)
        tl.store(cached.rank + head.to(tl.int64) * room + n, own_rank, mask=new)
        return
    b = (tl.program_id(0) - 1) * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    d = tl.arange(0, BLOCK_DIM)
    known = b < NUM_BUCKETS
    number_places = cached.numbers + head * NUM_BUCKETS + b
    sum_places = cached.sums + (head * NUM_BUCKETS + b)[:, None] * HEAD_DIM + d[None, :]
    inside = known[:, None] & (d < HEAD_DIM)[None, :]
    number = tl.load(number_places, mask=known, other=0)
    total = tl.load(sum_places, mask=inside, other=0.0)
    first_row = stop + key_offset - rows_to_end
    entering = num_known_keys(first_row - since_known, key_offset, PAGE_SIZE, LAG)
    entered = num_known_keys(first_row, key_offset, PAGE_SIZE, LAG)
    if entering < entered:
        for low in range(entering, entered, BLOCK_KEYS):
            n = low + tl.arange(0, BLOCK_KEYS)
            own = tl.load(cached.bucket + head.to(tl.int64) * room + n, mask=n < entered, other=-1)
            x = load_keys(key, head, n, n < entered, d, HEAD_DIM)
            member = (b[:, None] == own[None, :]) & known[:, None]
            number += tl.sum(member.to(tl.int32), 1)
            total = tl.dot(member.to(x.dtype), x, total, input_precision="ieee", out_dtype=ACC)
        tl.debug_barrier()  # all have read the sums
        tl.store(number_places, number, mask=known)
        tl.store(sum_places, total, mask=inside)
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
    newest: Tensor,
    key_offset: int,
    progress: Progress,
) -> Tensor:
    """Append the new keys, at most FEW, move the buckets' sums on to what the rows know, and score the buckets.

    Args:
        cached: with room for all of the keys.
        tables: of the pattern's hash.
        pattern: the layer's pattern.
        query: [H, R, D].
        key: [Hkv, N, D].
        newest: [1] int64, index of the newest key.
        key_offset: position of the first key.
        progress: the rows, the new keys and what the sums hold.

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
        newest,
        cached.bucket.shape[1],
        key_offset,
        progress.num_new,
        progress.rows_to_end,
        progress.since_known,
        num_rows,
        NUM_BUCKETS=num_buckets,
        GROUP=len(query) // num_kv_heads,
        BLOCK_DIM=block_dim(head_dim),
        BLOCK_BUCKETS=block_buckets,
        HASH=hash_sizes(pattern),
        BLOCK=FEW,
        BLOCK_KEYS=triton_launch.block_keys(key, head_dim),
        PAGE_SIZE=pattern.config.page_size,
        LAG=MEANS_LAG,
        ACC=TL[cached.sums.dtype],
    )
    return scores


@triton.jit(do_not_specialize=["room", "window", "rows_to_end", "since_older"])
def choose_ranks_kernel(
    scores,
    bucket,
    older,
    older_next,
    budgets,
    taken_ranks,
    num_found,
    newest,
    room,
    window,
    rows_to_end,
    since_older,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's buckets from the best down until its budget of keys is used: the ranks that it takes of each.

    Args:
        bucket: [Hkv, room].
        older: [Hkv, B], each bucket's keys that are older than the window of the row `since_older` before the first.
        older_next: [Hkv, B], the same for the last row's window, written; may be `older` where there is one row.
        budgets: [Hkv].
        taken_ranks: `TakenRanks`, written.
        num_found: [Hkv, R], keys that each row takes, written.
        newest: [1], index of the newest key.
        window: keys of a row's window.
        rows_to_end, since_older: see `Progress`.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    count = tl.load(older + head * NUM_BUCKETS + b, mask=known, other=0)
    first_older = tl.load(newest).to(tl.int32) + 2 - rows_to_end - window  # under 0 if the window has room for more
    num_older = tl.maximum(first_older - since_older, 0)
    target = tl.maximum(first_older + row, 0)
    bucket += head.to(tl.int64) * room
    for i in range(num_older, target):
        count += ((b == tl.load(bucket + i)) & known).to(tl.int32)
    for i in range(target, num_older):
        count -= ((b == tl.load(bucket + i)) & known).to(tl.int32)
    tl.debug_barrier()  # all have read the numbers
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
    scores: Tensor,
    cached: CachedKeys,
    older: Tensor,
    budgets: Tensor,
    newest: Tensor,
    window: int,
    progress: Progress,
) -> tuple[TakenRanks, Tensor]:
    """The keys that each row takes, by the buckets' scores [Hkv, R, B].

    Args:
        scores, cached, newest, progress: of `append_and_score`.
        older: [Hkv, B] int32, how many keys of each bucket are older than a window, see `Progress`; afterwards, older
            than the last row's.
        budgets: [Hkv] int32.
        window: keys of a row's window.

    Returns:
        The ranks, and how many keys they are, [Hkv, R] int32.
    """
    num_kv_heads, num_rows, num_buckets = scores.shape
    taken = TakenRanks(*(torch.empty(scores.shape, dtype=torch.int32, device=scores.device) for _ in range(3)))
    num_found = torch.empty(num_kv_heads, num_rows, dtype=torch.int32, device=scores.device)
    older_next = older if num_rows == 1 else torch.empty_like(older)
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
        newest,
        cached.bucket.shape[1],
        window,
        progress.rows_to_end,
        progress.since_older,
        NUM_BUCKETS=num_buckets,
        BLOCK=num_buckets,
    )
    if older_next is not older:
        older.copy_(older_next)
    return taken, num_found


@triton.jit(do_not_specialize=["room", "capacity"])
def list_found_kernel(
    cached,
    taken_ranks,
    found,
    newest,
    room,
    capacity,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found [Hkv, R, capacity]: the keys that each row takes."""
    head = tl.program_id(1)
    row = head * tl.num_programs(2) + tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(cached.bucket + head.to(tl.int64) * room + n, mask=n <= tl.load(newest), other=NUM_BUCKETS)
    routed = own < NUM_BUCKETS
    own_rank = tl.load(cached.rank + head.to(tl.int64) * room + n, mask=routed, other=0)
    table = row * NUM_BUCKETS + own
    taken = own_rank < tl.load(taken_ranks.high + table, mask=routed, other=0)
    taken = taken & (own_rank >= tl.load(taken_ranks.low + table, mask=routed, other=0)) & routed
    place = tl.load(taken_ranks.shift + table, mask=taken, other=0) + own_rank
    tl.store(found + row * capacity + place, n, mask=taken)


def list_found(cached: CachedKeys, taken: TakenRanks, newest: Tensor, num_keys: int, capacity: int) -> Tensor:
    """Each row's keys, [Hkv, R, capacity] int32; `num_keys` are as many as there may be."""
    num_kv_heads, num_rows, num_buckets = taken.low.shape
    found = torch.empty(num_kv_heads, num_rows, capacity, dtype=torch.int32, device=taken.low.device)
    triton_launch.launch(
        list_found_kernel,
        (triton.cdiv(num_keys, _BLOCK_KEYS), num_kv_heads, num_rows),
        cached,
        taken,
        found,
        newest,
        cached.bucket.shape[1],
        capacity,
        NUM_BUCKETS=num_buckets,
        BLOCK=_BLOCK_KEYS,
    )
    return found
