"""Sparse attention with its inner loop compiled by Numba: on a CPU, forward and backward, memory linear in the length.

A row goes through its keys once: walk down its ranked buckets, score every key found, exact softmax, weighted sum. Keys
and values of a bucket stand side by side in memory, and each is loaded once for all query heads of its KV head. Two
steps are left to libraries that do them better: the products of queries and bucket means (PyTorch) and the sort of the
buckets' scores (NumPy).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse_attn.ops.numba_kernels import (
    add_keys,
    attend_rows,
    average_keys,
    count_keys,
    differentiate_rows,
    find_rows,
    label_buckets,
)
from hf_sparse_attn.ops.pieces import Call, Piece, attend_in_pieces
from hf_sparse_attn.ops.simd import LANES
from hf_sparse_attn.ops.workers import in_order
from hf_sparse_attn.routing import MEANS_LAG, LayerPattern, random_positions, static_positions

_UNBOUNDED = 2**40  # stands for no sliding window
_MIN_CHUNK_PAGES = 16
_MAX_CHUNKS = 8  # of a document's rows

Array = NDArray[Any]


@dataclass(frozen=True)
class _Head:
    """What all rows of one KV head of one document share.

    Args:
        kv_head: which KV head it is.
        key, value: [N, head_dim], head_dim filled up with zeros to a multiple of LANES.
        static: sorted positions of the static keys, int64.
        bucket: [N] int32; keys that are never routed have the number of buckets.
        order: [N] int32, keys by bucket, oldest first.
        first: [num_buckets] int32, where each bucket begins in `order`; empty if nothing is routed.
        table_key, table_value: key[order], value[order].
    """

    kv_head: int
    key: Array
    value: Array
    static: Array
    bucket: Array
    order: Array
    first: Array
    table_key: Array
    table_value: Array

    @classmethod
    def of(cls, call: Call, kv_head: int, key: Tensor, value: Tensor, bucket: Tensor, static: Tensor) -> _Head:
        """Of key and value [N, head_dim] with their buckets [N]."""
        num_buckets = call.pattern.bucket_hash.num_buckets if call.budget(kv_head) else 0
        own, held = bucket.int(), static - call.key_offset
        own[held[(held >= 0) & (held < len(own))]] = num_buckets
        sorted_bucket, order = torch.sort(own, stable=True)
        first = torch.searchsorted(sorted_bucket, torch.arange(num_buckets, dtype=torch.int32)).int()
        key, value = _filled(key), _filled(value)
        tables = key.index_select(0, order), value.index_select(0, order)
        return cls(kv_head, *(x.numpy() for x in (key, value, static, own, order.int(), first, *tables)))


@dataclass
class _State:
    """What rows may know of the buckets; moves on with them.

    Args:
        sums, counts: [num_buckets, head_dim] and [num_buckets]: sums and numbers of the keys before a row's page.
        upper: [num_buckets], keys that are older than a row's window.
        lower: [num_buckets], of these, keys that are outside of the model's own window.
        reach: how many keys have been added to sums, taken away again, counted in upper, and in lower.
    """

    sums: Array
    counts: Array
    upper: Array
    lower: Array
    reach: Array

    @classmethod
    def empty(cls, head: _Head) -> _State:
        num_buckets = len(head.first)
        counts, upper, lower = np.zeros((3, num_buckets), np.int32)
        sums = np.zeros((num_buckets, head.key.shape[1]), head.key.dtype)
        return cls(sums, counts, upper, lower, np.zeros(4, np.int64))

    def copy(self) -> _State:
        return _State(*(x.copy() for x in vars(self).values()))


def _pieces(query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call) -> Iterator[Piece]:
    for heads, rows, kv_heads, chunk in _chunks(query, key, value, start, end, call):
        yield Piece(heads, rows, kv_heads, chunk.attend, chunk.differentiate)


def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """See `ops.find_keys`."""
    call = Call(_pieces, pattern, 0, 0, 1.0, None, True, None)
    start, end = call.dense_end(key.shape[1]), key.shape[1]
    chunks = _chunks(query, key, key, start, end, call) if end > start else ()
    for _ in in_order(lambda part: part[-1].find(query[part[0], part[1]]), chunks, torch.get_num_threads()):
        pass


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call
) -> Iterator[tuple[slice, slice, slice, _Chunk]]:
    """Rows at positions start .. end - 1, chunk after chunk of each KV head: heads, rows, KV heads and the chunk."""
    pattern, offset = call.pattern, call.query_offset
    group, page_size = len(query) // len(key), pattern.config.page_size
    chunk_rows = max(_MIN_CHUNK_PAGES, -(-key.shape[1] // (_MAX_CHUNKS * page_size))) * page_size
    static = static_positions(pattern.config, end, key.device)
    bucket = pattern.bucket_hash.assign(key)
    for kv_head in range(len(key)):
        head = _Head.of(call, kv_head, key[kv_head], value[kv_head], bucket[kv_head], static)
        state = _State.empty(head)
        row = start
        while row < end:
            stop = min((row // chunk_rows + 1) * chunk_rows, end)
            _move(call, head, state, row)
            heads, rows = slice(kv_head * group, (kv_head + 1) * group), slice(row - offset, stop - offset)
            yield heads, rows, slice(kv_head, kv_head + 1), _Chunk(call, head, state.copy(), row)
            row = stop


def _move(call: Call, head: _Head, state: _State, row: int) -> None:
    """Bring the state to the row at this position."""
    config = call.pattern.config
    page = row // config.page_size * config.page_size
    sliding_window = call.pattern.sliding_window or _UNBOUNDED
    num_keys = len(head.key)
    if not len(head.first):
        return
    lags = MEANS_LAG, sliding_window - config.page_size + 1
    for sign, lag, which in zip((1, -1), lags, (0, 1), strict=True):
        target = min(max(page - lag + 1 - call.key_offset, 0), num_keys)
        add_keys(head.key, head.bucket, state.reach, which, target, sign, state.sums, state.counts)
    count_keys(head.bucket, state.reach, 2, row - config.window_size + 1 - call.key_offset, state.upper)
    count_keys(head.bucket, state.reach, 3, row - sliding_window + 1 - call.key_offset, state.lower)


@dataclass
class _Chunk:
    """Rows from position `start` on of the query heads that share a KV head; one use moves the state on."""

    call: Call
    head: _Head
    state: _State
    start: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        """[group, R, head_dim], the KV head's keys and values again, and [group] or None -> [group, R, head_dim]."""
        rows = _by_row(query * self.call.scaling)
        output = np.empty((*rows.shape[:2], self.head.value.shape[1]), rows.dtype)
        for page, read in self._pages(rows, sinks, output, self.call.recorder is not None):
            if self.call.recorder is not None:
                self._record(page, read)
        return torch.from_numpy(output).transpose(0, 1)[..., : value.shape[-1]]

    def differentiate(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of the arguments of `attend` for that of its result."""
        rows, upstream = _by_row(query * self.call.scaling), _by_row(grad)
        head = self.head
        query_grad, key_grad, value_grad = (np.zeros_like(x) for x in (rows, head.key, head.value))
        table_key_grad, table_value_grad = np.zeros_like(key_grad), np.zeros_like(value_grad)
        sinks_grad = np.zeros(0 if sinks is None else len(sinks), rows.dtype)
        near = np.empty(self._num_columns(), np.int32)
        kept, slopes, capped = (np.empty((1, rows.shape[1], self._num_columns()), rows.dtype) for _ in range(3))
        for page, read in self._pages(rows, sinks, None, True):
            differentiate_rows(
                upstream[page],
                rows[page],
                head.key,
                head.value,
                head.table_key,
                head.table_value,
                read.weights,
                read.slots,
                read.sizes,
                self.call.softcap or 0.0,
                near,
                kept,
                slopes,
                capped,
                query_grad[page],
                key_grad,
                value_grad,
                table_key_grad,
                table_value_grad,
                sinks_grad,
            )
        key_grad[head.order] += table_key_grad
        value_grad[head.order] += table_value_grad
        grads = (
            torch.from_numpy(query_grad).transpose(0, 1)[..., : query.shape[-1]] * self.call.scaling,
            torch.from_numpy(key_grad)[None, :, : key.shape[-1]],
            torch.from_numpy(value_grad)[None, :, : value.shape[-1]],
        )
        return grads if sinks is None else (*grads, torch.from_numpy(sinks_grad))

    def _pages(
        self, rows: Array, sinks: Tensor | None, output: Array | None, keep: bool
    ) -> Iterator[tuple[slice, _Read]]:
        """Compute page after page of the rows [R, group, head_dim], into `output` unless that is None.

        What is read of a page is overwritten by the next one, and has no meaning unless `keep`.
        """
        call, head, state = self.call, self.head, self.state
        pattern, config = call.pattern, call.pattern.config
        group = rows.shape[1]
        sliding_window = pattern.sliding_window or _UNBOUNDED
        kept_rows = min(config.page_size, len(rows)) if keep else 1
        read = _Read(
            np.empty((kept_rows, group, self._num_columns()), rows.dtype),
            np.empty((kept_rows, self._num_columns()), np.int32),
            np.empty((kept_rows, 3), np.int32),
        )
        min_weights = np.array(pattern.min_weights[head.kv_head * group : (head.kv_head + 1) * group], rows.dtype)
        own_sinks = np.zeros(0, rows.dtype) if sinks is None else sinks.detach().numpy()
        drawn = _random_keys(call, head, self.start, len(rows))
        for page, ranked in self._ranked(rows):
            attend_rows(
                self.start + page.start,
                rows[page],
                head.key,
                head.value,
                call.key_offset,
                head.table_key,
                head.table_value,
                head.order,
                head.first,
                ranked,
                ranked.view(_integer(ranked)),
                head.bucket,
                state.upper,
                state.lower,
                state.reach,
                min(config.window_size, sliding_window),
                sliding_window,
                head.static,
                call.budget(head.kv_head),
                min_weights,
                call.softcap or 0.0,
                own_sinks,
                drawn[page],
                rows[:0] if output is None else output[page],
                read.weights,
                read.slots,
                read.sizes,
                keep,
            )
            yield page, read

    def _ranked(self, rows: Array) -> Iterator[tuple[slice, Array]]:
        """The buckets of each page's rows from the worst to the best: scores [R, num_buckets] with the numbers inside.

        The state is brought to the page's first row.
        """
        state, page_size = self.state, self.call.pattern.config.page_size
        summed = torch.from_numpy(rows).sum(1)
        means = torch.empty(state.sums.shape, dtype=summed.dtype)
        low, end = self.start, self.start + len(rows)
        while low < end:
            high = min((low // page_size + 1) * page_size, end)
            page = slice(low - self.start, high - self.start)
            _move(self.call, self.head, state, low)
            average_keys(state.sums, state.counts, means.numpy())
            ranked = (summed[page] @ means.T).numpy()
            label_buckets(ranked, ranked.view(_integer(ranked)), state.counts)
            ranked.sort(-1)
            yield page, ranked
            low = high

    def find(self, query: Tensor) -> None:
        """Find the keys of the rows [group, R, head_dim] and drop them."""
        head, state, pattern = self.head, self.state, self.call.pattern
        lags = pattern.config.window_size, pattern.sliding_window or _UNBOUNDED
        budget = self.call.budget(head.kv_head)
        slots = np.empty(budget + LANES, np.int32)
        for page, ranked in self._ranked(_by_row(query)):
            find_rows(
                self.start + page.start,
                page.stop - page.start,
                ranked,
                ranked.view(_integer(ranked)),
                head.first,
                head.bucket,
                state.upper,
                state.lower,
                state.reach,
                lags,
                budget,
                slots,
            )

    def _num_columns(self) -> int:
        config = self.call.pattern.config
        fixed = len(self.head.static) + config.window_size + config.num_random_keys
        return _padded(fixed) + _padded(self.call.budget(self.head.kv_head)) + LANES

    def _record(self, page: slice, read: _Read) -> None:
        position = torch.arange(self.start + page.start, self.start + page.stop)
        weights, slots, sizes = (x[: len(position)] for x in (read.weights, read.slots, read.sizes))
        column = np.arange(slots.shape[1])
        num_fixed, first_found, stop = (sizes[:, i, None] for i in range(3))
        fixed, found = column < num_fixed, (column >= first_found) & (column < stop)
        slots = np.where(found, self.head.order[np.where(found, slots, 0)], slots)
        keys = torch.from_numpy(slots).long() + self.call.key_offset
        for i in range(weights.shape[1]):
            attended = torch.from_numpy(fixed | (found & (weights[:, i] != 0)))
            head = self.head.kv_head * weights.shape[1] + i
            self.call.record(head, position, attended, int(fixed.sum() + found.sum()), lambda: keys)


@dataclass(frozen=True)
class _Read:
    """What rows read.

    Args:
        weights: [R, group, C]; 0 for keys that were found and are not read.
        slots: [R, C] int32, index of each weight's key; of found keys, in the tables.
        sizes: [R, 3] int32: the columns up to the first number hold the fixed keys, from the second to the third the
            found ones.
    """

    weights: Array
    slots: Array
    sizes: Array


def _integer(scores: Array) -> type:
    """The integers of the scores' size."""
    return np.int32 if scores.dtype == np.float32 else np.int64


def _padded(number: int) -> int:
    return -(-number // LANES) * LANES


def _by_row(x: Tensor) -> Array:
    """[group, R, head_dim] -> [R, group, head_dim], filled up to a multiple of LANES."""
    return _filled(x.transpose(0, 1)).numpy()


def _filled(x: Tensor) -> Tensor:
    """Contiguous, without gradients, the last dimension filled up with zeros to a multiple of LANES."""
    missing = _padded(x.shape[-1]) - x.shape[-1]
    return F.pad(x.detach(), (0, missing)) if missing else x.detach().contiguous()


def _random_keys(call: Call, head: _Head, start: int, num_rows: int) -> Array:
    """Keys that the seeded random pattern adds to each row: [R, num_random_keys] indices, -1 where it adds none."""
    config, offset = call.pattern.config, call.key_offset
    position = torch.arange(start, start + num_rows)
    drawn = random_positions(config, position).sort(-1).values
    sliding_window = call.pattern.sliding_window or _UNBOUNDED
    seen = (drawn > position[:, None] - min(config.window_size, sliding_window)) | (drawn < offset)
    seen |= torch.isin(drawn, torch.from_numpy(head.static)) | (drawn <= position[:, None] - sliding_window)
    seen[:, 1:] |= drawn[:, 1:] == drawn[:, :-1]
    return (drawn - offset).masked_fill_(seen, -1).int().numpy()


document_attention = partial(attend_in_pieces, _pieces)
