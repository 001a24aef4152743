"""A document's keys by bucket, and a chunk of its rows: what the kernels are launched for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import BucketSums, SortedKeys
from hf_sparse_attn.ops.triton.hash_keys import hash_keys, sort_by_bucket
from hf_sparse_attn.patterns import LayerPattern, static_positions

_UNBOUNDED = 2**30  # stands for no sliding window


class DocumentKeys:
    """A document's keys by bucket, and the sums of buckets as the next chunk's first interval may know them."""

    def __init__(
        self, query: Tensor, key: Tensor, start: int, end: int, call: Call, bucket: Tensor | None = None
    ) -> None:
        """Rows at positions start .. end - 1 of query [H, R, D] are computed, over keys [Hkv, N, D].

        If given, `bucket` [Hkv, N or more] int32 has the keys' buckets.
        """
        pattern, config = call.pattern, call.pattern.config
        self.num_kv_heads, self.num_keys, self.head_dim = key.shape
        self.call, self.key, self.query_shape = call, key, query.shape
        self.acc = pattern.bucket_hash.weight.dtype
        self.precision = triton_launch.precision(query.dtype)
        self.group = len(query) // self.num_kv_heads
        self.rows, self.group_padded = triton_launch.tile_shape(query, self.group, config.page_size, call.backward)
        self.window = pattern.window(end)
        self.sliding = pattern.sliding_window is not None
        self.sliding_window = pattern.sliding_window or _UNBOUNDED
        self.budgets = [call.budget(kv_head, self.num_keys) for kv_head in range(self.num_kv_heads)]
        self.budget_table = torch.tensor(self.budgets, dtype=torch.int32, device=key.device)
        self.log_min_weights = log_min_weights(pattern)
        self.num_buckets = pattern.bucket_hash.num_buckets
        self.bucket_bits = max(self.num_buckets, 32)  # in whole words
        self.static = static_positions(config, end, key.device, marked=pattern.marked).int()

        if bucket is not None:
            bucket = bucket[:, : self.num_keys].contiguous()
        elif any(self.budgets):
            bucket = hash_keys(pattern, key)
        else:
            bucket = torch.zeros(key.shape[:2], dtype=torch.int32, device=key.device)
        held = self.static[self.static >= call.key_offset] - call.key_offset
        bucket[:, held.long()] = self.num_buckets  # static keys get a bucket of their own after all others
        _, order, first = sort_by_bucket(bucket, self.num_buckets)
        self.sorted = SortedKeys(bucket, order.int(), first)
        entered, left = first[:, :-1].repeat(2, 1, 1)
        sums = key.new_zeros(self.num_kv_heads, self.num_buckets, self.head_dim, dtype=self.acc)
        self.sums = BucketSums(sums, entered, left)

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """A table of every KV head, [Hkv, *shape]."""
        return torch.empty(self.num_kv_heads, *shape, dtype=dtype, device=self.key.device)


@dataclass(frozen=True)
class Span:
    """A chunk of rows, those at positions start .. end - 1: whole refresh intervals or one part of a large one.

    Args:
        start, end: see above.
        base: position at which the first interval, or the part of one, begins.
        num_intervals: how many begin there.
        interval_size: rows of each.
        tile_rows: rows of a tile.
    """

    start: int
    end: int
    base: int
    num_intervals: int
    interval_size: int
    tile_rows: int

    @property
    def num_local(self) -> int:
        """Rows of the intervals, whether they are computed or not."""
        return self.num_intervals * self.interval_size

    @property
    def tiles_per_interval(self) -> int:
        return -(-self.interval_size // self.tile_rows)

    @property
    def num_tiles(self) -> int:
        return self.num_intervals * self.tiles_per_interval

    @property
    def place(self) -> dict[str, int]:
        """Where the chunk lies, as the kernels are told."""
        return {"base": self.base, "start": self.start, "end": self.end, "interval_size": self.interval_size}

    def first_rows(self, device: torch.device) -> Tensor:
        """Position of the first row of each tile: [tiles]."""
        tile = torch.arange(self.num_tiles, device=device)
        row = tile % self.tiles_per_interval * self.tile_rows
        return self.base + tile // self.tiles_per_interval * self.interval_size + row

    def tile_of(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The tiles that have the rows at these positions, and their places in them."""
        local = position - self.base
        interval, row = local // self.interval_size, local % self.interval_size
        return interval * self.tiles_per_interval + row // self.tile_rows, row % self.tile_rows


def log_min_weights(pattern: LayerPattern) -> Tensor:
    """Logarithm of each query head's smallest weight of a found key, [num_heads], in the dtype of the hash."""
    logarithms = [math.log(weight) if weight else -math.inf for weight in pattern.min_weights]
    return torch.tensor(logarithms, dtype=pattern.bucket_hash.weight.dtype, device=pattern.bucket_hash.weight.device)
