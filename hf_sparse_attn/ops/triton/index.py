"""The keys of a cached document on a GPU, by bucket, and the attention of a few rows over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.triton.arguments import CachedKeys, Score
from hf_sparse_attn.ops.triton.decode import decode
from hf_sparse_attn.ops.triton.document_keys import log_min_weights
from hf_sparse_attn.ops.triton.find_cached import FEW, add_to_sums, append_and_score, choose_ranks, list_found
from hf_sparse_attn.ops.triton.hash_keys import hash_keys, hash_tables, sort_by_bucket
from hf_sparse_attn.ops.triton.launch import rows_contiguous
from hf_sparse_attn.patterns import LayerPattern, num_row_keys, row_keys, static_positions
from hf_sparse_attn.routing import MEANS_LAG

_MOST_SCORES = 2**26  # of the rows that one launch takes


def _written_anywhere(method: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors that the method makes may change inside torch.inference_mode() and outside, and carry no gradients."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class Index:
    """Each key's bucket and its rank in it, and what the buckets hold: older than a window, and known to an interval.

    Appending a key and finding a row's keys are launches for which the host does not wait. Only
    `document_attention` of `ops.triton` appends.

    Args:
        pattern: the layer's pattern, without a sliding window of the model's own.
        num_kv_heads: KV heads.
        key_offset: position of the first key.
    """

    knows_sliding_windows = False

    @_written_anywhere
    def __init__(self, pattern: LayerPattern, num_kv_heads: int, key_offset: int) -> None:
        self.pattern, self.key_offset = pattern, key_offset
        self.length = self._num_older = self._num_known = 0
        weight, num_buckets = pattern.bucket_hash.weight, pattern.bucket_hash.num_buckets
        self.acc = weight.dtype
        numbers = partial(torch.zeros, dtype=torch.int32, device=weight.device)
        self.bucket, self._rank = numbers(num_kv_heads, 0), numbers(num_kv_heads, 0)
        self._counts = numbers(num_kv_heads, num_buckets + 1)  # of all keys, static ones last
        self._older = numbers(num_kv_heads, num_buckets)  # of the first _num_older keys
        self._numbers = numbers(num_kv_heads, num_buckets)  # of the first _num_known keys
        self._sums = weight.new_zeros(num_kv_heads, num_buckets, weight.shape[1])
        self._static = torch.zeros(0, dtype=torch.int64)  # on the CPU
        self._static_here = numbers(0)
        self._hash = hash_tables(pattern)
        self._budgets = torch.tensor(pattern.budgets, dtype=torch.int32, device=weight.device)
        self._log_min_weights = log_min_weights(pattern)

    @_written_anywhere
    def append(self, key: Tensor) -> None:
        """Take in the keys of [num_key_value_heads, N, head_dim] after the first `length`, however many."""
        start, stop = self.length, key.shape[1]
        if start == stop:
            return
        self._make_room(stop)
        self.bucket[:, start:stop] = hash_keys(self.pattern, key[:, start:])
        held = self._static_keys(start, stop).to(key.device)
        self.bucket[:, held] = self.pattern.bucket_hash.num_buckets
        in_order, order, first = sort_by_bucket(self.bucket[:, start:stop], self.pattern.bucket_hash.num_buckets)
        place = torch.arange(stop - start, device=key.device)
        rank = place - (first - self._counts).gather(1, in_order.long())
        self._rank[:, start:stop].scatter_(1, order, rank.int())
        self._count(self._counts, start, stop, 1)
        self.length = stop

    def _make_room(self, length: int) -> None:
        if length > self.bucket.shape[1]:
            room = length + length // 8 + 64 - self.length
            self.bucket, self._rank = (
                torch.nn.functional.pad(x[:, : self.length], (0, room)) for x in (self.bucket, self._rank)
            )

    def _static_keys(self, start: int, stop: int) -> Tensor:
        """Indices of the static keys among these, which are noted."""
        offset, pattern = self.key_offset, self.pattern
        found = static_positions(pattern.config, offset + stop, torch.device("cpu"), offset + start, pattern.marked)
        if len(found):
            self._static = torch.cat([self._static, found])
            new = found.int().to(self.bucket.device, non_blocking=True)
            self._static_here = torch.cat([self._static_here, new])
        return found - offset

    def _count(self, table: Tensor, start: int, stop: int, sign: int) -> None:
        """Add the keys start .. stop - 1, or subtract them, where the table [Hkv, B or B + 1] has their buckets."""
        own = self.bucket[:, start:stop].long()
        known = own < table.shape[1]
        table.scatter_add_(1, own * known, sign * known.int())

    @_written_anywhere
    def crop(self, length: int) -> None:
        """Forget the keys after the first `length`."""
        if length >= self.length:
            return
        self._count(self._counts, length, self.length, -1)
        if length < self._num_older:
            self._count(self._older, length, self._num_older, -1)
            self._num_older = length
        if length < self._num_known:
            self._forget_sums()
        num_static = int((self._static < length + self.key_offset).sum())
        self._static, self._static_here = self._static[:num_static], self._static_here[:num_static]
        self.length = length

    def _forget_sums(self) -> None:
        self._sums.zero_()
        self._numbers.zero_()
        self._num_known = 0

    @_written_anywhere
    def copy(self) -> Index:
        """Another one, of the same keys."""
        other = copy(self)
        for name in ("bucket", "_rank", "_counts", "_older", "_numbers", "_sums"):
            setattr(other, name, getattr(self, name).clone())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Index:
        return self.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        tables = (self.bucket, self._rank, self._counts, self._older, self._numbers, self._sums, self._static_here)
        return sum(x.nbytes for x in tables)

    @property
    def _tables(self) -> CachedKeys:
        return CachedKeys(self.bucket, self._rank, self._counts, self._sums, self._numbers)

    @_written_anywhere
    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Append the new ones of keys [Hkv, N, D] and attend to them from sparse rows [H, R, D]; [H, R, D]."""
        query, key, value = (rows_contiguous(x) for x in (query, key, value))
        output = query.new_empty(query.shape[1], len(query), value.shape[-1]).transpose(0, 1)
        if key.shape[1] - self.length > min(FEW, query.shape[1]):
            self.append(key)
        for start, stop in self._row_blocks(call.query_offset, query.shape[1], len(query), key.shape[1]):
            rows = slice(start - call.query_offset, stop - call.query_offset)
            self._attend(call, output[:, rows], query[:, rows], key, value, sinks, start)
        return output

    def _attend(
        self,
        call: Call,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        first_row: int,
    ) -> None:
        """Fill output [H, R, D] of rows of one refresh interval from position `first_row` on."""
        window = self.pattern.window(key.shape[1])
        if max(self.pattern.budgets):
            self._move(key, first_row, window)
        scores = self._append_and_score(query, key)
        found, num_found = self._find(scores, key.shape[1], first_row - window + 1 - self.key_offset)
        positions = torch.arange(first_row, first_row + query.shape[1], device=key.device)
        decode(
            output,
            query,
            key,
            value,
            sinks,
            self._static_here,
            row_keys(self.pattern, positions, self._static_here, window, self.key_offset).int(),
            found,
            num_found,
            self._log_min_weights,
            first_row,
            self.key_offset,
            window,
            any(self.pattern.min_weights),
            Score(call.scaling, call.softcap),
        )

    def _append_and_score(self, query: Tensor, key: Tensor) -> Tensor:
        """Append the keys that the index does not have yet; the buckets' scores [Hkv, R, B]."""
        start, stop = self.length, key.shape[1]
        self._make_room(stop)
        static = self._static_keys(start, stop)
        scores = append_and_score(self._tables, self._hash, self.pattern, query, key, start, static)
        self.length = stop
        return scores

    def _find(self, scores: Tensor, num_keys: int, first_older: int) -> tuple[Tensor, Tensor]:
        """The keys found through buckets, [Hkv, R, most], and how many they are, [Hkv, R].

        `first_older` keys are older than the first row's window, see `choose_ranks`.
        """
        num_kv_heads, num_rows, _ = scores.shape
        most = min(max(self.pattern.budgets), num_keys)
        if not most:
            numbers = partial(torch.zeros, num_kv_heads, num_rows, dtype=torch.int32, device=scores.device)
            return numbers(0), numbers()
        taken, num_found, older = choose_ranks(
            scores, self._tables, self._older, self._budgets, self._num_older, first_older
        )
        self._older, self._num_older = older, max(first_older + num_rows - 1, 0)
        return list_found(self._tables, taken, self._num_older, most), num_found

    def _row_blocks(self, start: int, num_rows: int, num_heads: int, num_keys: int) -> Iterator[tuple[int, int]]:
        """Rows from position `start` on in blocks that one launch takes: start .. stop - 1, of one refresh interval."""
        config, end = self.pattern.config, start + num_rows
        width = config.window_size + len(self._static) + num_row_keys(config) + max(self.pattern.budgets)
        most = max(min(_MOST_SCORES // (16 * num_heads * min(width, num_keys)), FEW), 1)
        while start < end:
            stop = min(start + most, end, (start // config.page_size + 1) * config.page_size)
            yield start, stop
            start = stop

    def _move(self, key: Tensor, row: int, window: int) -> None:
        """Know the keys that the interval of a row at this position knows, and nearly those older than its window."""
        page_size = self.pattern.config.page_size
        known = max(row // page_size * page_size - MEANS_LAG + 1 - self.key_offset, 0)
        if known < self._num_known:
            self._forget_sums()
        if known > self._num_known:
            add_to_sums(self._tables, key, self._num_known, known)
            self._num_known = known
        older = max(row - window + 1 - self.key_offset, 0)
        if older - self._num_older > FEW:
            self._count(self._older, self._num_older, older, 1)
        elif self._num_older - older > FEW:
            self._count(self._older, older, self._num_older, -1)
        else:
            return
        self._num_older = older
