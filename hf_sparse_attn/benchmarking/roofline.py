"""What the Triton kernels must compute and move, stage by stage, and how long a GPU needs for that at least.

Counts follow the kernels as they are (`ops/triton.py`); how many keys a tile of rows lists is counted on real queries
and keys, as it is the text that decides how much rows near each other find in common. A stage's floor is the longer of
its operations over the rate of the units that do them and its bytes over the memory's bandwidth (Williams, Waterman and
Patterson 2009).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops.common.kept_choice import keeps_choice
from hf_sparse_attn.patterns import LayerPattern, static_positions
from hf_sparse_attn.routing import BucketIndex

SLOTS = 64  # keys that a program of the backward owns
_SORT_PASSES = 4  # of 8 bits each, over a bucket and an index
_CHOICE_STEPS = 93  # instructions of the integer units for each score, as compiled; a third are the 12 halvings
_READER_STEPS = 8  # shift, mask and five comparisons, whether a row reads a key


@dataclass(frozen=True)
class Ceilings:
    """Rates of a GPU: 1e12 floating-point or integer operations per second, memory in 1e12 bytes per second.

    The defaults for bf16 and memory were measured on an H200 (a large matrix product of random numbers, a large copy);
    the others are the vendor's rates of the same chip, scaled alike; an integer instruction counts once.
    """

    bf16: float = 788.0
    tf32: float = 394.0
    fp32: float = 53.0
    int32: float = 13.0
    memory: float = 4.3


@dataclass(frozen=True)
class TileCounts:
    """Means over sampled tiles of one KV head.

    Args:
        rows: of a tile.
        found, listed_found: keys that a row finds through buckets, and different ones that a tile's rows find.
        row_blocks, blocks: runs of SLOTS places in bucket order that hold these.
    """

    rows: int
    found: float
    listed_found: float
    row_blocks: float
    blocks: float


def mean_counts(counts: Sequence[TileCounts]) -> TileCounts:
    """Means of the counts of tiles of as many rows."""
    found = [asdict(x) for x in counts]
    return TileCounts(
        **{name: sum(x[name] for x in found) / len(found) for name in found[0]} | {"rows": counts[0].rows}
    )


@torch.no_grad()
def count_tiles(query: Tensor, key: Tensor, pattern: LayerPattern, rows: int, num_tiles: int = 16) -> TileCounts:
    """Count on tiles spread over the second half of a document.

    Args:
        query: [num_heads, N, head_dim].
        key: [num_key_value_heads, N, head_dim].
        pattern: the layer's pattern, in the dtype of query and key.
        rows: of a tile; they lie in one page.
        num_tiles: tiles per KV head.

    Raises:
        ValueError: if a tile does not fit into a page or the document has too few rows.
    """
    num_kv_heads, num_tokens, _ = key.shape
    page_size = pattern.config.page_size
    if page_size % rows:
        raise ValueError(f"rows={rows} must divide page_size={page_size}")
    spread = torch.linspace(num_tokens // 2, num_tokens - page_size, num_tiles, dtype=torch.float32)
    starts = spread.long() // page_size * page_size
    if int(starts[0]) <= pattern.config.window_size:
        raise ValueError(f"{num_tokens} tokens are too few for a window of {pattern.config.window_size}")
    bucket = pattern.bucket_hash.assign(key)
    static = static_positions(pattern.config, num_tokens, key.device, marked=pattern.marked)
    summed = query.unflatten(0, (num_kv_heads, -1)).sum(1)
    sums: dict[str, float] = defaultdict(float)
    for kv_head in range(num_kv_heads):
        index = BucketIndex(key[kv_head], bucket[kv_head], static, 0, 0, pattern)
        for start in starts.tolist():
            tile, own = index.rows(start, start + rows), summed[kv_head, start : start + rows]
            slots, count = tile.select_slots(own, pattern.budgets[kv_head])
            by_row = [of_row[:number] for of_row, number in zip(slots, count.tolist(), strict=True)]
            sums["found"] += sum(map(len, by_row)) / rows
            sums["row_blocks"] += sum(len((of_row // SLOTS).unique()) for of_row in by_row) / rows
            taken = torch.cat(by_row).unique()
            sums["listed_found"] += len(taken)
            sums["blocks"] += len((taken // SLOTS).unique())
    return TileCounts(rows, **{name: total / (num_kv_heads * len(starts)) for name, total in sums.items()})


def count_stages(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: SparseAttentionConfig,
    counts: TileCounts,
    ceilings: Ceilings,
    backward: tuple[TileCounts, int] | None = None,
) -> list[dict[str, Any]]:
    """Work of one attention in bfloat16, batch 1, values of head_dim.

    Args:
        num_tokens, num_heads, num_kv_heads, head_dim: its shape.
        config: which keys its rows read.
        counts: of tiles of its rows.
        ceilings: of the GPU.
        backward: counts of the backward's tiles, and rows after which it adds to the gradients of all keys; None:
            forward alone.

    Returns:
        For each stage "stage", "gflop" (of the "unit" that does them), "gbyte" and "floor_ms".
    """
    sparse_rows = max(num_tokens - config.dense_below, 0)
    buckets, vector = 2**config.num_hash_bits, 2 * head_dim  # bytes of a key
    tiles, listed, entry, product = _tile_work(counts, sparse_rows, num_heads, num_kv_heads, head_dim, config)
    means = 4 * num_kv_heads * buckets * head_dim * num_tokens / config.page_size
    scores = 4 * num_kv_heads * buckets * sparse_rows
    queries, keys = vector * num_heads * sparse_rows, vector * num_kv_heads * num_tokens
    passes = 2 if any(config.min_weights(0, num_heads)) else 1
    dense_rows = min(config.dense_below, num_tokens)
    kept = 4 * num_kv_heads * sparse_rows * (buckets // 8 + 8)  # the bits of the chosen buckets, copied twice
    routing = [
        ("hash", 2 * num_kv_heads * num_tokens * head_dim * 2 * config.num_hash_bits, "fp32", keys),
        ("sort by bucket", 0.0, "int32", 2.0 * _SORT_PASSES * 8 * num_kv_heads * num_tokens),
        ("bucket means", keys / 2, "fp32", keys + means),
        ("bucket scores", 3 * scores / 2 * head_dim, "tf32", queries + means + scores),
        ("choice of buckets", scores / 4 * _CHOICE_STEPS, "int32", scores + kept / 4),
        ("lists", 0.0, "int32", entry * tiles * listed),
    ]
    attention = [
        ("attention", (passes + 1) * product, "bf16", tiles * listed * (passes + 1) * (vector + entry) + queries)
    ]
    work = [*routing, *attention]
    work.append(
        ("dense rows", 2.0 * num_heads * dense_rows**2 * head_dim, "bf16", 4.0 * vector * num_heads * dense_rows)
    )
    if backward is not None:
        counts, chunk_rows = backward
        tiles, listed, entry, product = _tile_work(counts, sparse_rows, num_heads, num_kv_heads, head_dim, config)
        pairs = counts.rows * num_heads // num_kv_heads
        routing[-1] = ("lists", 0.0, "int32", entry * tiles * listed)
        chunks = -(-sparse_rows // chunk_rows)
        # Rows that read a block of keys, packed; in each chunk half a tile more, as the last one is not full.
        readers = num_kv_heads * (sparse_rows * counts.row_blocks + chunks * num_tokens / SLOTS * counts.rows / 2)
        older = readers / counts.rows * SLOTS + tiles * (config.window_size + counts.rows)
        marked = tiles * counts.blocks * counts.rows
        chosen_again = not keeps_choice(buckets, num_heads // num_kv_heads * head_dim, torch.bfloat16)
        again = [stage for stage in routing if chosen_again or stage[0] in ("hash", "sort by bucket", "lists")]
        work += [(f"{stage}, again", *others) for stage, *others in again]
        if not chosen_again:
            work.append(("chosen buckets, kept", 0.0, "int32", kept))
        work += [
            ("rows of blocks", marked * SLOTS * _READER_STEPS, "int32", marked * 12.0),
            ("gradient of queries", 3 * product, "bf16", tiles * listed * (2 * vector + entry) + 2 * queries),
            (
                "gradient of keys and values",
                8.0 * older * pairs * head_dim,
                "bf16",
                older / SLOTS * pairs * 2 * vector + 2.0 * chunks * 4 * keys,
            ),
        ]
    rates = asdict(ceilings)
    return [
        {
            "stage": stage,
            "unit": unit,
            "gflop": operations / 1e9,
            "gbyte": moved / 1e9,
            "floor_ms": 1e3 * max(operations / rates[unit], moved / rates["memory"]) / 1e12,
        }
        for stage, operations, unit, moved in work
    ]


def _tile_work(
    counts: TileCounts,
    sparse_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: SparseAttentionConfig,
) -> tuple[float, float, int, float]:
    """Tiles, keys that each lists, bytes of an entry, and operations of one product of all rows with listed keys."""
    tiles = num_kv_heads * sparse_rows / counts.rows
    listed = counts.listed_found + config.window_size + counts.rows - 1 + config.num_global_tokens
    entry = 8 if counts.rows <= 32 else 12  # an index, and a bit for each row
    return tiles, listed, entry, 2 * tiles * listed * counts.rows * (num_heads // num_kv_heads) * head_dim


def dense_floor_ms(num_tokens: int, num_heads: int, head_dim: int, ceilings: Ceilings, backward: bool = False) -> float:
    """Time of causal dense attention at the rate of bf16: two products forward, five more backward."""
    pairs = num_heads * num_tokens * (num_tokens + 1) / 2
    return float(1e-9 * (7 if backward else 2) * 2 * pairs * head_dim / ceilings.bf16)


def kernel_milliseconds(run: Callable[[], object]) -> dict[str, float]:
    """Time that each kernel takes on a GPU in one run, by name, as PyTorch's profiler tells."""
    run()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e3 for event in profile.key_averages()}
