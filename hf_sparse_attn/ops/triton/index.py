"""The keys of a cached document on a GPU, by bucket, and the attention of a few rows over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.triton.arguments import ONE_TOKEN, CachedKeys, Progress, Score
from hf_sparse_attn.ops.triton.decode import decode
from hf_sparse_attn.ops.triton.document_keys import log_min_weights
from hf_sparse_attn.ops.triton.find_cached import FEW, append_and_score, choose_ranks, list_found
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

    A step of one token launches the same every time, but for the room of the keys that it is given. So where that is
    fixed and the call brings the index of the newest key along (`AttentionCall.newest`), the launches can be recorded
    and replayed. The host's own numbers then stand still; `advance` moves them on.

    Args:
        pattern: the layer's pattern, without a sliding window of the model's own.
        num_kv_heads: KV heads.
        key_offset: position of the first key.
    """

    knows_sliding_windows = False
    has_fixed_steps = True

    @_written_anywhere
    def __init__(self, pattern: LayerPattern, num_kv_heads: int, key_offset: int) -> None:
        self.pattern, self.key_offset = pattern, key_offset
        self.length = 0
        self._num_older = 0  # keys that `_older` counts; under 0 where a window has room for more
        self._known_row = key_offset - 1  # a position whose row knows the keys of `_sums`
        weight, num_buckets = pattern.bucket_hash.weight, pattern.bucket_hash.num_buckets
        self.acc = weight.dtype
        numbers = partial(torch.zeros, dtype=torch.int32, device=weight.device)
        self.bucket, self._rank = numbers(num_kv_heads, 0), numbers(num_kv_heads, 0)
        self._counts = numbers(num_kv_heads, num_buckets + 1)  # of all keys, static ones last
        self._older = numbers(num_kv_heads, num_buckets)  # of the first _num_older keys
        self._numbers = numbers(num_kv_heads, num_buckets)  # of the keys of _sums
        self._sums = weight.new_zeros(num_kv_heads, num_buckets, weight.shape[1])
        self._static = numbers(0)  # positions, also of keys to come for which there is room
        self._hash = hash_tables(pattern)
        self._budgets = torch.tensor(pattern.budgets, dtype=torch.int32, device=weight.device)
        self._log_min_weights = log_min_weights(pattern)

    @_written_anywhere
    def append(self, key: Tensor) -> None:
        """Take in the keys of [num_key_value_heads, N, head_dim] after the first `length`, however many."""
        start, stop = self.length, key.shape[1]
        if start == stop:
            return
        self._prepare(stop)
        own, num_buckets = self.bucket[:, start:stop], self.pattern.bucket_hash.num_buckets
        own.copy_(torch.where(own == num_buckets, own, hash_keys(self.pattern, key[:, start:])))
        in_order, order, first = sort_by_bucket(own, num_buckets)
        place = torch.arange(stop - start, device=key.device)
        rank = place - (first - self._counts).gather(1, in_order.long())
        self._rank[:, start:stop].scatter_(1, order, rank.int())
        self._count(self._counts, start, stop, 1)
        self.length = stop

    def reserve(self, length: int) -> None:
        """Make room for so many keys, at once."""
        if length > self.bucket.shape[1]:
            self._grow(length)

    @_written_anywhere
    def _grow(self, length: int) -> None:
        room = length - self.length
        self.bucket, self._rank = (
            torch.nn.functional.pad(x[:, : self.length], (0, room)) for x in (self.bucket, self._rank)
        )
        self._mark_static()

    def _prepare(self, length: int) -> None:
        """Make room for so many keys and more, and know which of them are static."""
        if length > self.bucket.shape[1]:
            self.reserve(length + length // 8 + 64)
        elif self.pattern.marked is not None:  # only their tokens tell
            self._mark_static()

    def _mark_static(self) -> None:
        """Where static keys are or will be: their positions, and their bucket from the first new key on."""
        device, first = self.bucket.device, self.length
        stop = self.key_offset + self.bucket.shape[1]
        static = static_positions(self.pattern.config, stop, torch.device("cpu"), self.key_offset, self.pattern.marked)
        self._static = static.int().to(device)
        new = (static - self.key_offset)[static >= self.key_offset + first]
        self.bucket[:, first:] = 0
        self.bucket[:, new.to(device)] = self.pattern.bucket_hash.num_buckets

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
        if length < self._num_known(self._known_row):
            self._forget_sums()
        self.length = length

    def _forget_sums(self) -> None:
        self._sums.zero_()
        self._numbers.zero_()
        self._known_row = self.key_offset - 1

    def _num_known(self, row: int) -> int:
        """Keys whose bucket means the row at a position knows."""
        page_size = self.pattern.config.page_size
        return max(row // page_size * page_size - MEANS_LAG + 1 - self.key_offset, 0)

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
        tables = (self.bucket, self._rank, self._counts, self._older, self._numbers, self._sums, self._static)
        return sum(x.nbytes for x in tables)

    @property
    def _tables(self) -> CachedKeys:
        return CachedKeys(self.bucket, self._rank, self._counts, self._sums, self._numbers)

    @_written_anywhere
    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Append the new ones of keys [Hkv, N, D] and attend to them from sparse rows [H, R, D]; [H, R, D]."""
        query, key, value = (rows_contiguous(x) for x in (query, key, value))
        output = query.new_empty(query.shape[1], len(query), value.shape[-1]).transpose(0, 1)
        if call.newest is not None:
            self._attend(call, output, query, key, value, sinks, call.newest, ONE_TOKEN)
            return output
        newest, end = torch.full((1,), key.shape[1] - 1, device=key.device), call.query_offset + query.shape[1]
        if key.shape[1] - self.length > min(FEW, query.shape[1]):
            self.append(key)
        for start, stop in self._row_blocks(call.query_offset, query.shape[1], len(query), key.shape[1]):
            rows = slice(start - call.query_offset, stop - call.query_offset)
            progress = self._go_on(key.shape[1], start, stop, end)
            self._attend(call, output[:, rows], query[:, rows], key, value, sinks, newest, progress)
        return output

    def _go_on(self, num_keys: int, start: int, stop: int, end: int) -> Progress:
        """Count on to rows at positions start .. stop - 1 of one refresh interval; the tables still have to follow.

        Args:
            num_keys: in all.
            start, stop: see above.
            end: position after the newest key.
        """
        first_older = start - self.pattern.window(num_keys) + 1 - self.key_offset
        self._prepare(num_keys)
        self._move(start, first_older)
        since_older, since_known = first_older - self._num_older, start - self._known_row
        progress = Progress(num_keys - self.length, end - start, since_older, since_known)
        self.length, self._num_older, self._known_row = num_keys, first_older + stop - start - 1, stop - 1
        return progress

    def _move(self, row: int, first_older: int) -> None:
        """Take back what a row knows less than was known, and nearly count the keys older than its window."""
        if self._num_known(row) < self._num_known(self._known_row):
            self._forget_sums()
        counted, older = max(self._num_older, 0), max(first_older, 0)
        if abs(older - counted) > FEW:
            self._count(self._older, min(counted, older), max(counted, older), 1 if older > counted else -1)
            self._num_older = first_older

    def _attend(
        self,
        call: Call,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        newest: Tensor,
        progress: Progress,
    ) -> None:
        """Fill output [H, R, D] of rows of one refresh interval; `newest` [1] is the index of the newest key."""
        window, key_offset = self.pattern.window(key.shape[1]), self.key_offset
        scores = append_and_score(self._tables, self._hash, self.pattern, query, key, newest, key_offset, progress)
        found, num_found = self._find(scores, newest, key.shape[1], window, progress)
        first_row = newest + (key_offset + 1 - progress.rows_to_end)
        positions = first_row + torch.arange(query.shape[1], device=key.device)
        decode(
            output,
            query,
            key,
            value,
            sinks,
            self._static,
            row_keys(self.pattern, positions, self._static, window, key_offset).int(),
            found,
            num_found,
            self._log_min_weights,
            newest,
            key_offset,
            progress.rows_to_end,
            window,
            any(self.pattern.min_weights),
            Score(call.scaling, call.softcap),
        )

    def _find(
        self, scores: Tensor, newest: Tensor, num_keys: int, window: int, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """The keys found through buckets, [Hkv, R, most], and how many they are, [Hkv, R]."""
        num_kv_heads, num_rows, _ = scores.shape
        most = min(max(self.pattern.budgets), num_keys)
        if not most:
            numbers = partial(torch.zeros, num_kv_heads, num_rows, dtype=torch.int32, device=scores.device)
            return numbers(0), numbers()
        taken, num_found = choose_ranks(scores, self._tables, self._older, self._budgets, newest, window, progress)
        return list_found(self._tables, taken, newest, num_keys, most), num_found

    def is_ready(self, num_keys: int, room: int) -> bool:
        """Whether a step of one token over `num_keys` keys and its own can be one of those that launch the same.

        Args:
            num_keys: keys before the step.
            room: of the keys, for which this has room as well.
        """
        row, dense_rows = self.key_offset + num_keys, self.pattern.dense_rows()
        first_older = row - self.pattern.window(room) + 1 - self.key_offset
        return (
            self.length == num_keys < room <= self.bucket.shape[1]
            and dense_rows is not None
            and row >= dense_rows
            and self.pattern.marked is None
            and max(self._num_older, 0) == max(first_older - 1, 0)
            and self._num_known(self._known_row) == self._num_known(row - 1)
        )

    def advance(self, room: int) -> None:
        """Count on after a step of one token for which this was ready."""
        self._known_row = self.key_offset + self.length
        self.length += 1
        self._num_older = self.length - self.pattern.window(room)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that a step reads and writes in place."""
        return [*self._tables, *self._hash, self._older, self._static, self._budgets, self._log_min_weights]

    def _row_blocks(self, start: int, num_rows: int, num_heads: int, num_keys: int) -> Iterator[tuple[int, int]]:
        """Rows from position `start` on in blocks that one launch takes: start .. stop - 1, of one refresh interval."""
        config, end = self.pattern.config, start + num_rows
        width = config.window_size + len(self._static) + num_row_keys(config) + max(self.pattern.budgets)
        most = max(min(_MOST_SCORES // (16 * num_heads * min(width, num_keys)), FEW), 1)
        while start < end:
            stop = min(start + most, end, (start // config.page_size + 1) * config.page_size)
            yield start, stop
            start = stop
