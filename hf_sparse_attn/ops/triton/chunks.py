"""Sparse attention in Triton kernels: on a GPU, forward and backward, memory linear in the length.

A document's sparse rows are taken a chunk at a time. For each chunk, in the backward again, `triton_routing` finds the
keys of every row and lists them by tiles of rows, then `triton_kernels` computes the attention over the lists. What a
chunk needs besides inputs and output does not grow with the document, but for a few integers per key and KV head. Of
each row and head the forward leaves two numbers for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.common.chunked import Call, Piece, attend_in_pieces
from hf_sparse_attn.ops.triton import attention as attention_kernels
from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton import routing as routing_kernels
from hf_sparse_attn.ops.triton.index import FEW, Index, hash_keys, log_min_weights, sort_by_bucket
from hf_sparse_attn.ops.triton.launch import TL, block_dim, precision, rows_contiguous, with_strides
from hf_sparse_attn.routing import MEANS_LAG, LayerPattern, random_keys, static_positions

_UNBOUNDED = 2**30  # stands for no sliding window
_CHUNK_ROWS = 2048
_CHUNK_PAGES = 128
BACKWARD_CHUNK_ROWS = 8192  # fewer chunks, as each adds to the gradients of all keys
_CHOOSING_ROWS = 4  # that choose their buckets together


def _pieces(
    cached: Index | None, query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call
) -> Iterator[Piece]:
    query, key, value = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value)
    everything = slice(None)
    for chunk in _chunks(query, key, start, end, call, cached):
        rows = slice(chunk.start - call.query_offset, chunk.end - call.query_offset)
        yield Piece(everything, rows, everything, chunk.attend, chunk.differentiate)


def _chunks(
    query: Tensor, key: Tensor, start: int, end: int, call: Call, cached: Index | None = None
) -> Iterator[_Chunk]:
    """Rows at positions start .. end - 1, chunk after chunk, their keys found; each is used up before the next."""
    index = _Groups(query, key, start, end, call, cached)
    page_size, chunk_rows = call.pattern.config.page_size, BACKWARD_CHUNK_ROWS if call.backward else _CHUNK_ROWS
    pages = max(min(chunk_rows // page_size, _CHUNK_PAGES), 1)
    low = start
    while low < end:
        page = low // page_size
        base = page * page_size
        base += (low - base) // chunk_rows * chunk_rows  # large pages are cut
        rows_per_page = min(page_size, chunk_rows)
        high = min(base + pages * rows_per_page, (page + pages) * page_size, end)
        num_pages = -(-(high - base) // rows_per_page)
        rows = query[:, low - call.query_offset : high - call.query_offset]
        yield _Chunk(index, rows, low, high, base, num_pages, rows_per_page)
        low = high


def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """See `ops.find_keys`."""
    call = Call(partial(_pieces, None), pattern)
    start, end = call.dense_end(key.shape[1]), key.shape[1]
    if start < end:
        for _ in _chunks(rows_contiguous(query), rows_contiguous(key), start, end, call):
            pass


class _Groups:
    """A document's keys grouped by bucket, and the bucket means as the next chunk's first page may know them."""

    def __init__(
        self, query: Tensor, key: Tensor, start: int, end: int, call: Call, cached: Index | None = None
    ) -> None:
        pattern, config = call.pattern, call.pattern.config
        num_kv_heads, num_keys, head_dim = key.shape
        self.call, self.key, self.query_shape = call, key, query.shape
        self.acc = pattern.bucket_hash.weight.dtype
        self.precision = precision(query.dtype)
        self.group = len(query) // num_kv_heads
        self.rows, self.group_padded = triton_launch.tile_shape(query, self.group, config.page_size)
        self.window = pattern.window(end)
        self.budgets = [call.budget(kv_head, num_keys) for kv_head in range(num_kv_heads)]
        self.budget_table = torch.tensor(self.budgets, dtype=torch.int32, device=key.device)
        self.log_min_weights = log_min_weights(pattern)
        self.num_buckets = pattern.bucket_hash.num_buckets
        self.static = static_positions(config, end, key.device).int()

        if cached is not None:
            self.bucket = cached.bucket[:, :num_keys].contiguous()
        elif any(self.budgets):
            self.bucket = hash_keys(pattern, key)
        else:
            self.bucket = torch.zeros(key.shape[:2], dtype=torch.int32, device=key.device)
        held = self.static[self.static >= call.key_offset] - call.key_offset
        self.bucket[:, held.long()] = self.num_buckets  # static keys get a bucket of their own behind all others
        _, order, self.first = sort_by_bucket(self.bucket, self.num_buckets)
        self.order = order.int()
        # Sums of the keys of each bucket from slot `left` to slot `entered`.
        self.entered, self.left = self.first[:, :-1].repeat(2, 1, 1)
        self.sums = key.new_zeros(num_kv_heads, self.num_buckets, head_dim, dtype=self.acc)


class _Chunk:
    """Rows at positions start .. end - 1 of all heads, and the lists of the keys that their tiles score."""

    def __init__(
        self, index: _Groups, query: Tensor, start: int, end: int, base: int, num_pages: int, rows_per_page: int
    ) -> None:
        """The chunk's pages, or its part of a large page, begin at position `base`."""
        self.index, self.start, self.end, self.base = index, start, end, base
        self.num_pages, self.rows_per_page = num_pages, rows_per_page
        self.tiles_per_page = -(-rows_per_page // index.rows)
        self.num_local = num_pages * rows_per_page
        self.num_tiles = num_pages * self.tiles_per_page
        self._choose(query)
        self._list()

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(len(self.index.key), *shape, dtype=dtype, device=self.index.key.device)

    @property
    def _place(self) -> dict[str, Any]:
        """Where the chunk lies, as the kernels are told."""
        return {"base": self.base, "start": self.start, "end": self.end, "page_size": self.rows_per_page}

    def _choose(self, query: Tensor) -> None:
        """The buckets that each row takes keys of."""
        index, key = self.index, self.index.key
        num_kv_heads, num_keys, head_dim = key.shape
        self.block = max(index.num_buckets, 32)
        self.words = self._empty(self.num_local, self.block // 32)
        self.cut = self._empty(self.num_local, 2)
        self.runs = [self._empty(self.num_tiles, self.block) for _ in range(3)]
        self.num_runs = self._empty(self.num_tiles)
        if not any(index.budgets):
            for table in (self.words, self.cut, self.num_runs):
                table.zero_()
            return
        pattern = index.call.pattern
        page_size = pattern.config.page_size
        sliding = pattern.sliding_window is not None
        means = self._empty(self.num_pages, index.num_buckets, head_dim, dtype=index.acc)
        routable = self._empty(self.num_pages, index.num_buckets)
        triton_launch.launch(
            routing_kernels.mean_buckets,
            (index.num_buckets, num_kv_heads),
            key,
            *key.stride()[:2],
            index.order,
            index.first,
            index.sums,
            index.entered,
            index.left,
            means,
            routable,
            num_keys,
            index.call.key_offset,
            self.base // page_size * page_size,
            self.num_pages,
            page_size,
            MEANS_LAG,
            pattern.sliding_window or _UNBOUNDED,
            NUM_BUCKETS=index.num_buckets,
            SLIDING=sliding,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim(head_dim),
            BLOCK=16,
            ACC=TL[index.acc],
            num_warps=1,
        )
        scores = self._empty(self.num_local, index.num_buckets, dtype=index.acc)
        block_rows, block_buckets = 64, min(max(index.num_buckets, 16), 128)
        triton_launch.launch(
            routing_kernels.score_buckets,
            (
                self.num_pages * triton.cdiv(self.rows_per_page, block_rows),
                triton.cdiv(index.num_buckets, block_buckets),
                num_kv_heads,
            ),
            query,
            *query.stride()[:2],
            means,
            routable,
            scores,
            num_pages=self.num_pages,
            NUM_BUCKETS=index.num_buckets,
            GROUP=index.group,
            HEAD_DIM=head_dim,
            BLOCK_ROWS=block_rows,
            BLOCK_BUCKETS=block_buckets,
            BLOCK_K=32,
            PRECISION=precision(index.acc),
            ACC=TL[index.acc],
            **self._place,
        )
        triton_launch.launch(
            routing_kernels.choose_buckets,
            (self.num_pages * triton.cdiv(self.rows_per_page, _CHOOSING_ROWS), num_kv_heads),
            scores,
            index.bucket,
            index.order,
            index.first,
            index.budget_table,
            self.words,
            self.cut,
            num_keys,
            index.call.key_offset,
            num_pages=self.num_pages,
            window=index.window,
            sliding_window=pattern.sliding_window or _UNBOUNDED,
            NUM_BUCKETS=index.num_buckets,
            BLOCK=self.block,
            ROWS=_CHOOSING_ROWS,
            SLIDING=sliding,
            SCORE_BITS=64 if index.acc == torch.float64 else 32,
            **self._place,
        )
        triton_launch.launch(
            routing_kernels.find_runs,
            (self.num_tiles, num_kv_heads),
            index.order,
            index.first,
            self.words,
            self.cut,
            *self.runs,
            self.num_runs,
            num_keys,
            index.call.key_offset,
            num_pages=self.num_pages,
            num_tiles=self.num_tiles,
            window=index.window,
            sliding_window=pattern.sliding_window or _UNBOUNDED,
            NUM_BUCKETS=index.num_buckets,
            BLOCK=self.block,
            ROWS=index.rows,
            SLIDING=sliding,
            **self._place,
        )

    def _list(self) -> None:
        """The keys that the rows of each tile score."""
        index, config = self.index, self.index.call.pattern.config
        num_kv_heads, num_keys, _ = index.key.shape
        rows, num_random = index.rows, config.num_random_keys
        self.drawn = self._draw()
        last = self._first_rows() + rows - 1
        num_static = torch.searchsorted(index.static, (last - index.window).int(), right=True).int()
        # The keys that enter the window and, with one of the model's own, leave it inside a tile stand in runs as well.
        found = min(rows * max(index.budgets) + 2 * rows, num_keys)
        capacity = index.window + rows - 1 + len(index.static) + rows * num_random + found
        self.capacity = -(-capacity // 16) * 16
        block = 64
        self.keys = self._empty(self.num_tiles, self.capacity)
        self.takers = self._empty(self.num_tiles, self.capacity)
        self.fixed, self.total = self._empty(self.num_tiles), self._empty(self.num_tiles)
        triton_launch.launch(
            routing_kernels.list_keys,
            (self.num_tiles, num_kv_heads, triton.cdiv(self.capacity, block)),
            index.order,
            self.words,
            self.cut,
            *self.runs,
            self.num_runs,
            index.static,
            num_static,
            self.drawn,
            self.keys,
            self.takers,
            self.fixed,
            self.total,
            num_keys,
            index.call.key_offset,
            num_pages=self.num_pages,
            num_tiles=self.num_tiles,
            window=index.window,
            sliding_window=index.call.pattern.sliding_window or _UNBOUNDED,
            capacity=self.capacity,
            NUM_RUNS=self.block,
            NUM_RANDOM=num_random,
            ROWS=rows,
            BLOCK=block,
            **self._place,
        )

    def _first_rows(self) -> Tensor:
        """Position of the first row of each tile: [tiles]."""
        tile = torch.arange(self.num_tiles, device=self.index.key.device)
        row = tile % self.tiles_per_page * self.index.rows
        return self.base + tile // self.tiles_per_page * self.rows_per_page + row

    def _draw(self) -> Tensor:
        """Random keys that nothing else in the fixed pattern reads: [local rows, num_random_keys], -1 where none."""
        index, pattern = self.index, self.index.call.pattern
        position = torch.arange(self.base, self.base + self.num_local, device=index.key.device)
        return random_keys(pattern, position, index.static, index.window, index.call.key_offset).int()

    def attend(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> None:
        """Fill output [H, R, D] for the chunk's query [H, R, D], all keys and values [Hkv, N, D] and sinks [H]."""
        tables = self._attend(output, query, key, value, sinks)
        if self.index.call.statistics is not None:
            for known, of_rows in zip(self._known_tables(self.index.call.statistics), tables, strict=True):
                known.copy_(of_rows)

    def _known_tables(self, statistics: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The chunk's part of what all rows leave for the backward: logsumexp and least scores, [H, R]."""
        offset, shape = self.index.call.query_offset, self.index.query_shape
        if not statistics:
            statistics.append(torch.empty(2, *shape[:2], dtype=self.index.acc, device=self.index.key.device))
        logsumexp, least = statistics[0][:, :, self.start - offset : self.end - offset]
        return logsumexp, least

    def _attend(
        self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `attend`; each row's logsumexp and the score under which found keys are not read, [H, R]."""
        index, call = self.index, self.index.call
        query, key, value = (rows_contiguous(x) for x in (query, key, value))
        assert output.stride(-1) == 1
        logsumexp, least = query.new_empty(2, *query.shape[:2], dtype=index.acc)
        pairs = index.rows * index.group_padded
        recording = call.recorder is not None
        kept = self._empty(*(self.num_tiles, pairs, self.capacity) if recording else (), dtype=torch.int8)
        triton_launch.launch(
            attention_kernels.attend,
            (self.num_tiles, len(key)),
            *with_strides(query, key, value, output),
            self.keys,
            self.takers,
            self.fixed,
            self.total,
            sinks,
            index.log_min_weights,
            logsumexp,
            least,
            kept,
            SINKS=sinks is not None,
            KEEP=recording,
            num_warps=self._num_warps,
            **self._of_attention(value),
            **self._of_lists(value),
        )
        if recording:
            self._record(kept)
        return logsumexp, least

    @property
    def _num_warps(self) -> int:
        return 8 if self.index.rows * self.index.group_padded >= 128 else 4

    def _of_attention(self, value: Tensor) -> dict[str, Any]:
        """Arguments that every kernel of the attention takes."""
        index, call = self.index, self.index.call
        head_dim, value_dim = index.key.shape[-1], value.shape[-1]
        return {
            **self._place,
            "scaling": call.scaling,
            "softcap": call.softcap or 1.0,
            "num_rows": self.end - self.start,
            "GROUP": index.group,
            "GROUP_PADDED": index.group_padded,
            "ROWS": index.rows,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": block_dim(head_dim),
            "VALUE_DIM": value_dim,
            "BLOCK_VALUE_DIM": block_dim(value_dim),
            "SOFTCAP": call.softcap is not None,
            "PRECISION": index.precision,
            "ACC": TL[index.acc],
            "BLOCK": triton_launch.block_keys(value, max(head_dim, value_dim)),
        }

    def _of_lists(self, value: Tensor) -> dict[str, Any]:
        """Arguments that the kernels over listed keys take besides."""
        return {
            "num_tiles": self.num_tiles,
            "capacity": self.capacity,
            "DROP": any(self.index.call.pattern.min_weights),
        }

    def differentiate(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of the arguments of `attend` for that of its result; of keys and values in float32 or more."""
        index, pattern = self.index, self.index.call.pattern
        call, offset = index.call, index.call.query_offset
        num_kv_heads, num_keys, _ = key.shape
        query, key, value, grad = (rows_contiguous(x) for x in (query, key, value, grad))
        assert call.statistics is not None
        assert call.output is not None
        logsumexp, least = (x.contiguous() for x in self._known_tables(call.statistics))
        output = call.output[:, self.start - offset : self.end - offset]
        delta = (output.to(index.acc) * grad).sum(-1).contiguous()
        query_grad = torch.empty_like(query)
        key_grad = key.new_zeros(key.shape, dtype=index.acc)
        value_grad = value.new_zeros(value.shape, dtype=index.acc)
        inputs = with_strides(query, key, value, grad)
        arguments = self._of_attention(value)
        triton_launch.launch(
            attention_kernels.differentiate_queries,
            (self.num_tiles, num_kv_heads),
            *inputs,
            self.keys,
            self.takers,
            self.fixed,
            self.total,
            logsumexp,
            least,
            delta,
            *with_strides(query_grad),
            num_warps=self._num_warps,
            **arguments,
            **self._of_lists(value),
        )
        first = max(self.start - index.window + 1, index.call.key_offset)
        triton_launch.launch(
            attention_kernels.differentiate_window,
            (triton.cdiv(self.end - first, arguments["BLOCK"]), num_kv_heads),
            *inputs,
            logsumexp,
            least,
            delta,
            key_grad,
            value_grad,
            num_keys=num_keys,
            key_offset=call.key_offset,
            window=index.window,
            num_warps=8,
            **arguments,
        )
        if any(index.budgets) or len(index.static) or pattern.config.num_random_keys:
            self._differentiate_older(inputs, (logsumexp, least, delta, key_grad, value_grad), arguments)
        if sinks is None:
            return query_grad, key_grad, value_grad
        sinks_grad = -((sinks.to(index.acc)[:, None] - logsumexp).exp() * delta).sum(1)
        return query_grad, key_grad, value_grad, sinks_grad

    def _differentiate_older(self, inputs: list[Any], tables: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        index, pattern = self.index, self.index.call.pattern
        num_kv_heads, num_keys, _ = index.key.shape
        num_blocks, num_random = triton.cdiv(num_keys, arguments["BLOCK"]), pattern.config.num_random_keys
        slot_of_key = index.order
        if num_random:
            slot_of_key = torch.empty_like(index.order)
            slots = torch.arange(num_keys, dtype=torch.int32, device=index.key.device).expand_as(index.order)
            slot_of_key.scatter_(1, index.order.long(), slots)
        tiles, num_reading = self._empty(num_blocks, self.num_tiles), self._empty(num_blocks)
        shared = {
            "num_keys": num_keys,
            "num_tiles": self.num_tiles,
            "NUM_BUCKETS": index.num_buckets,
            "NUM_RANDOM": num_random,
        }
        triton_launch.launch(
            routing_kernels.tiles_of_blocks,
            (num_blocks, num_kv_heads),
            index.bucket,
            index.order,
            slot_of_key,
            *self.runs[1:],
            self.num_runs,
            self.drawn,
            tiles,
            num_reading,
            NUM_RUNS=self.block,
            ROWS=index.rows,
            BLOCK=arguments["BLOCK"],
            BLOCK_TILES=triton.next_power_of_2(self.num_tiles),
            **self._place,
            **shared,
        )
        triton_launch.launch(
            attention_kernels.differentiate_older,
            (num_blocks, num_kv_heads),
            *inputs,
            index.bucket,
            index.order,
            self.words,
            self.cut,
            self.drawn,
            tiles,
            num_reading,
            *tables,
            key_offset=index.call.key_offset,
            num_local=self.num_local,
            window=index.window,
            sliding_window=pattern.sliding_window or _UNBOUNDED,
            NUM_WORDS=self.block // 32,
            DROP=any(pattern.min_weights),
            num_warps=8,
            **arguments,
            **shared,
        )

    def _record(self, kept: Tensor) -> None:
        """Tell the recorder what the rows read."""
        index, call = self.index, self.index.call
        position = torch.arange(self.start, self.end, device=kept.device)
        page, row = (position - self.base) // self.rows_per_page, (position - self.base) % self.rows_per_page
        tile, row = page * self.tiles_per_page + row // index.rows, row % index.rows
        for kv_head in range(len(index.key)):
            columns = int(self.total[kv_head].max())
            listed = torch.arange(columns, device=kept.device) < self.total[kv_head, tile, None]
            takers = self.takers[kv_head, tile, :columns] >> row[:, None]
            num_scored = int(((takers & 1) * listed).sum())
            keys = self.keys[kv_head, tile, :columns]
            for member in range(index.group):
                attended = kept[kv_head, tile, row * index.group_padded + member, :columns].bool() & listed
                positions = partial(_positions, keys, call.key_offset)
                call.record(kv_head * index.group + member, position, attended, num_scored, positions)


def _positions(keys: Tensor, key_offset: int) -> Tensor:
    return keys.long() + key_offset


def document_attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """See `backend.AttendDocument`."""
    index, dense_rows, num_rows = call.index, call.pattern.dense_rows(), query.shape[1]
    pieces = partial(_pieces, index)
    if index is not None and dense_rows is not None and call.query_offset + num_rows > dense_rows:
        if num_rows <= FEW and call.query_offset >= dense_rows and call.recorder is None:
            found: Tensor = index.attend(Call.of(call, pieces), query, key, value, call.sinks)
            return found
        index.append(key)  # before the first row asks for it there is nothing to find
    return attend_in_pieces(pieces, query, key, value, call, in_threads=False)
