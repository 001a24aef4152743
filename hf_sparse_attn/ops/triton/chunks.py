"""Sparse attention in Triton kernels: on a GPU, forward and backward, memory linear in the length.

A document's sparse rows are taken a chunk at a time. For each chunk, in the backward again, kernels find the keys of
every row and list them by tiles of rows (`bucket_means`, `choose_buckets`, `list_keys`), then others compute the
attention over the lists (`forward`, `backward`). What a chunk needs besides inputs and output does not grow with the
document, but for a few integers per key and KV head. Of each row and head the forward leaves two numbers for the
backward, and of each row and KV head the buckets that it chose, a bit for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.common.chunked import Call, Piece, attend_in_pieces
from hf_sparse_attn.ops.common.kept_choice import keeps_choice
from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import AttentionConstants, Choice, Score, Tile
from hf_sparse_attn.ops.triton.backward import bwd_dkv_older, bwd_dkv_window, bwd_dq, bwd_preprocess
from hf_sparse_attn.ops.triton.bucket_means import mean_buckets
from hf_sparse_attn.ops.triton.choose_buckets import choose_buckets, choose_none, empty_choice, score_buckets
from hf_sparse_attn.ops.triton.document_keys import DocumentKeys, Span
from hf_sparse_attn.ops.triton.find_cached import FEW
from hf_sparse_attn.ops.triton.forward import fwd
from hf_sparse_attn.ops.triton.index import Index
from hf_sparse_attn.ops.triton.launch import TL, block_dim, rows_contiguous
from hf_sparse_attn.ops.triton.list_keys import find_no_runs, find_runs, list_keys
from hf_sparse_attn.ops.triton.readers import find_readers
from hf_sparse_attn.patterns import LayerPattern, row_keys

_CHUNK_ROWS = 2048
_CHUNK_INTERVALS = 128
BACKWARD_CHUNK_ROWS = 8192  # fewer chunks, as each adds to the gradients of all keys; under 2**15 (`Readers`)


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


def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """See `ops.find_keys`."""
    call = Call(partial(_pieces, None), pattern)
    start, end = call.dense_end(key.shape[1]), key.shape[1]
    if start < end:
        for _ in _chunks(rows_contiguous(query), rows_contiguous(key), start, end, call):
            pass


def _pieces(
    cached: Index | None, query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call
) -> Iterator[Piece]:
    everything = slice(None)
    for chunk in _chunks(rows_contiguous(query), rows_contiguous(key), start, end, call, cached):
        rows = slice(chunk.span.start - call.query_offset, chunk.span.end - call.query_offset)
        yield Piece(everything, rows, everything, chunk.attend, chunk.differentiate)


def _chunks(
    query: Tensor, key: Tensor, start: int, end: int, call: Call, cached: Index | None = None
) -> Iterator[_Chunk]:
    """Rows at positions start .. end - 1, chunk after chunk, their keys found; each is used up before the next."""
    keys = DocumentKeys(query, key, start, end, call, None if cached is None else cached.bucket)
    page_size, chunk_rows = call.pattern.config.page_size, BACKWARD_CHUNK_ROWS if call.backward else _CHUNK_ROWS
    intervals = max(min(chunk_rows // page_size, _CHUNK_INTERVALS), 1)
    low = start
    while low < end:
        base = low // page_size * page_size
        next_chunk = base + intervals * page_size
        base += (low - base) // chunk_rows * chunk_rows  # large intervals are cut
        interval_size = min(page_size, chunk_rows)
        high = min(base + intervals * interval_size, next_chunk, end)
        num_intervals = -(-(high - base) // interval_size)
        rows = query[:, low - call.query_offset : high - call.query_offset]
        yield _Chunk(keys, rows, Span(low, high, base, num_intervals, interval_size, keys.rows))
        low = high


class _Chunk:
    """A chunk of rows of all heads, and the lists of the keys that their tiles score."""

    def __init__(self, keys: DocumentKeys, query: Tensor, span: Span) -> None:
        self.keys, self.span = keys, span
        if any(keys.budgets):
            self.choice = self._choose(query)
            self.runs = find_runs(self.choice, keys, span)
        else:
            self.choice, self.runs = choose_none(keys, span), find_no_runs(keys, span)
        self.drawn = self._draw()
        self.lists = list_keys(self.choice, self.runs, self.drawn, keys, span)

    def _choose(self, query: Tensor) -> Choice:
        """The buckets that the rows take keys of; the backward has the forward's, if there was room for them."""
        keys, span, (_, kept) = self.keys, self.span, self._kept()
        rows = slice(span.start - span.base, span.end - span.base)
        if keys.call.backward and kept:
            choice = empty_choice(keys, span)
            for table, of_all in zip(choice, kept, strict=True):
                table[:, rows] = of_all[:, self._rows]
            return choice
        choice = choose_buckets(score_buckets(query, mean_buckets(keys, span), keys, span), keys, span)
        for table, of_all in zip(choice, kept, strict=bool(kept)):
            of_all[:, self._rows] = table[:, rows]
        return choice

    def _kept(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the forward leaves of all rows for the backward, if there will be one.

        Returns:
            The logsumexp and the least scores, [2, H, R] in a list; and the tables of `Choice`, [Hkv, R, ...], or none
            of them where they would take more than half the room of the queries.
        """
        keys, statistics = self.keys, self.keys.call.statistics
        if statistics is None:
            return [], []
        if not statistics:
            num_heads, num_rows, _ = keys.query_shape
            statistics.append(torch.empty(2, num_heads, num_rows, dtype=keys.acc, device=keys.key.device))
            if any(keys.budgets) and keeps_choice(keys.bucket_bits, keys.group * keys.head_dim, keys.key.dtype):
                statistics += [keys.empty(num_rows, keys.bucket_bits // 32), keys.empty(num_rows, 2)]
        return statistics[:1], statistics[1:]

    def _draw(self) -> Tensor:
        """Random keys that nothing else in the fixed pattern reads: [local rows, num_random_keys], -1 where none."""
        keys, base = self.keys, self.span.base
        position = torch.arange(base, base + self.span.num_local, device=keys.key.device)
        return row_keys(keys.call.pattern, position, keys.static, keys.window, keys.call.key_offset).int()

    def attend(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> None:
        """Fill output [H, R, D] for the chunk's query [H, R, D], all keys and values [Hkv, N, D] and sinks [H]."""
        call, query, value = self.keys.call, rows_contiguous(query), rows_contiguous(value)
        *tables, attended = fwd(
            output,
            query,
            self.keys.key,
            value,
            sinks,
            self.lists,
            self.keys.log_min_weights,
            self.span,
            self._constants(value),
            recording=call.recorder is not None,
        )
        if attended is not None:
            self._record(attended)
        for known, of_rows in zip(self._known_tables(), tables, strict=call.statistics is not None):
            known.copy_(of_rows)

    def _known_tables(self) -> list[Tensor]:
        """The chunk's part of the logsumexp and the least scores, [H, R], if there will be a backward."""
        return [table[:, self._rows] for tables in self._kept()[0] for table in tables]

    @property
    def _rows(self) -> slice:
        """The chunk's rows among those of the call."""
        offset = self.keys.call.query_offset
        return slice(self.span.start - offset, self.span.end - offset)

    def _constants(self, value: Tensor) -> AttentionConstants:
        keys, call = self.keys, self.keys.call
        head_dim, value_dim = keys.head_dim, value.shape[-1]
        most_keys = max(2**13 // (keys.rows * keys.group_padded), 16)  # a step's scores lie in registers
        tile = Tile(
            ROWS=keys.rows,
            GROUP=keys.group,
            GROUP_PADDED=keys.group_padded,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim(head_dim),
            VALUE_DIM=value_dim,
            BLOCK_VALUE_DIM=block_dim(value_dim),
            BLOCK=min(triton_launch.block_keys(value, max(head_dim, value_dim)), most_keys),
        )
        score, drop = Score(call.scaling, call.softcap), any(call.pattern.min_weights)
        return AttentionConstants(tile, score, drop, keys.precision, TL[keys.acc])

    def differentiate(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of the arguments of `attend` for that of its result; of keys and values in float32 or more."""
        keys, call, span = self.keys, self.keys.call, self.span
        query, value, grad = (rows_contiguous(x) for x in (query, value, grad))
        assert call.output is not None
        statistics = bwd_preprocess(call.output[:, self._rows], grad, *self._known_tables())
        query_grad = torch.empty_like(query)
        key_grad = key.new_zeros(key.shape, dtype=keys.acc)
        value_grad = value.new_zeros(value.shape, dtype=keys.acc)
        constants = self._constants(value)
        bwd_dq(query_grad, query, keys.key, value, grad, self.lists, statistics, span, constants)
        to_keys = (key_grad, value_grad, query, value, grad, statistics)
        bwd_dkv_window(*to_keys, keys, span, constants)
        if any(keys.budgets) or len(keys.static) or self.drawn.shape[1]:
            readers = find_readers(self.choice, self.runs, self.drawn, keys, span, constants.TILE.BLOCK)
            bwd_dkv_older(*to_keys, self.choice, self.drawn, readers, keys, span, constants)
        if sinks is None:
            return query_grad, key_grad, value_grad
        weight = (sinks.to(keys.acc)[:, None] - statistics.logsumexp).exp()
        return query_grad, key_grad, value_grad, -(weight * statistics.delta).sum(1)

    def _record(self, attended: Tensor) -> None:
        """Tell the recorder what the rows attend to, [Hkv, tiles, M, capacity]."""
        keys, call, lists = self.keys, self.keys.call, self.lists
        position = torch.arange(self.span.start, self.span.end, device=attended.device)
        tile, row = self.span.tile_of(position)
        for kv_head in range(keys.num_kv_heads):
            columns = int(lists.total[kv_head].max())
            listed = torch.arange(columns, device=attended.device) < lists.total[kv_head, tile, None]
            scored = lists.rows[kv_head, tile, :columns] >> row[:, None]
            num_scored = int(((scored & 1) * listed).sum())
            of_rows = lists.keys[kv_head, tile, :columns]
            for member in range(keys.group):
                by_row = attended[kv_head, tile, row * keys.group_padded + member, :columns].bool() & listed
                read = partial(_read, by_row, of_rows, call.key_offset)
                call.record(kv_head * keys.group + member, position, int(by_row.sum()), num_scored, read)


def _read(attended: Tensor, keys: Tensor, key_offset: int) -> tuple[Tensor, Tensor]:
    return attended, keys.long() + key_offset
