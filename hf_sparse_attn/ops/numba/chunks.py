"""Sparse attention with its inner loop compiled by Numba: on a CPU, forward and backward, memory linear in the length.

A row goes through its keys once: choose its buckets, score every key found, exact softmax, weighted sum. Keys and
values of a bucket stand side by side in memory, and each is loaded once for all query heads of its KV head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.ops.backend import compute_dtype
from hf_sparse_attn.ops.common.chunked import Call, Piece
from hf_sparse_attn.ops.common.threads import in_order
from hf_sparse_attn.ops.numba.backward_kernels import PAIRS, Space, differentiate_rows
from hf_sparse_attn.ops.numba.dense_rows import attend_scored
from hf_sparse_attn.ops.numba.index import Index, empty_states, never_route, of_head
from hf_sparse_attn.ops.numba.kernels import STAGES as ROW_STAGES
from hf_sparse_attn.ops.numba.kernels import (
    Array,
    Head,
    Read,
    Rules,
    State,
    attend_rows,
    move,
)
from hf_sparse_attn.ops.numba.layout import as_array, by_row, filled, flat_output, flat_rows, padded, widened
from hf_sparse_attn.ops.numba.rules import make_rules, num_columns, record
from hf_sparse_attn.ops.numba.tile import ROWS
from hf_sparse_attn.patterns import LayerPattern, num_row_keys, row_keys, static_positions

_MIN_CHUNK_PAGES = 4
_MAX_CHUNKS = 8  # of a document's sparse rows
_MOST_KEPT_ROWS = 64  # whose weights exist at a time
_SCORED_ROWS = 256  # of a piece whose rows score every key
_NOTHING = np.zeros(0, np.int32)

STAGES = ("hash", "tables", *ROW_STAGES)
_FIRST_OF_ROWS = STAGES.index(ROW_STAGES[0])


def _head(call: Call, kv_head: int, key: Tensor, value: Tensor, bucket: Tensor, static: Tensor) -> Head:
    """Of one KV head's keys and values [N, head_dim] with their buckets [N] int32, those of static keys set."""
    num_buckets = call.pattern.bucket_hash.num_buckets if call.budget(kv_head, len(key)) else 0
    sorted_bucket, order = torch.sort(bucket, stable=True)
    first = torch.searchsorted(sorted_bucket, torch.arange(num_buckets, dtype=torch.int32)).int()
    key, value = filled(key), filled(value)
    tables = key.index_select(0, order), value.index_select(0, order)
    arrays = (as_array(x) for x in (static, bucket, order.int(), first, *tables))
    return Head(as_array(key), as_array(value), call.key_offset, *arrays, _NOTHING)  # type: ignore[call-arg]


def sparse_pieces(
    index: Index | None, query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call
) -> Iterator[Piece]:
    # At once, while PyTorch has all threads.
    bucket = _buckets(key, call.pattern) if index is None else torch.from_numpy(index.bucket[:, : index.length])
    # In the backward each chunk adds to the gradients of all keys: no more of them than keep the threads busy.
    num_chunks = -(-2 * torch.get_num_threads() // len(key)) if call.backward else _MAX_CHUNKS
    first = [max(start, _scored_end(call, kv_head, key.shape[1], end)) for kv_head in range(len(key))]
    scored = _scored_pieces(len(query) // len(key), start, first, call)
    chunks = _chunks(query, key, value, bucket, first, end, call, num_chunks, index)
    return chain(
        scored,
        (Piece(heads, rows, kv_heads, chunk.attend, chunk.differentiate) for heads, rows, kv_heads, chunk in chunks),
    )


def _scored_end(call: Call, kv_head: int, num_keys: int, end: int) -> int:
    """The rows before this position score every key up to their own, as the KV head's budget covers them all, and need
    no buckets; a recorder and the backward ask what they read, and find it by buckets."""
    pattern, config = call.pattern, call.pattern.config
    plain = call.softcap is None and pattern.sliding_window is None and not num_row_keys(config)
    in_time = config.window_size >= config.page_size  # no key leaves the window before its bucket is known
    if call.backward or call.recorder is not None or not plain or not in_time:
        return 0
    return min(call.budget(kv_head, num_keys) + config.window_size, end)


def _scored_pieces(group: int, start: int, ends: list[int], call: Call) -> Iterator[Piece]:
    """The rows of each KV head from position `start` up to its end, which score every key up to their own, by tiles."""
    pattern, end = call.pattern, max(ends)
    static = static_positions(pattern.config, end, torch.device("cpu"), marked=pattern.marked).numpy() - call.key_offset
    for kv_head, stop in enumerate(ends):
        heads, kv_heads = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
        for row in range(start, stop, _SCORED_ROWS):
            rows = slice(row - call.query_offset, min(row + _SCORED_ROWS, stop) - call.query_offset)
            keys = slice(0, rows.stop + call.query_offset - call.key_offset)
            attend = partial(attend_scored, call, row - call.key_offset, kv_head, static)
            yield Piece(heads, rows, kv_heads, attend, _no_backward, keys)


def _no_backward(*_: Tensor) -> tuple[Tensor, ...]:
    raise AssertionError("in the backward these rows are pieces as all others")


def _buckets(key: Tensor, pattern: LayerPattern) -> Tensor:
    return pattern.bucket_hash.assign(widened(key))


def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """See `ops.find_keys`."""
    run_stages(query, key, key, pattern, 1.0, "keys found")


def run_stages(query: Tensor, key: Tensor, value: Tensor, pattern: LayerPattern, scaling: float, last: str) -> None:
    """Compute a document's sparse rows up to one of STAGES and drop the result: to measure what each stage costs.

    Args:
        query: [num_heads, N, head_dim].
        key, value: [num_key_value_heads, N, head_dim].
        pattern: the layer's pattern.
        scaling: factor on query . key.
        last: the last stage that is computed.
    """
    call = Call(partial(sparse_pieces, None), pattern, scaling=scaling)
    start, end = call.dense_end(key.shape[1]), key.shape[1]
    until = STAGES.index(last)
    if start == end:
        return

    output = widened(query).new_empty(key.shape[1], len(query), value.shape[-1]).transpose(0, 1)

    def work(part: tuple[slice, slice, slice, _Chunk]) -> None:
        heads, rows, _, chunk = part
        if until >= _FIRST_OF_ROWS:
            chunk.compute(query[heads, rows], None, output[heads, rows], until)

    bucket = _buckets(key, pattern)
    if last == "hash":
        return
    parts = _chunks(query, key, value, bucket, [start] * len(key), end, call, _MAX_CHUNKS)
    for _ in in_order(work, parts, torch.get_num_threads()):
        pass


def _chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bucket: Tensor,
    first: list[int],
    end: int,
    call: Call,
    num_chunks: int,
    index: Index | None = None,
) -> Iterator[tuple[slice, slice, slice, _Chunk]]:
    """Rows from position first[KV head] to end - 1, chunk after chunk: heads, rows, KV heads and the chunk.

    They go on from the states of `index`, and move these, where there is one.
    """
    pattern, offset = call.pattern, call.query_offset
    group, page_size = len(query) // len(key), pattern.config.page_size
    dtype = np.float64 if query.dtype == torch.float64 else np.float32
    chunk_rows = max(_MIN_CHUNK_PAGES, -(-(end - min(first)) // (num_chunks * page_size))) * page_size
    static = static_positions(pattern.config, end, key.device, marked=pattern.marked)
    if index is None:  # an index has done this to its own
        bucket = bucket.int()
        never_route(bucket, static - call.key_offset, pattern.bucket_hash.num_buckets)
    for kv_head in range(len(key)):
        if first[kv_head] == end:
            continue
        head = _head(call, kv_head, key[kv_head], value[kv_head], bucket[kv_head], static)
        heads, row = slice(kv_head * group, (kv_head + 1) * group), first[kv_head]
        rules = make_rules(call, call.budget(kv_head, key.shape[1]), np.array(pattern.min_weights[heads], dtype))
        if index is None or not len(head.first):
            state = of_head(empty_states(1, len(head.first), head.key.shape[1], dtype), 0)
        else:
            state = of_head(index.states, kv_head)
        while row < end:
            stop = min(row // page_size * page_size + chunk_rows, end)
            move(head, state, rules, row)
            known = State(*(x.copy() for x in state))
            rows = slice(row - offset, stop - offset)
            yield heads, rows, slice(kv_head, kv_head + 1), _Chunk(call, rules, kv_head, head, known, row)
            row = stop


@dataclass
class _Chunk:
    """Rows from position `start` on of the query heads that share a KV head; one use moves the state on."""

    call: Call
    rules: Rules
    kv_head: int
    head: Head
    state: State
    start: int

    def attend(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> None:
        """Fill output [group, R, head_dim] for query [group, R, head_dim], the KV head's keys and values and sinks."""
        with flat_output(output, compute_dtype(query, key)) as own:
            self.compute(query, sinks, own)

    def compute(self, query: Tensor, sinks: Tensor | None, output: Tensor, until: int = len(STAGES) - 1) -> None:
        """As `attend`, but nothing is computed after the stage `until`; each row of `output` must be contiguous."""
        rows = by_row(widened(query) * self.call.scaling)
        for page, read in self._read(rows, sinks, output, until, self.call.recorder is not None):
            if self.call.recorder is not None:
                positions = torch.arange(self.start + page.start, self.start + page.stop)
                record(self.call, self.kv_head, positions, read, self.head.order)

    def differentiate(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of the arguments of `attend` for that of its result."""
        rows, upstream = by_row(widened(query) * self.call.scaling), by_row(widened(grad))
        head = self.head
        query_grad, key_grad, value_grad = (np.zeros_like(x, rows.dtype) for x in (rows, head.key, head.value))
        space = None
        sinks_grad = np.zeros(0 if sinks is None else len(sinks), rows.dtype)
        for page, read in self._read(rows, sinks, None, STAGES.index("softmax"), True):
            space = space or _space(read, head)
            differentiate_rows(
                upstream[page],
                rows[page],
                head,
                self.call.softcap or 0.0,
                read,
                space,
                query_grad[page],
                key_grad,
                value_grad,
                sinks_grad,
            )
        grads = (
            torch.from_numpy(query_grad).transpose(0, 1)[..., : query.shape[-1]] * self.call.scaling,
            torch.from_numpy(key_grad)[None, :, : key.shape[-1]],
            torch.from_numpy(value_grad)[None, :, : value.shape[-1]],
        )
        return grads if sinks is None else (*grads, torch.from_numpy(sinks_grad))

    def _read(
        self, rows: Array, sinks: Tensor | None, output: Tensor | None, until: int, keep: bool
    ) -> Iterator[tuple[slice, Read]]:
        """Compute the rows [R, group, head_dim], into `output` [group, R, head_dim] unless that is None.

        What was read comes page by page (large pages are cut) and is overwritten by the next one; without `keep` it has
        no meaning, and all rows are one page.
        """
        config, (num_rows, group, _) = self.call.pattern.config, rows.shape
        rules = self.rules if sinks is None else self.rules._replace(sinks=sinks.detach().numpy())
        kept_rows = min(config.page_size, num_rows, _MOST_KEPT_ROWS) if keep else 1
        width = num_columns(rules, len(self.head.static), len(self.head.key), num_row_keys(config))
        read = Read(
            np.empty((kept_rows, group, width), rows.dtype),
            np.empty((kept_rows, width), np.int32),
            np.empty((kept_rows, 3), np.int32),
        )
        flat, stride = flat_rows(output) if output is not None else (rows.reshape(-1), 0)
        summed = rows.sum(1)
        positions = torch.arange(self.start, self.start + num_rows)
        static = torch.from_numpy(self.head.static)
        drawn = row_keys(self.call.pattern, positions, static, rules.window, self.head.key_offset).int().numpy()
        low = 0
        while low < num_rows:
            position = self.start + low
            high = num_rows
            if keep:
                high = min(low + kept_rows, low + config.page_size - position % config.page_size, num_rows)
            page = slice(low, high)
            attend_rows(
                position,
                rows[page],
                summed[page],
                self.head,
                self.state,
                rules,
                drawn[page],
                flat[low * stride :],
                stride,
                read,
                keep,
                until - _FIRST_OF_ROWS,
            )
            yield page, read
            low = high


def _space(read: Read, head: Head) -> Space:
    """Room for the backward of tiles of rows of which a page was read like this; what is not used takes no memory."""
    (num_rows, group, width), dtype = read.weights.shape, read.weights.dtype
    tile_rows = min(max(PAIRS // group, 1), num_rows)
    num_pairs, num_keys = padded(tile_rows * group), min(tile_rows * width, len(head.key)) + ROWS
    dims = head.key.shape[1], head.value.shape[1]
    columns, keys = np.empty((2, tile_rows, width), np.int32)
    return Space(
        place=np.full(len(head.key), -1, np.int32),
        listed=np.empty(num_keys, np.int32),
        columns=columns,
        keys=keys,
        ends=np.empty(tile_rows, np.int32),
        weights=np.empty(num_keys * num_pairs, dtype),
        slopes=np.empty(num_keys * num_pairs, dtype),
        scores=np.empty(num_keys * num_pairs, dtype),
        key=np.empty(num_keys * dims[0], dtype),
        value=np.empty(num_keys * dims[1], dtype),
        grad=np.empty(num_keys * max(dims), dtype),
        query_columns=np.empty((dims[0], num_pairs), dtype),
        upstream_columns=np.empty((dims[1], num_pairs), dtype),
        query_grad=np.empty((num_pairs + ROWS) * dims[0], dtype),
        mean=np.empty(num_pairs, dtype),
        rest=np.empty(num_pairs, dtype),
    )
