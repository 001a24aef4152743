"""The rows that read each block of keys from outside their window, for the backward.

A program of the backward owns a block of slots of `order`. Few rows of a tile that reads it read it themselves, so rows
are listed one by one, and those of several tiles are taken together. The lists take 2 bytes for each block and row of a
chunk: with blocks of 64 keys and chunks of 8192 rows as much as 128 numbers of bfloat16 for each key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import Choice, Readers, Runs
from hf_sparse_attn.ops.triton.document_keys import DocumentKeys, Span
from hf_sparse_attn.ops.triton.primitives import tile_rows


@triton.jit(do_not_specialize=["num_keys", "base", "start", "end", "num_tiles"])
def find_readers_kernel(
    keys,
    slot_of_key,
    runs,
    drawn,
    tiles,
    num_reading,
    num_keys,
    base,
    start,
    end,
    num_tiles,
    interval_size,
    NUM_BUCKETS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Tiles whose rows may attend to keys of each block of slots from outside their window.

    Static keys stand last in `order`, in a bucket of their own, and all tiles read them.

    Args:
        slot_of_key: [Hkv, N], where each key stands in `order`; read if NUM_RANDOM.
        drawn: [local rows, NUM_RANDOM], indices of random keys, -1 for none.
        tiles: [Hkv, blocks, num_tiles] int32, ascending, written.
        num_reading: [Hkv, blocks] int32, how many these are, written.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    low = block * BLOCK
    high = tl.minimum(low + BLOCK, num_keys) - 1
    last_bucket = tl.load(keys.bucket + head * num_keys + tl.load(keys.order + head * num_keys + high))
    t = tl.arange(0, BLOCK_TILES)
    reads = (t < num_tiles).to(tl.int32) * (last_bucket >= NUM_BUCKETS).to(tl.int32)
    # The last of a tile's runs that begins before the block's end (binary search), and whether it reaches the block.
    place = (head * num_tiles + t).to(tl.int64)
    stop = tl.load(runs.number + place, mask=t < num_tiles, other=0)
    first = tl.zeros((BLOCK_TILES,), tl.int32)
    while tl.max(stop - first) > 0:
        middle = (first + stop) // 2
        begins = tl.load(runs.low + place * NUM_RUNS + middle, mask=first < stop, other=0) <= high
        begins = begins & (first < stop)
        stop = tl.where(begins, stop, tl.where(first < stop, middle, stop))
        first = tl.where(begins, middle + 1, first)
    run = place * NUM_RUNS + first - 1
    begin = tl.load(runs.end + run - 1, mask=first > 1, other=0)
    length = tl.load(runs.end + run, mask=first > 0, other=0) - begin
    reads |= (tl.load(runs.low + run, mask=first > 0, other=0) + length > low).to(tl.int32) * (first > 0).to(tl.int32)
    if NUM_RANDOM > 0:
        for r in range(ROWS):
            local, computed = tile_rows(t, r, base, start, end, interval_size, ROWS)
            computed = computed & (t < num_tiles)
            for i in range(NUM_RANDOM):
                own = tl.load(drawn + local.to(tl.int64) * NUM_RANDOM + i, mask=computed, other=-1)
                slot = tl.load(slot_of_key + head * num_keys + own, mask=own >= 0, other=-1)
                reads |= ((slot >= low) & (slot <= high)).to(tl.int32)
    place = (head * tl.num_programs(0) + block).to(tl.int64)
    tl.store(tiles + place * num_tiles + tl.cumsum(reads, 0) - 1, t, mask=reads > 0)
    tl.store(num_reading + place, tl.sum(reads))


@triton.jit
def keys_of_block(keys, head, block, num_keys, BLOCK: tl.constexpr):
    """A block of slots [BLOCK]: the slots, which of them there are, their keys' indices and buckets."""
    slot = block * BLOCK + tl.arange(0, BLOCK)
    known = slot < num_keys
    index = tl.load(keys.order + head * num_keys + slot, mask=known, other=0)
    return slot, known, index, tl.load(keys.bucket + head * num_keys + index, mask=known, other=0)


@triton.jit
def read_older(
    choice,
    drawn,
    head,
    local,
    computed,
    base,
    slot,
    known,
    index,
    bucket,
    num_local,
    key_offset,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
):
    """Which local rows [M] score the keys of `keys_of_block` from outside their window, and where these may be dropped.

    Returns:
        Two of [M, BLOCK], the second int32.
    """
    NUM_WORDS: tl.constexpr = (NUM_BUCKETS + 31) // 32
    position = base + local
    routable = known & (bucket < NUM_BUCKETS)
    is_static = known & (bucket == NUM_BUCKETS)
    row = (head * num_local + local).to(tl.int64)
    word = tl.load(
        choice.words + row[:, None] * NUM_WORDS + (bucket >> 5)[None, :],
        mask=computed[:, None] & routable[None, :],
        other=0,
    )
    cut_low = tl.load(choice.cut + row * 2, mask=computed, other=0)
    cut_high = tl.load(choice.cut + row * 2 + 1, mask=computed, other=0)
    found = ((word >> (bucket & 31)[None, :]) & 1) != 0
    found = found & ((slot[None, :] < cut_low[:, None]) | (slot[None, :] >= cut_high[:, None]))
    j = index + key_offset
    older = (j[None, :] <= position[:, None] - window) & (j[None, :] > position[:, None] - sliding_window)
    drew = j[None, :] < (position[:, None] - position[:, None])
    for draw in range(NUM_RANDOM):
        own = tl.load(drawn + local.to(tl.int64) * NUM_RANDOM + draw, mask=computed, other=-1)
        drew = drew | ((own[:, None] == index[None, :]) & known[None, :])
    valid = (((found | is_static[None, :]) & older) | drew) & computed[:, None]
    return valid, (routable[None, :] & ~drew).to(tl.int32)


@triton.jit(do_not_specialize=["num_keys", "key_offset", "base", "start", "end", "num_local", "num_tiles"])
def list_rows_kernel(
    keys,
    choice,
    drawn,
    tiles,
    num_reading,
    readers,
    num_keys,
    key_offset,
    base,
    start,
    end,
    num_local,
    num_tiles,
    interval_size,
    window,
    sliding_window,
    NUM_BUCKETS: tl.constexpr,
    NUM_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows that read a block of slots, of the tiles that may; arguments as `find_readers_kernel` fills them."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    slot, known, index, bucket = keys_of_block(keys, head, block, num_keys, BLOCK)
    place = (head * tl.num_programs(0) + block).to(tl.int64)
    count = 0
    for i in range(tl.load(num_reading + place)):
        tile = tl.load(tiles + place * num_tiles + i)
        local, computed = tile_rows(tile, tl.arange(0, ROWS), base, start, end, interval_size, ROWS)
        valid, _ = read_older(
            choice, drawn, head, local, computed, base, slot, known, index, bucket, num_local, key_offset, window,
            sliding_window, NUM_BUCKETS, NUM_RANDOM,
        )  # fmt: skip
        reads = tl.max(valid.to(tl.int32), 1)
        rows = readers.rows + place * num_local + count + tl.cumsum(reads, 0) - 1
        tl.store(rows, local.to(tl.int16), mask=reads > 0)
        count += tl.sum(reads)
    tl.store(readers.number + place, count)


def find_readers(choice: Choice, runs: Runs, drawn: Tensor, keys: DocumentKeys, span: Span, block: int) -> Readers:
    """The chunk's rows that read each block of so many slots; drawn [local rows, random keys per row]."""
    num_blocks, num_random, order = triton.cdiv(keys.num_keys, block), drawn.shape[1], keys.sorted.order
    slot_of_key = order
    if num_random:
        slot_of_key = torch.empty_like(order)
        slots = torch.arange(keys.num_keys, dtype=torch.int32, device=order.device).expand_as(order)
        slot_of_key.scatter_(1, order.long(), slots)
    tiles, num_reading = keys.empty(num_blocks, span.num_tiles), keys.empty(num_blocks)
    readers = Readers(keys.empty(num_blocks, span.num_local, dtype=torch.int16), keys.empty(num_blocks))
    constants = {"NUM_BUCKETS": keys.num_buckets, "NUM_RANDOM": num_random, "ROWS": span.tile_rows, "BLOCK": block}
    triton_launch.launch(
        find_readers_kernel,
        (num_blocks, keys.num_kv_heads),
        keys.sorted,
        slot_of_key,
        runs,
        drawn,
        tiles,
        num_reading,
        keys.num_keys,
        num_tiles=span.num_tiles,
        NUM_RUNS=keys.bucket_bits,
        BLOCK_TILES=triton.next_power_of_2(span.num_tiles),
        **constants,
        **span.place,
    )
    triton_launch.launch(
        list_rows_kernel,
        (num_blocks, keys.num_kv_heads),
        keys.sorted,
        choice,
        drawn,
        tiles,
        num_reading,
        readers,
        keys.num_keys,
        keys.call.key_offset,
        num_local=span.num_local,
        num_tiles=span.num_tiles,
        window=keys.window,
        sliding_window=keys.sliding_window,
        **constants,
        **span.place,
    )
    return readers
