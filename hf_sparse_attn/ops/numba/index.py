"""The hash index of a cached document: what lets a decoding step find its keys without looking at all of them."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
from torch import Tensor

from hf_sparse_attn.ops.numba.kernels import (
    State,
    hash_keys,
    link_keys,
    move_back,
    unlink_keys,
)
from hf_sparse_attn.ops.numba.layout import padded
from hf_sparse_attn.ops.numba.rules import UNBOUNDED
from hf_sparse_attn.ops.numba.simd import LANES
from hf_sparse_attn.patterns import LayerPattern, static_positions
from hf_sparse_attn.routing import MEANS_LAG

FEW = 8  # rows or keys from which on libraries and threads pay


class Index:
    """The keys of one document in a cache, by bucket: what a row needs to find its keys without looking at all of them.

    Each bucket is a list that its newest key begins, so appending a key takes the same time however many there are.
    Only `document_attention` of this module appends; it finds the new keys by itself.

    Args:
        pattern: the layer's pattern.
        num_kv_heads: KV heads.
        key_offset: position of the first key.
    """

    knows_sliding_windows = True
    has_fixed_steps = False

    def __init__(self, pattern: LayerPattern, num_kv_heads: int, key_offset: int) -> None:
        self.pattern, self.key_offset = pattern, key_offset
        self.length = self.row = 0
        num_buckets = pattern.bucket_hash.num_buckets
        weight, bias = pattern.bucket_hash.weight, pattern.bucket_hash.bias
        self._hash = weight.flatten(2).numpy(), bias.flatten(1).numpy(), bias.shape[2]
        head_dim, dtype = padded(weight.shape[1]), self._hash[0].dtype
        self.bucket, self.previous = np.zeros((2, num_kv_heads, 0), np.int32)
        self.tail = np.full((num_kv_heads, num_buckets), -1, np.int32)
        self.static = np.zeros(0, np.int64)
        self.states = empty_states(num_kv_heads, num_buckets, head_dim, dtype)

    def append(self, key: Tensor) -> None:
        """Take in the keys of [num_key_value_heads, N, head_dim] after the first `length`."""
        start, stop = self.length, key.shape[1]
        if start == stop:
            return
        if stop > self.bucket.shape[1]:
            room = stop + stop // 8 + 64 - start
            self.bucket, self.previous = (
                np.pad(x[:, :start], ((0, 0), (0, room))) for x in (self.bucket, self.previous)
            )
        bucket_hash = self.pattern.bucket_hash
        new = key[:, start:].to(bucket_hash.weight.dtype)
        if stop - start <= FEW:
            hash_keys(new.numpy(), *self._hash, self.bucket, start)
        else:
            self.bucket[:, start:stop] = bucket_hash.assign(new).numpy()
        config, offset = self.pattern.config, self.key_offset
        static = static_positions(config, offset + stop, key.device, offset + start, self.pattern.marked)
        if len(static):
            never_route(self.bucket, static.numpy() - offset, self.tail.shape[1])
            self.static = np.concatenate([self.static, static.numpy()])
        link_keys(self.bucket, self.previous, self.tail, start, stop)
        self.length = stop

    def crop(self, length: int) -> None:
        """Forget the keys after the first `length`."""
        if length >= self.length:
            return
        row = length + self.key_offset
        self.move_back(row)
        unlink_keys(self.bucket, self.previous, self.tail, length, self.length)
        self.static = self.static[: np.searchsorted(self.static, row)]
        self.length = length

    def move_back(self, row: int) -> None:
        """Let rows from this position on be computed, again where they have been."""
        if row < self.row:
            config = self.pattern.config
            window = self.pattern.window(UNBOUNDED)
            page = row // config.page_size * config.page_size
            older, known = row - window + 1 - self.key_offset, page - MEANS_LAG + 1 - self.key_offset
            move_back(self.bucket, self.previous, self.states, older, known)
            self.row = row

    def copy(self) -> Index:
        """Another one, of the same keys."""
        other = copy(self)
        other.bucket, other.previous, other.tail = (x.copy() for x in (self.bucket, self.previous, self.tail))
        other.states = State(*(x.copy() for x in self.states))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Index:
        return self.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        arrays = (self.bucket, self.previous, self.tail, self.static, *self.states)
        return sum(x.nbytes for x in arrays)


def never_route(bucket: Any, static: Any, num_buckets: int) -> None:
    """Put the static keys at these indices, of which some may not be held, into a bucket after all others [..., N]."""
    bucket[:, static[(static >= 0) & (static < bucket.shape[1])]] = num_buckets


def empty_states(num_kv_heads: int, num_buckets: int, head_dim: int, dtype: Any) -> State:
    """Those of all KV heads: each array has the heads first."""
    capacity = -(-max(num_buckets, 1) // (2 * LANES)) * 2 * LANES
    counts, upper, lower = np.zeros((3, num_kv_heads, num_buckets), np.int32)
    newest, place = np.full((2, num_kv_heads, num_buckets), -1, np.int32)
    listed, available = np.zeros((2, num_kv_heads, capacity), np.int32)
    return State(
        sums=np.zeros((num_kv_heads, num_buckets, head_dim), dtype),
        counts=counts,
        upper=upper,
        newest=newest,
        lower=lower,
        place=place,
        listed=listed,
        means=np.zeros((num_kv_heads, capacity // LANES, head_dim, LANES), dtype),
        available=available,
        reach=np.zeros((num_kv_heads, 5), np.int64),
    )


def of_head(states: State, kv_head: int) -> State:
    return State(*(x[kv_head] for x in states))
