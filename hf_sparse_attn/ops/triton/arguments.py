"""The arguments that kernels are given together: named tuples, of tensors on the host, of their pointers in a kernel.

Triton treats a member of a tuple like an argument of its own: what is known of it (a pointer's alignment, a number that
16 divides or that is 1) is compiled in. Numbers that change from call to call must not be, and stay outside of tuples,
as `do_not_specialize` does not reach into these.

Constants, named in capitals, travel as one `tl.constexpr`. They are numbers, booleans or None: Triton 3.6 reads text in
there as attributes. For the same release a kernel gives a constant a name of its own before it stands in a shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Strided(NamedTuple):
    """A tensor [heads, rows, D], rows in one piece, and the strides of its first two dimensions."""

    pointer: Tensor
    head: int
    row: int


class SortedKeys(NamedTuple):
    """A document's keys by bucket; a slot is a place in `order`.

    Args:
        bucket: [Hkv, N] int32, each key's bucket, B for a static key.
        order: [Hkv, N] int32, indices of the keys, bucket after bucket, oldest first, static keys last.
        first: [Hkv, B + 1] int32, each bucket's first slot, and that of the static keys.
    """

    bucket: Tensor
    order: Tensor
    first: Tensor


class BucketSums(NamedTuple):
    """Sums of the keys of each bucket between two slots; `mean_buckets` moves them on from chunk to chunk.

    Args:
        total: [Hkv, B, D].
        entered, left: [Hkv, B] int32, the keys are those from slot `left` to before slot `entered`.
    """

    total: Tensor
    entered: Tensor
    left: Tensor


class BucketMeans(NamedTuple):
    """The means of the buckets that the rows of each refresh interval may know.

    Args:
        mean: [Hkv, intervals, B, D].
        number: [Hkv, intervals, B] int32, keys in it; a bucket without any is not chosen.
    """

    mean: Tensor
    number: Tensor


class Choice(NamedTuple):
    """The buckets that each row takes keys of; all of their keys older than the window, but for those that are cut.

    Args:
        words: [Hkv, local rows, max(B, 32) / 32] int32, a bit for each bucket.
        cut: [Hkv, local rows, 2] int32, slots cut[0] .. cut[1] - 1 hold the keys of the last bucket that are not taken.
    """

    words: Tensor
    cut: Tensor


class Runs(NamedTuple):
    """Runs of slots that hold what any row of a tile takes.

    Args:
        bucket, low, end: [Hkv, tiles, max(B, 32)] int32, bucket and first slot of each run, and the lengths of the runs
            up to this one added up.
        number: [Hkv, tiles] int32.
    """

    bucket: Tensor
    low: Tensor
    end: Tensor
    number: Tensor


class KeyLists(NamedTuple):
    """The keys that any row of a tile scores.

    Args:
        keys: [Hkv, tiles, capacity] int32, index of the key.
        rows: [Hkv, tiles, capacity] int32, int64 for tiles of 64 rows; bit r is set if row r of the tile scores it.
        fixed: [Hkv, tiles] int32, entries before those found through buckets.
        total: [Hkv, tiles] int32, entries in all.
    """

    keys: Tensor
    rows: Tensor
    fixed: Tensor
    total: Tensor


class Readers(NamedTuple):
    """Rows that score keys of a block of slots from outside their window.

    Args:
        rows: [Hkv, blocks, local rows] int16, ascending.
        number: [Hkv, blocks] int32.
    """

    rows: Tensor
    number: Tensor


class Statistics(NamedTuple):
    """The numbers that the backward needs of each row, [H, R].

    Args:
        logsumexp: of the scores of the attended keys and the sink.
        least: score below which a candidate was dropped; not read where nothing is dropped.
        delta: product of the output and its gradient.
    """

    logsumexp: Tensor
    least: Tensor
    delta: Tensor


class HashTables(NamedTuple):
    """A hash: weight [Hkv, D, CODEBOOKS, 2**CODE_BITS] and bias [Hkv, CODEBOOKS, 2**CODE_BITS]."""

    weight: Tensor
    bias: Tensor


class CachedKeys(NamedTuple):
    """The tables of a decode index, with room for more keys.

    Args:
        bucket, rank: [Hkv, room] int32, each key's bucket (B for a static key, also for those to come) and the number
            of older keys there.
        counts: [Hkv, B + 1] int32, keys of each bucket, static ones last.
        sums, numbers: [Hkv, B, D] and [Hkv, B] int32, of the keys that the bucket means are of.
    """

    bucket: Tensor
    rank: Tensor
    counts: Tensor
    sums: Tensor
    numbers: Tensor


class Progress(NamedTuple):
    """How far the tables of a decode index are, counted back from the rows of a launch, which follow each other.

    Args:
        num_new: keys that are new, the last ones.
        rows_to_end: positions from the first row to after the newest key.
        since_older: positions from the row whose window the older keys were last counted for, to the first row.
        since_known: positions from a row that knows the keys of the bucket sums and no others, to the first row.
    """

    num_new: int
    rows_to_end: int
    since_older: int
    since_known: int


ONE_TOKEN = Progress(1, 1, 1, 1)  # a step of one token after another


class TakenRanks(NamedTuple):
    """The keys each row takes of each bucket, [Hkv, R, B] int32: ranks low .. high - 1, at the places shift + rank."""

    low: Tensor
    high: Tensor
    shift: Tensor


class ScoredColumns(NamedTuple):
    """A decoding row's list of keys and their scores; a program scored BLOCK columns of it, a part.

    Args:
        keys: [Hkv, R, capacity] int32, the key of each column, 0 where there is none.
        scores: [Hkv, R, GROUP_PADDED, capacity], -inf where there is no key.
        largest: [Hkv, R, parts, GROUP_PADDED], the largest score of a part.
        weights: [Hkv, R, parts, GROUP_PADDED], sum of exp(score - largest).
    """

    keys: Tensor
    scores: Tensor
    largest: Tensor
    weights: Tensor


class Tile(NamedTuple):
    """Sizes that the kernels of the attention are compiled for.

    Args:
        ROWS: query tokens that a program takes.
        GROUP, GROUP_PADDED: query heads of a KV head, and how many there is room for.
        HEAD_DIM, BLOCK_DIM: of queries and keys; room for it.
        VALUE_DIM, BLOCK_VALUE_DIM: of values; room for it.
        BLOCK: keys that are loaded together.
    """

    ROWS: int
    GROUP: int
    GROUP_PADDED: int
    HEAD_DIM: int
    BLOCK_DIM: int
    VALUE_DIM: int
    BLOCK_VALUE_DIM: int
    BLOCK: int


class Score(NamedTuple):
    """How a product of query and key becomes a score: times SCALING, then capped at SOFTCAP, unless that is None."""

    SCALING: float
    SOFTCAP: float | None


class HashSizes(NamedTuple):
    """Sizes that the kernels that hash keys are compiled for; BLOCK_K numbers of a key are multiplied at a time."""

    HEAD_DIM: int
    CODEBOOKS: int
    CODEBOOKS_PADDED: int
    CODE_BITS: int
    BLOCK_K: int


class AttentionConstants(NamedTuple):
    """Constants of the kernels of the attention; DROP: candidates of too little weight are dropped."""

    TILE: Tile
    SCORE: Score
    DROP: bool
    PRECISION: str
    ACC: Any  # a Triton dtype
