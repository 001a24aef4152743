"""The parts that several Triton kernels share: the rows of a tile, loads and stores, scores.

A tile is up to ROWS consecutive rows of one refresh interval, taken together for all query heads of a KV head: M = ROWS
* GROUP_PADDED pairs of a row and a head. The rows of a chunk are counted from position `base` on, where its first
interval begins (`local`); those at positions start .. end - 1 are computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(2**30)  # a position or slot after all others


@triton.jit
def tile_rows(tile, r, base, start, end, interval_size, ROWS: tl.constexpr):
    """Local row of a tile's row `r`, and whether it is computed."""
    per_interval = tl.cdiv(interval_size, ROWS)
    row = (tile % per_interval) * ROWS + r
    local = (tile // per_interval) * interval_size + row
    return local, (row < interval_size) & (base + local >= start) & (base + local < end)


@triton.jit
def tile_pairs(tile, head, base, start, end, interval_size, TILE: tl.constexpr):
    """For each of the tile's M pairs: row in the tile, local row, position, query head, and whether it is computed."""
    ROWS: tl.constexpr = TILE.ROWS
    GROUP: tl.constexpr = TILE.GROUP
    GROUP_PADDED: tl.constexpr = TILE.GROUP_PADDED
    m = tl.arange(0, ROWS * GROUP_PADDED)
    r = m // GROUP_PADDED
    member = m % GROUP_PADDED
    local, computed = tile_rows(tile, r, base, start, end, interval_size, ROWS)
    return r, local, base + local, head * GROUP + member, computed & (member < GROUP)


@triton.jit
def load_rows(x, head, row, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[M, BLOCK_DIM]: rows `row` of heads `head` of a strided tensor, 0 where not `inside`, [M] each."""
    d = tl.arange(0, BLOCK_DIM)
    place = head.to(tl.int64) * x.head + row.to(tl.int64) * x.row
    return tl.load(x.pointer + place[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(x, head, row, inside, values, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store values [M, BLOCK_DIM] to the rows that `load_rows` loads."""
    d = tl.arange(0, BLOCK_DIM)
    place = head.to(tl.int64) * x.head + row.to(tl.int64) * x.row
    values = values.to(x.pointer.dtype.element_ty)
    tl.store(x.pointer + place[:, None] + d[None, :], values, mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def load_keys(x, head, index, inside, d, DIM: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Numbers d [D] of the keys or values `index` [C] of one head of a strided tensor: [C, D], if TRANSPOSED [D, C].

    They are 0 from DIM on and where not `inside` [C], which is None where all are.
    """
    pointer = x.pointer + head.to(tl.int64) * x.head
    if TRANSPOSED:
        place = pointer + index.to(tl.int64)[None, :] * x.row + d[:, None]
        mask = (d < DIM)[:, None]
        if inside is not None:
            mask = inside[None, :] & mask
    else:
        place = pointer + index.to(tl.int64)[:, None] * x.row + d[None, :]
        mask = (d < DIM)[None, :]
        if inside is not None:
            mask = inside[:, None] & mask
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def load_listed(lists, place, c, stop, r):
    """Indices [C] of the keys at the columns c of a list, and which pairs [M, C] score them."""
    index = tl.load(lists.keys + place + c, mask=c < stop, other=0)
    taken = tl.load(lists.rows + place + c, mask=c < stop, other=0)
    return index, ((taken[None, :] >> r[:, None]) & 1) != 0


@triton.jit
def cap(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(scores / SOFTCAP)."""
    return SOFTCAP * (1 - 2 / (tl.exp(2 * scores / SOFTCAP) + 1))


@triton.jit
def score_keys(q, k, SCORE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Scores [M, C] of queries [M, D] on keys k [D, C]."""
    SCALING: tl.constexpr = SCORE.SCALING
    SOFTCAP: tl.constexpr = SCORE.SOFTCAP
    score = tl.dot(q, k, input_precision=PRECISION, out_dtype=ACC) * SCALING
    if SOFTCAP is not None:
        score = cap(score, SOFTCAP)
    return score
