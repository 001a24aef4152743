"""Triton kernels that find every row's keys: hash, bucket means, bucket scores, choice of buckets, lists of keys.

Rows are taken a tile at a time: up to ROWS consecutive rows of one page. Every row chooses its own buckets; what a tile
shares is only the loading of keys, and rows near each other find much the same ones. `list_keys` writes, for each tile
and KV head, the keys that any of its rows scores, with one bit per row that says which rows do, so that the attention
itself knows nothing of how keys are found.

Shapes: N keys, D head_dim, B buckets, Hkv KV heads. A chunk of rows holds whole pages (or one part of a large page),
its rows counted from position `base` on (`local`); those at positions start .. end - 1 are computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NEVER = tl.constexpr(2**30)  # a position or slot behind all others


@triton.jit
def buckets_of(
    key,
    key_row,
    n,
    num_keys,
    weight,
    bias,
    HEAD_DIM: tl.constexpr,
    CODEBOOKS: tl.constexpr,
    CODEBOOKS_PADDED: tl.constexpr,
    CODE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Buckets [BLOCK] of the keys n of one KV head: the digits argmax_c key . weight[:, t, c] + bias[t, c]."""
    codes: tl.constexpr = 2**CODE_BITS
    c = tl.arange(0, CODEBOOKS_PADDED * codes)
    columns: tl.constexpr = CODEBOOKS * codes
    scores = tl.load(bias + c, mask=c < columns, other=0.0)[None, :]
    scores += tl.zeros((BLOCK, CODEBOOKS_PADDED * codes), ACC)
    for low in range(0, HEAD_DIM, BLOCK_K):
        d = low + tl.arange(0, BLOCK_K)
        inside = (n < num_keys)[:, None] & (d < HEAD_DIM)[None, :]
        x = tl.load(key + n.to(tl.int64)[:, None] * key_row + d[None, :], mask=inside, other=0.0)
        w = tl.load(
            weight + d[:, None] * columns + c[None, :],
            mask=(d < HEAD_DIM)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
        scores = tl.dot(x.to(ACC), w, scores, input_precision="ieee", out_dtype=ACC)
    digits = tl.argmax(tl.reshape(scores, (BLOCK, CODEBOOKS_PADDED, codes)), 2)
    t = tl.arange(0, CODEBOOKS_PADDED)
    place = CODE_BITS * (CODEBOOKS - 1 - t)
    spelled = tl.where((t < CODEBOOKS)[None, :], digits << tl.where(place > 0, place, 0)[None, :], 0)
    return tl.sum(spelled, 1)


@triton.jit(do_not_specialize=["num_keys"])
def hash_keys(
    key,
    key_head,
    key_row,
    weight,
    bias,
    bucket,
    num_keys,
    HEAD_DIM: tl.constexpr,
    CODEBOOKS: tl.constexpr,
    CODEBOOKS_PADDED: tl.constexpr,
    CODE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """bucket [Hkv, N] of all keys.

    weight [Hkv, D, CODEBOOKS, 2**CODE_BITS], bias [Hkv, CODEBOOKS, 2**CODE_BITS].
    """
    head = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns: tl.constexpr = CODEBOOKS * 2**CODE_BITS
    own = buckets_of(
        key + head.to(tl.int64) * key_head,
        key_row,
        n,
        num_keys,
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
    tl.store(bucket + head * num_keys + n, own, mask=n < num_keys)


@triton.jit
def _sum_until(
    key,
    key_row,
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
    """Add to `total` [D] the keys from `slot` on whose index is under `limit`; the first slot behind them."""
    d = tl.arange(0, BLOCK_DIM)
    n = tl.arange(0, BLOCK)
    index = tl.load(order + slot + n, mask=slot + n < stop, other=_NEVER)
    number = tl.sum((index < limit).to(tl.int32))
    while number > 0:
        inside = (index < limit)[:, None] & (d < HEAD_DIM)[None, :]
        x = tl.load(key + index.to(tl.int64)[:, None] * key_row + d[None, :], mask=inside, other=0.0)
        total += sign * tl.sum(x.to(total.dtype), 0)
        slot += number
        index = tl.load(order + slot + n, mask=slot + n < stop, other=_NEVER)
        number = tl.sum((index < limit).to(tl.int32))
    return total, slot


@triton.jit(do_not_specialize=["num_keys", "key_offset", "first_position", "num_pages"])
def mean_buckets(
    key,
    key_head,
    key_row,
    order,
    first,
    sums,
    entered,
    left,
    means,
    routable,
    num_keys,
    key_offset,
    first_position,
    num_pages,
    page_size,
    means_lag,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    SLIDING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """means [Hkv, pages, B, D] of each bucket's keys as every page may know them, and routable [Hkv, pages, B].

    The first page begins at `first_position`. sums [Hkv, B, D], entered and left [Hkv, B] carry on from the chunk
    before.
    """
    bucket = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_DIM)
    row = head * NUM_BUCKETS + bucket
    stop = tl.load(first + head * (NUM_BUCKETS + 1) + bucket + 1)
    total = tl.load(sums + row * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    newest = tl.load(entered + row)
    oldest = tl.load(left + row)
    key += head.to(tl.int64) * key_head
    order += head * num_keys
    for page in range(num_pages):
        position = first_position + page * page_size - key_offset
        total, newest = _sum_until(
            key, key_row, order, newest, stop, position - means_lag + 1, total, 1.0, HEAD_DIM, BLOCK_DIM, BLOCK
        )
        if SLIDING:
            limit = position + page_size - sliding_window
            total, oldest = _sum_until(
                key, key_row, order, oldest, newest, limit, total, -1.0, HEAD_DIM, BLOCK_DIM, BLOCK
            )
        number = newest - oldest
        place = (head * num_pages + page).to(tl.int64) * NUM_BUCKETS + bucket
        mean = total / tl.maximum(number, 1).to(ACC)
        tl.store(means + place * HEAD_DIM + d, mean, mask=d < HEAD_DIM)
        tl.store(routable + place, number)
    tl.store(sums + row * HEAD_DIM + d, total, mask=d < HEAD_DIM)
    tl.store(entered + row, newest)
    tl.store(left + row, oldest)


@triton.jit(do_not_specialize=["base", "start", "end", "num_pages"])
def score_buckets(
    query,
    query_head,
    query_row,
    means,
    routable,
    scores,
    base,
    start,
    end,
    num_pages,
    page_size,
    NUM_BUCKETS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """scores [Hkv, pages * page_size, B]: the group's summed query times the bucket's mean; -inf: not routable.

    query [H, R, D], whose first row is at position `start`; `base` is the position of the chunk's first page.
    """
    blocks = tl.cdiv(page_size, BLOCK_ROWS)
    page = tl.program_id(0) // blocks
    head = tl.program_id(2)
    row = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    local = page * page_size + row
    position = base + local
    inside = (row < page_size) & (position >= start) & (position < end)
    bucket = tl.program_id(1) * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    known = bucket < NUM_BUCKETS
    table = (head * num_pages + page).to(tl.int64) * NUM_BUCKETS + bucket
    total = tl.zeros((BLOCK_ROWS, BLOCK_BUCKETS), ACC)
    rows = query + (position - start).to(tl.int64)[:, None] * query_row
    for low in range(0, HEAD_DIM, BLOCK_K):
        d = low + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        summed = tl.zeros((BLOCK_ROWS, BLOCK_K), ACC)
        for member in tl.static_range(GROUP):
            place = (head * GROUP + member).to(tl.int64) * query_head
            summed += tl.load(rows + place + d[None, :], mask=mask, other=0.0).to(ACC)
        mean = tl.load(
            means + table[None, :] * HEAD_DIM + d[:, None], mask=known[None, :] & (d < HEAD_DIM)[:, None], other=0.0
        )
        total = tl.dot(summed, mean, total, input_precision=PRECISION, out_dtype=ACC)
    number = tl.load(routable + table, mask=known, other=0)
    total = tl.where((number > 0)[None, :], total, float("-inf"))
    place = (head * num_pages * page_size + local).to(tl.int64) * NUM_BUCKETS
    tl.store(scores + place[:, None] + bucket[None, :], total, mask=inside[:, None] & known[None, :])


@triton.jit
def tile_rows(tile, r, base, start, end, page_size, ROWS: tl.constexpr):
    """Local row of a tile's row `r`, and whether it is computed."""
    per_page = tl.cdiv(page_size, ROWS)
    row = (tile % per_page) * ROWS + r
    local = (tile // per_page) * page_size + row
    return local, (row < page_size) & (base + local >= start) & (base + local < end)


@triton.jit
def _behind(order, low, high, limit):
    """For each run of slots low .. high - 1, the first one whose key's index is over `limit` (binary search)."""
    while tl.max(high - low) > 0:
        open_ = low < high
        middle = (low + high) // 2
        index = tl.load(order + middle, mask=open_, other=_NEVER)
        low = tl.where(open_ & (index <= limit), middle + 1, low)
        high = tl.where(open_ & (index > limit), middle, high)
    return low


@triton.jit
def take_best(score, available, budget, SCORE_BITS: tl.constexpr):
    """Keys that rows take of each bucket, [ROWS, BLOCK]: from the best down, all that are available, up to `budget`.

    Of equal scores the higher bucket comes first.
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


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_pages"])
def choose_buckets(
    scores,
    bucket,
    order,
    first,
    budgets,
    words,
    cut,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_pages,
    page_size,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
    SCORE_BITS: tl.constexpr,
):
    """Each row's buckets from the best down until its budget of keys is used; ROWS rows of a page at a time.

    A slot is a place in `order`, where the keys of a bucket stand side by side, oldest first. Of a row's last bucket
    only the newest keys are taken.

    Args:
        scores: [Hkv, rows, B].
        budgets: [Hkv].
        words: [Hkv, rows, BLOCK / 32], a bit for each bucket that the row takes keys of.
        cut: [Hkv, rows, 2], slots cut[0] .. cut[1] - 1 are the keys of the last bucket that are not taken.
    """
    head = tl.program_id(1)
    order += head * num_keys
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    r = tl.arange(0, ROWS)
    local, computed = tile_rows(tl.program_id(0), r, base, start, end, page_size, ROWS)
    oldest = base + tl.min(local) - key_offset  # index of the key at the first row
    run_first = tl.load(first + head * (NUM_BUCKETS + 1) + b, mask=known, other=0)
    run_stop = tl.load(first + head * (NUM_BUCKETS + 1) + b + 1, mask=known, other=0)
    highest = _behind(order, run_first, run_stop, oldest - window)[None, :] + tl.zeros((ROWS, BLOCK), tl.int32)
    lowest = run_first[None, :] + tl.zeros((ROWS, BLOCK), tl.int32)
    if SLIDING:
        lowest = _behind(order, run_first, run_stop, oldest - sliding_window)[None, :] + tl.zeros(
            (ROWS, BLOCK), tl.int32
        )
    for i in range(1, ROWS):  # the key that is behind the window from row i on
        index = oldest + i - window
        entering = tl.load(bucket + head * num_keys + index, mask=(index >= 0) & (index < num_keys), other=-1)
        highest += ((b == entering)[None, :] & (r >= i)[:, None]).to(tl.int32)
        if SLIDING:
            index = oldest + i - sliding_window
            leaving = tl.load(bucket + head * num_keys + index, mask=(index >= 0) & (index < num_keys), other=-1)
            lowest += ((b == leaving)[None, :] & (r >= i)[:, None]).to(tl.int32)

    row = (head * num_pages * page_size + local).to(tl.int64)
    inside = computed[:, None] & known[None, :]
    score = tl.load(scores + row[:, None] * NUM_BUCKETS + b[None, :], mask=inside, other=float("-inf"))
    available = tl.where(score > float("-inf"), highest - lowest, 0)
    taken = take_best(score, available, tl.load(budgets + head), SCORE_BITS)

    chosen = taken > 0
    bits = tl.reshape(chosen.to(tl.int32), (ROWS, BLOCK // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = tl.sum(bits, 2)
    w = tl.arange(0, BLOCK // 32)
    tl.store(words + row[:, None] * (BLOCK // 32) + w[None, :], word, mask=computed[:, None])
    partly = chosen & (taken < available)
    tl.store(cut + row * 2, tl.sum(tl.where(partly, lowest, 0), 1), mask=computed)
    tl.store(cut + row * 2 + 1, tl.sum(tl.where(partly, highest - taken, 0), 1), mask=computed)


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_pages", "num_tiles"])
def find_runs(
    order,
    first,
    words,
    cut,
    run_bucket,
    run_low,
    run_end,
    num_runs,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_pages,
    num_tiles,
    page_size,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
):
    """The runs of slots that hold what the rows of a tile take, and keys that enter or leave a window inside the tile.

    Args:
        words, cut: of `choose_buckets`.
        run_bucket, run_low, run_end: [Hkv, tiles, BLOCK]: bucket and first slot of each run, and the lengths of the
            runs up to this one added up.
        num_runs: [Hkv, tiles].
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    order += head * num_keys
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    first_row, _ = tile_rows(tile, 0, base, start, end, page_size, ROWS)
    oldest = base + first_row - key_offset  # index of the key at the first row
    lowest = tl.load(first + head * (NUM_BUCKETS + 1) + b, mask=known, other=0)
    stop = tl.load(first + head * (NUM_BUCKETS + 1) + b + 1, mask=known, other=0)
    num_rows = tl.minimum(ROWS, page_size - (tile % tl.cdiv(page_size, ROWS)) * ROWS)
    highest = _behind(order, lowest, stop, oldest + num_rows - 1 - window)
    if SLIDING:
        lowest = _behind(order, lowest, stop, oldest - sliding_window)
    low = tl.full((BLOCK,), _NEVER, tl.int32)
    for r in range(ROWS):
        local, computed = tile_rows(tile, r, base, start, end, page_size, ROWS)
        row = (head * num_pages * page_size + tl.where(computed, local, 0)).to(tl.int64)
        word = tl.where(computed, tl.load(words + row * (BLOCK // 32) + (b >> 5)), 0)
        cut_low = tl.load(cut + row * 2)
        cut_high = tl.load(cut + row * 2 + 1)
        partly = (cut_low < cut_high) & (lowest <= cut_low) & (cut_low < stop)
        own_low = tl.where(partly, cut_high, lowest)
        low = tl.minimum(low, tl.where(((word >> (b & 31)) & 1) != 0, own_low, _NEVER))
    some = (low < _NEVER).to(tl.int32)
    length = tl.where(some > 0, highest - low, 0)
    place = (head * num_tiles + tile).to(tl.int64)
    run = place * BLOCK + tl.cumsum(some, 0) - 1
    tl.store(run_bucket + run, b, mask=some > 0)
    tl.store(run_low + run, low, mask=some > 0)
    tl.store(run_end + run, tl.cumsum(length, 0), mask=some > 0)
    tl.store(num_runs + place, tl.sum(some))


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_pages", "num_tiles"])
def list_keys(
    order,
    words,
    cut,
    run_bucket,
    run_low,
    run_end,
    num_runs,
    static,
    num_static,
    drawn,
    keys,
    rows,
    fixed,
    total,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_pages,
    num_tiles,
    page_size,
    window,
    sliding_window,
    capacity,
    NUM_RUNS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys that rows of a tile score, and by which rows: window, static, random, found; each key once per row.

    Args:
        static: sorted positions; num_static [tiles]: how many of them are older than the window of a row of the tile.
        drawn: [rows, NUM_RANDOM], indices of random keys, -1 for none.
        keys, rows: [Hkv, tiles, capacity]: index of the key, and bit r set if row r of the tile scores it.
        fixed, total: [Hkv, tiles]: number of entries before those that were found through buckets, and in all.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    order += head * num_keys
    place = (head * num_tiles + tile).to(tl.int64)
    local, computed = tile_rows(tile, tl.arange(0, ROWS), base, start, end, page_size, ROWS)
    first = base + tl.min(local)
    # Rows lie along the second dimension.
    local, computed, r = local[None, :], computed[None, :], tl.arange(0, ROWS)[None, :]
    p = base + local
    row = (head * num_pages * page_size + local).to(tl.int64)
    cut_low = tl.load(cut + row * 2, mask=computed, other=0)
    cut_high = tl.load(cut + row * 2 + 1, mask=computed, other=0)
    runs = tl.load(num_runs + place)
    num_found = tl.load(run_end + place * NUM_RUNS + runs - 1, mask=runs > 0, other=0)
    before_static = window + ROWS - 1
    before_random = before_static + tl.load(num_static + tile)
    before_found = before_random + ROWS * NUM_RANDOM
    stop = before_found + num_found
    tl.store(fixed + place, before_found)
    tl.store(total + place, stop)
    if tl.program_id(2) * BLOCK >= stop:
        return
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    in_window = c < before_static
    is_static = (c >= before_static) & (c < before_random)
    is_random = (c >= before_random) & (c < before_found)
    is_found = (c >= before_found) & (c < stop)
    draw = tl.where(is_random, c - before_random, 0)
    # The run that holds the entry, by binary search.
    offset = c - before_found
    run = tl.zeros((BLOCK,), tl.int32)
    last = tl.zeros((BLOCK,), tl.int32) + runs - 1
    while tl.max(last - run) > 0:
        middle = (run + last) // 2
        behind = tl.load(run_end + place * NUM_RUNS + middle, mask=is_found, other=_NEVER) <= offset
        behind = behind & (run < last)
        last = tl.where(behind, last, tl.where(run < last, middle, last))
        run = tl.where(behind, middle + 1, run)
    begin = tl.load(run_end + place * NUM_RUNS + run - 1, mask=is_found & (run > 0), other=0)
    slot = tl.load(run_low + place * NUM_RUNS + run, mask=is_found, other=0) + offset - begin
    bucket = tl.load(run_bucket + place * NUM_RUNS + run, mask=is_found, other=0)
    position = first - window + 1 + c
    position = tl.where(is_static, tl.load(static + c - before_static, mask=is_static, other=0), position)
    index = tl.where(is_found, tl.load(order + slot, mask=is_found, other=0), position - key_offset)
    index = tl.where(is_random, -1, index)
    position = index + key_offset
    older = (position[:, None] <= p - window) & (position[:, None] > p - sliding_window) & (index >= 0)[:, None]
    seen = (position[:, None] <= p) & (position[:, None] > p - window) & (index >= 0)[:, None]
    word = tl.load(words + row * (NUM_RUNS // 32) + (bucket >> 5)[:, None], mask=is_found[:, None] & computed, other=0)
    found = is_found[:, None] & older & (((word >> (bucket & 31)[:, None]) & 1) != 0)
    found = found & ((slot[:, None] < cut_low) | (slot[:, None] >= cut_high))
    takes = (in_window[:, None] & seen) | (is_static[:, None] & older)
    for i in tl.static_range(NUM_RANDOM):
        own = tl.load(drawn + local.to(tl.int64) * NUM_RANDOM + i, mask=computed, other=-1)
        draws = is_random[:, None] & (draw[:, None] == r * NUM_RANDOM + i) & (own >= 0)
        index = tl.maximum(index, tl.max(tl.where(draws, own, -1), 1))
        takes = takes | draws
        found = found & (index[:, None] != own)
    taken = tl.sum(((takes | found) & computed).to(tl.int32) << r, 1)
    tl.store(keys + place * capacity + c, tl.where(taken != 0, index, 0), mask=c < stop)
    tl.store(rows + place * capacity + c, taken, mask=c < stop)


@triton.jit(do_not_specialize=["num_keys", "base", "start", "end", "num_tiles"])
def tiles_of_blocks(
    bucket,
    order,
    slot_of_key,
    run_low,
    run_end,
    num_runs,
    drawn,
    tiles,
    num_reading,
    num_keys,
    base,
    start,
    end,
    num_tiles,
    page_size,
    NUM_BUCKETS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Tiles whose rows may read keys outside their window in each block of slots: [Hkv, blocks, tiles], sorted.

    Static keys stand last in `order`, in a bucket of their own, and are read by all tiles.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    low = block * BLOCK
    high = tl.minimum(low + BLOCK, num_keys) - 1
    last_bucket = tl.load(bucket + head * num_keys + tl.load(order + head * num_keys + high))
    t = tl.arange(0, BLOCK_TILES)
    reads = (t < num_tiles).to(tl.int32) * (last_bucket >= NUM_BUCKETS).to(tl.int32)
    # The last of a tile's runs that begins before the block's end (binary search), and whether it reaches the block.
    place = (head * num_tiles + t).to(tl.int64)
    runs = tl.load(num_runs + place, mask=t < num_tiles, other=0)
    first = tl.zeros((BLOCK_TILES,), tl.int32)
    stop = runs
    while tl.max(stop - first) > 0:
        middle = (first + stop) // 2
        begins = tl.load(run_low + place * NUM_RUNS + middle, mask=first < stop, other=0) <= high
        behind = begins & (first < stop)
        stop = tl.where(behind, stop, tl.where(first < stop, middle, stop))
        first = tl.where(behind, middle + 1, first)
    run = place * NUM_RUNS + first - 1
    begin = tl.load(run_end + run - 1, mask=first > 1, other=0)
    length = tl.load(run_end + run, mask=first > 0, other=0) - begin
    reads |= (tl.load(run_low + run, mask=first > 0, other=0) + length > low).to(tl.int32) * (first > 0).to(tl.int32)
    if NUM_RANDOM > 0:
        for r in range(ROWS):
            local, computed = tile_rows(t, r, base, start, end, page_size, ROWS)
            computed = computed & (t < num_tiles)
            for i in range(NUM_RANDOM):
                own = tl.load(drawn + local.to(tl.int64) * NUM_RANDOM + i, mask=computed, other=-1)
                slot = tl.load(slot_of_key + head * num_keys + own, mask=own >= 0, other=-1)
                reads |= ((slot >= low) & (slot <= high)).to(tl.int32)
    place = (head * tl.num_programs(0) + block).to(tl.int64)
    tl.store(tiles + place * num_tiles + tl.cumsum(reads, 0) - 1, t, mask=reads > 0)
    tl.store(num_reading + place, tl.sum(reads))
