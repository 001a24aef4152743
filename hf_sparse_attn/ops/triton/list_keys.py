"""The keys that the rows of each tile score, as one list.

Every row chooses its own buckets; what a tile shares is only the loading of keys, and rows near each other find much
the same ones. A list holds, for each tile and KV head, the keys that any of its rows scores, with one bit per row that
says which rows do, so that the attention itself knows nothing of how keys are found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import Choice, KeyLists, Runs
from hf_sparse_attn.ops.triton.choose_buckets import first_newer
from hf_sparse_attn.ops.triton.document_keys import DocumentKeys, Span
from hf_sparse_attn.ops.triton.primitives import NEVER, tile_rows

_BLOCK = 64  # entries of a list that a program fills in


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_intervals", "num_tiles"])
def find_runs_kernel(
    keys,
    choice,
    runs,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_intervals,
    num_tiles,
    interval_size,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
):
    """The runs of slots that hold what a tile's rows take, and keys that enter or leave a window inside the tile."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    order = keys.order + head * num_keys
    b = tl.arange(0, BLOCK)
    known = b < NUM_BUCKETS
    first_row, _ = tile_rows(tile, 0, base, start, end, interval_size, ROWS)
    oldest = base + first_row - key_offset  # index of the key at the first row
    lowest = tl.load(keys.first + head * (NUM_BUCKETS + 1) + b, mask=known, other=0)
    stop = tl.load(keys.first + head * (NUM_BUCKETS + 1) + b + 1, mask=known, other=0)
    num_rows = tl.minimum(ROWS, interval_size - (tile % tl.cdiv(interval_size, ROWS)) * ROWS)
    highest = first_newer(order, lowest, stop, oldest + num_rows - 1 - window)
    if SLIDING:
        lowest = first_newer(order, lowest, stop, oldest - sliding_window)
    low = tl.full((BLOCK,), NEVER, tl.int32)
    for r in range(ROWS):
        local, computed = tile_rows(tile, r, base, start, end, interval_size, ROWS)
        row = (head * num_intervals * interval_size + tl.where(computed, local, 0)).to(tl.int64)
        word = tl.where(computed, tl.load(choice.words + row * (BLOCK // 32) + (b >> 5)), 0)
        cut_low = tl.load(choice.cut + row * 2)
        cut_high = tl.load(choice.cut + row * 2 + 1)
        partly = (cut_low < cut_high) & (lowest <= cut_low) & (cut_low < stop)
        own_low = tl.where(partly, cut_high, lowest)
        low = tl.minimum(low, tl.where(((word >> (b & 31)) & 1) != 0, own_low, NEVER))
    some = (low < NEVER).to(tl.int32)
    length = tl.where(some > 0, highest - low, 0)
    place = (head * num_tiles + tile).to(tl.int64)
    run = place * BLOCK + tl.cumsum(some, 0) - 1
    tl.store(runs.bucket + run, b, mask=some > 0)
    tl.store(runs.low + run, low, mask=some > 0)
    tl.store(runs.end + run, tl.cumsum(length, 0), mask=some > 0)
    tl.store(runs.number + place, tl.sum(some))


def find_runs(choice: Choice, keys: DocumentKeys, span: Span) -> Runs:
    """The runs of each of the chunk's tiles."""
    runs = _empty_runs(keys, span)
    triton_launch.launch(
        find_runs_kernel,
        (span.num_tiles, keys.num_kv_heads),
        keys.sorted,
        choice,
        runs,
        keys.num_keys,
        keys.call.key_offset,
        num_intervals=span.num_intervals,
        num_tiles=span.num_tiles,
        window=keys.window,
        sliding_window=keys.sliding_window,
        NUM_BUCKETS=keys.num_buckets,
        BLOCK=keys.bucket_bits,
        ROWS=span.tile_rows,
        SLIDING=keys.sliding,
        **span.place,
    )
    return runs


def find_no_runs(keys: DocumentKeys, span: Span) -> Runs:
    """The runs of tiles whose rows take nothing."""
    runs = _empty_runs(keys, span)
    runs.number.zero_()
    return runs


def _empty_runs(keys: DocumentKeys, span: Span) -> Runs:
    bucket, low, end = (keys.empty(span.num_tiles, keys.bucket_bits) for _ in range(3))
    return Runs(bucket, low, end, keys.empty(span.num_tiles))


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_intervals", "num_tiles"])
def list_keys_kernel(
    keys,
    choice,
    runs,
    static,
    num_static,
    drawn,
    lists,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_intervals,
    num_tiles,
    interval_size,
    window,
    sliding_window,
    capacity,
    NUM_RUNS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys that rows of a tile score: window, static, random, candidates; each key once per row.

    Args:
        static: positions, ascending.
        num_static: [tiles], how many of them are older than the window of a row of the tile.
        drawn: [local rows, NUM_RANDOM], indices of random keys, -1 for none.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    head = tl.program_id(2)
    order = keys.order + head * num_keys
    place = (head * num_tiles + tile).to(tl.int64)
    local, computed = tile_rows(tile, tl.arange(0, ROWS), base, start, end, interval_size, ROWS)
    first = base + tl.min(local)
    # Rows lie along the second dimension.
    local, computed, r = local[None, :], computed[None, :], tl.arange(0, ROWS)[None, :]
    p = base + local
    row = (head * num_intervals * interval_size + local).to(tl.int64)
    cut_low = tl.load(choice.cut + row * 2, mask=computed, other=0)
    cut_high = tl.load(choice.cut + row * 2 + 1, mask=computed, other=0)
    num_runs = tl.load(runs.number + place)
    num_found = tl.load(runs.end + place * NUM_RUNS + num_runs - 1, mask=num_runs > 0, other=0)
    before_static = window + ROWS - 1
    before_random = before_static + tl.load(num_static + tile)
    before_found = before_random + ROWS * NUM_RANDOM
    stop = before_found + num_found
    tl.store(lists.fixed + place, before_found)
    tl.store(lists.total + place, stop)
    if block * BLOCK >= stop:
        return
    c = block * BLOCK + tl.arange(0, BLOCK)
    in_window = c < before_static
    is_static = (c >= before_static) & (c < before_random)
    is_random = (c >= before_random) & (c < before_found)
    is_found = (c >= before_found) & (c < stop)
    draw = tl.where(is_random, c - before_random, 0)
    # The run that holds the entry, by binary search.
    offset = c - before_found
    run = tl.zeros((BLOCK,), tl.int32)
    last = tl.zeros((BLOCK,), tl.int32) + num_runs - 1
    while tl.max(last - run) > 0:
        middle = (run + last) // 2
        ended = tl.load(runs.end + place * NUM_RUNS + middle, mask=is_found, other=NEVER) <= offset
        ended = ended & (run < last)
        last = tl.where(ended, last, tl.where(run < last, middle, last))
        run = tl.where(ended, middle + 1, run)
    begin = tl.load(runs.end + place * NUM_RUNS + run - 1, mask=is_found & (run > 0), other=0)
    slot = tl.load(runs.low + place * NUM_RUNS + run, mask=is_found, other=0) + offset - begin
    bucket = tl.load(runs.bucket + place * NUM_RUNS + run, mask=is_found, other=0)
    position = first - window + 1 + c
    position = tl.where(is_static, tl.load(static + c - before_static, mask=is_static, other=0), position)
    index = tl.where(is_found, tl.load(order + slot, mask=is_found, other=0), position - key_offset)
    index = tl.where(is_random, -1, index)
    position = index + key_offset
    older = (position[:, None] <= p - window) & (position[:, None] > p - sliding_window) & (index >= 0)[:, None]
    seen = (position[:, None] <= p) & (position[:, None] > p - window) & (index >= 0)[:, None]
    word = tl.load(
        choice.words + row * (NUM_RUNS // 32) + (bucket >> 5)[:, None], mask=is_found[:, None] & computed, other=0
    )
    found = is_found[:, None] & older & (((word >> (bucket & 31)[:, None]) & 1) != 0)
    found = found & ((slot[:, None] < cut_low) | (slot[:, None] >= cut_high))
    takes = (in_window[:, None] & seen) | (is_static[:, None] & older)
    if NUM_RANDOM > 0:
        drawing, draws = tile_rows(tile, draw // NUM_RANDOM, base, start, end, interval_size, ROWS)
        own = drawn + drawing.to(tl.int64) * NUM_RANDOM + draw % NUM_RANDOM
        index = tl.where(is_random, tl.load(own, mask=is_random & draws, other=-1), index)
        takes = takes | ((is_random & (index >= 0))[:, None] & (r == (draw // NUM_RANDOM)[:, None]))
        if tl.max(is_found.to(tl.int32)) > 0:
            for i in range(NUM_RANDOM):
                other = tl.load(drawn + local.to(tl.int64) * NUM_RANDOM + i, mask=computed, other=-1)
                found = found & (index[:, None] != other)
    taken = tl.sum(((takes | found) & computed).to(lists.rows.dtype.element_ty) << r, 1)
    tl.store(lists.keys + place * capacity + c, tl.where(taken != 0, index, 0), mask=c < stop)
    tl.store(lists.rows + place * capacity + c, taken, mask=c < stop)


def list_keys(choice: Choice, runs: Runs, drawn: Tensor, keys: DocumentKeys, span: Span) -> KeyLists:
    """The keys that the rows of each of the chunk's tiles score; drawn [local rows, random keys per row]."""
    num_random, tile_rows = drawn.shape[1], span.tile_rows
    last = span.first_rows(drawn.device) + tile_rows - 1
    num_static = torch.searchsorted(keys.static, (last - keys.window).int(), right=True).int()
    # The keys that enter the window and, with one of the model's own, leave it inside a tile stand in runs as well.
    found = min(tile_rows * max(keys.budgets) + 2 * tile_rows, keys.num_keys)
    capacity = keys.window + tile_rows - 1 + len(keys.static) + tile_rows * num_random + found
    capacity = -(-capacity // 16) * 16
    shape = (span.num_tiles, capacity)
    bits = torch.int32 if tile_rows <= 32 else torch.int64
    rows = keys.empty(*shape, dtype=bits)
    lists = KeyLists(keys.empty(*shape), rows, keys.empty(shape[0]), keys.empty(shape[0]))
    triton_launch.launch(
        list_keys_kernel,
        (triton.cdiv(capacity, _BLOCK), span.num_tiles, keys.num_kv_heads),
        keys.sorted,
        choice,
        runs,
        keys.static,
        num_static,
        drawn,
        lists,
        keys.num_keys,
        keys.call.key_offset,
        num_intervals=span.num_intervals,
        num_tiles=span.num_tiles,
        window=keys.window,
        sliding_window=keys.sliding_window,
        capacity=capacity,
        NUM_RUNS=keys.bucket_bits,
        NUM_RANDOM=num_random,
        ROWS=tile_rows,
        BLOCK=_BLOCK,
        **span.place,
    )
    return lists
