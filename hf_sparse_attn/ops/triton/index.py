"""The keys of a cached document on a GPU, by bucket, and the attention of a few rows over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.triton import decode as kernels
from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton import routing as routing_kernels
from hf_sparse_attn.ops.triton.launch import TL, block_dim, precision, rows_contiguous, with_strides
from hf_sparse_attn.routing import MEANS_LAG, LayerPattern, random_keys, static_positions

FEW = 16  # new keys and rows that one launch takes
_MOST_SCORES = 2**26  # of the rows that one launch takes
_BLOCK_KEYS = 1024


def _written_anywhere(method: Callable[..., Any]) -> Callable[..., Any]:
    """What a method makes can be changed inside torch.inference_mode() and outside, and carries no gradients."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class Index:
    """Each key's bucket and its rank in it, and what the buckets hold in all: behind a window, and known to a page.

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
        self.length = self._num_behind = self._num_known = 0
        weight, num_buckets = pattern.bucket_hash.weight, pattern.bucket_hash.num_buckets
        self.acc = weight.dtype
        numbers = partial(torch.zeros, dtype=torch.int32, device=weight.device)
        self.bucket, self._rank = numbers(num_kv_heads, 0), numbers(num_kv_heads, 0)
        self._counts = numbers(num_kv_heads, num_buckets + 1)  # of all keys, static ones last
        self._behind = numbers(num_kv_heads, num_buckets)  # of the first _num_behind keys
        self._numbers = numbers(num_kv_heads, num_buckets)  # of the first _num_known keys
        self._sums = weight.new_zeros(num_kv_heads, num_buckets, weight.shape[1])
        self._static = torch.zeros(0, dtype=torch.int64)  # on the CPU
        self._static_here = numbers(0)
        self._hash = hash_tables(pattern)
        self._budgets = torch.tensor(pattern.budgets, dtype=torch.int32, device=weight.device)
        self._log_min_weights = log_min_weights(pattern)

    @_written_anywhere
    def append(self, key: Tensor) -> None:
        """Take in the keys of [num_key_value_heads, N, head_dim] behind the first `length`, however many."""
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
        offset = self.key_offset
        found = static_positions(self.pattern.config, offset + stop, torch.device("cpu"), offset + start)
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
        """Forget the keys behind the first `length`."""
        if length >= self.length:
            return
        self._count(self._counts, length, self.length, -1)
        if length < self._num_behind:
            self._count(self._behind, length, self._num_behind, -1)
            self._num_behind = length
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
        for name in ("bucket", "_rank", "_counts", "_behind", "_numbers", "_sums"):
            setattr(other, name, getattr(self, name).clone())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Index:
        return self.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        tables = (self.bucket, self._rank, self._counts, self._behind, self._numbers, self._sums, self._static_here)
        return sum(x.nbytes for x in tables)

    @_written_anywhere
    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Append the new ones of keys [Hkv, N, D] and attend to them from sparse rows [H, R, D]; [H, R, D]."""
        query, key, value = (rows_contiguous(x) for x in (query, key, value))
        output = query.new_empty(query.shape[1], len(query), value.shape[-1]).transpose(0, 1)
        if key.shape[1] - self.length > min(FEW, query.shape[1]):
            self.append(key)
        for start, stop in self._row_blocks(call.query_offset, query.shape[1], len(query), key.shape[1]):
            rows = slice(start - call.query_offset, stop - call.query_offset)
            _Rows(self, call, query[:, rows], key, value, start).attend(output[:, rows], sinks)
        return output

    def _row_blocks(self, start: int, num_rows: int, num_heads: int, num_keys: int) -> Iterator[tuple[int, int]]:
        """Rows from position `start` on in blocks start .. stop - 1, of one page each, that one launch takes."""
        config, end = self.pattern.config, start + num_rows
        width = config.window_size + len(self._static) + config.num_random_keys + max(self.pattern.budgets)
        most = max(min(_MOST_SCORES // (16 * num_heads * min(width, num_keys)), FEW), 1)
        while start < end:
            stop = min(start + most, end, (start // config.page_size + 1) * config.page_size)
            yield start, stop
            start = stop

    def _move(self, key: Tensor, row: int, window: int) -> None:
        """Know the keys that the page of a row at this position knows, and nearly those behind its window."""
        page_size = self.pattern.config.page_size
        known = max(row // page_size * page_size - MEANS_LAG + 1 - self.key_offset, 0)
        if known < self._num_known:
            self._forget_sums()
        if known > self._num_known:
            num_buckets, head_dim = self._sums.shape[1:]
            block_buckets = min(max(num_buckets, 16), 32)
            triton_launch.launch(
                kernels.add_to_sums,
                (triton.cdiv(num_buckets, block_buckets), len(key)),
                *with_strides(key),
                self.bucket,
                self._sums,
                self._numbers,
                self._num_known,
                known,
                self.bucket.shape[1],
                NUM_BUCKETS=num_buckets,
                HEAD_DIM=head_dim,
                BLOCK_DIM=block_dim(head_dim),
                BLOCK_BUCKETS=block_buckets,
                BLOCK=triton_launch.block_keys(key, head_dim),
                PRECISION="ieee",
                ACC=TL[self.acc],
            )
            self._num_known = known
        behind = max(row - window + 1 - self.key_offset, 0)
        if behind - self._num_behind > FEW:
            self._count(self._behind, self._num_behind, behind, 1)
        elif self._num_behind - behind > FEW:
            self._count(self._behind, behind, self._num_behind, -1)
        else:
            return
        self._num_behind = behind


class _Rows:
    """Rows of one page from position `start` on, with all cached keys and values."""

    def __init__(self, index: Index, call: Call, query: Tensor, key: Tensor, value: Tensor, start: int) -> None:
        self.index, self.call, self.start = index, call, start
        self.query, self.key, self.value = query, key, value
        self.num_heads, self.num_rows, self.head_dim = query.shape
        self.num_kv_heads, self.num_keys, _ = key.shape
        self.group = self.num_heads // self.num_kv_heads
        self.num_buckets = index.pattern.bucket_hash.num_buckets
        self.window = index.pattern.window(self.num_keys)

    def attend(self, output: Tensor, sinks: Tensor | None) -> None:
        """Fill output [H, R, D]."""
        max_found = min(max(self.index.pattern.budgets), self.num_keys)
        if max_found:
            self.index._move(self.key, self.start, self.window)
        scores = self._append_and_score()
        found, num_found = self._empty(max_found), self._empty()
        if max_found:
            self._find(scores, found, num_found)
        else:
            num_found.zero_()
        self._attend(output, sinks, found, num_found)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(self.num_kv_heads, self.num_rows, *shape, dtype=dtype, device=self.key.device)

    def _append_and_score(self) -> Tensor:
        """Append the keys that the index does not have yet; the buckets' scores [Hkv, R, B]."""
        index, start, stop = self.index, self.index.length, self.num_keys
        index._make_room(stop)
        static = index._static_keys(start, stop)
        block_buckets = min(max(self.num_buckets, 16), 32)
        scores = self._empty(self.num_buckets, dtype=index.acc)
        triton_launch.launch(
            kernels.append_and_score,
            (1 + triton.cdiv(self.num_buckets, block_buckets), self.num_kv_heads),
            *with_strides(self.query, self.key),
            *index._hash,
            index.bucket,
            index._rank,
            index._counts,
            index._sums,
            index._numbers,
            scores,
            start,
            stop,
            index.bucket.shape[1],
            sum(1 << i for i in (static - start).tolist()) if len(static) else 0,
            self.num_rows,
            NUM_BUCKETS=self.num_buckets,
            GROUP=self.group,
            BLOCK_DIM=block_dim(self.head_dim),
            BLOCK_BUCKETS=block_buckets,
            BLOCK=FEW,
            **hash_constants(index.pattern),
        )
        index.length = stop
        return scores

    def _find(self, scores: Tensor, found: Tensor, num_found: Tensor) -> None:
        """The keys found through buckets: found [Hkv, R, most] and num_found [Hkv, R]."""
        index = self.index
        low, high, shift = (self._empty(self.num_buckets) for _ in range(3))
        first_behind = self.start - self.window + 1 - index.key_offset
        num_behind = max(first_behind + self.num_rows - 1, 0)
        behind = torch.empty_like(index._behind)
        triton_launch.launch(
            kernels.choose_ranks,
            (self.num_rows, self.num_kv_heads),
            scores,
            index.bucket,
            index._behind,
            behind,
            index._budgets,
            low,
            high,
            shift,
            num_found,
            index.bucket.shape[1],
            index._num_behind,
            first_behind,
            NUM_BUCKETS=self.num_buckets,
            BLOCK=self.num_buckets,
            SCORE_BITS=64 if index.acc == torch.float64 else 32,
        )
        index._behind, index._num_behind = behind, num_behind
        if num_behind:
            triton_launch.launch(
                kernels.list_found,
                (triton.cdiv(num_behind, _BLOCK_KEYS), self.num_kv_heads, self.num_rows),
                index.bucket,
                index._rank,
                low,
                high,
                shift,
                found,
                index.bucket.shape[1],
                num_behind,
                found.shape[2],
                NUM_BUCKETS=self.num_buckets,
                BLOCK=_BLOCK_KEYS,
            )

    def _attend(self, output: Tensor, sinks: Tensor | None, found: Tensor, num_found: Tensor) -> None:
        """Fill output [H, R, D] from the window, static, random and found keys."""
        index, call, config = self.index, self.call, self.index.pattern.config
        num_random, num_static, value_dim = config.num_random_keys, len(index._static), self.value.shape[-1]
        positions = torch.arange(self.start, self.start + self.num_rows, device=self.key.device)
        drawn = random_keys(index.pattern, positions, index._static_here, self.window, index.key_offset).int()
        block = triton_launch.block_keys(self.key, max(self.head_dim, value_dim))
        num_parts = triton.cdiv(self.window + num_static + num_random + found.shape[2], block)
        capacity = num_parts * block
        group_padded = max(triton.next_power_of_2(self.group), 16)
        listed, scores = self._empty(capacity), self._empty(group_padded, capacity, dtype=index.acc)
        largest, weights = (self._empty(num_parts, group_padded, dtype=index.acc) for _ in range(2))
        constants = {
            "NUM_RANDOM": num_random,
            "GROUP": self.group,
            "GROUP_PADDED": group_padded,
            "BLOCK": block,
            "PRECISION": precision(self.value.dtype),
            "ACC": TL[index.acc],
        }
        triton_launch.launch(
            kernels.score_listed,
            (num_parts, self.num_kv_heads, self.num_rows),
            *with_strides(self.query, self.key),
            index._static_here,
            drawn,
            found,
            num_found,
            listed,
            scores,
            largest,
            weights,
            call.scaling,
            call.softcap or 1.0,
            index.key_offset,
            self.start,
            self.window,
            num_static,
            found.shape[2],
            capacity,
            HEAD_DIM=self.head_dim,
            BLOCK_DIM=block_dim(self.head_dim),
            SOFTCAP=call.softcap is not None,
            **constants,
        )
        block_value_dim = min(block_dim(value_dim), 32)
        triton_launch.launch(
            kernels.sum_listed,
            (triton.cdiv(value_dim, block_value_dim), self.num_kv_heads, self.num_rows),
            *with_strides(self.value, output),
            listed,
            scores,
            largest,
            weights,
            num_found,
            sinks,
            index._log_min_weights,
            self.window,
            num_static,
            num_parts,
            capacity,
            VALUE_DIM=value_dim,
            BLOCK_VALUE_DIM=block_value_dim,
            PARTS_PADDED=triton.next_power_of_2(num_parts),
            DROP=any(index.pattern.min_weights),
            SINKS=sinks is not None,
            **constants,
        )


def hash_keys(pattern: LayerPattern, key: Tensor) -> Tensor:
    """The bucket of every key: [num_key_value_heads, N, head_dim] -> [num_key_value_heads, N], int32."""
    num_kv_heads, num_keys, _ = key.shape
    bucket = torch.empty(num_kv_heads, num_keys, dtype=torch.int32, device=key.device)
    block = 64
    triton_launch.launch(
        routing_kernels.hash_keys,
        (triton.cdiv(num_keys, block), num_kv_heads),
        *with_strides(rows_contiguous(key)),
        *hash_tables(pattern),
        bucket,
        num_keys,
        BLOCK=block,
        **hash_constants(pattern),
    )
    return bucket


def sort_by_bucket(bucket: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys by bucket, oldest first: buckets in order [Hkv, N], their keys' indices [Hkv, N] int64, each one's start.

    Args:
        bucket: [Hkv, N] int32, `num_buckets` for static keys.
        num_buckets: B.

    Returns:
        The third is [Hkv, B + 1] int32; the static keys start last.
    """
    in_order, order = torch.sort(bucket, dim=1, stable=True)
    edges = torch.arange(num_buckets + 1, device=bucket.device, dtype=torch.int32).expand(len(bucket), -1)
    return in_order, order, torch.searchsorted(in_order, edges.contiguous()).int()


def hash_tables(pattern: LayerPattern) -> tuple[Tensor, Tensor]:
    """Weight and bias of a pattern's hash, in one piece each."""
    return pattern.bucket_hash.weight.contiguous(), pattern.bucket_hash.bias.contiguous()


def hash_constants(pattern: LayerPattern) -> dict[str, Any]:
    """What the kernels that hash keys are compiled for."""
    weight, (codebooks, codes) = pattern.bucket_hash.weight, pattern.bucket_hash.bias.shape[1:]
    return {
        "HEAD_DIM": weight.shape[1],
        "CODEBOOKS": codebooks,
        "CODEBOOKS_PADDED": max(triton.next_power_of_2(codebooks), 16 // codes),
        "CODE_BITS": int(math.log2(codes)),
        "BLOCK_K": 32,
        "ACC": TL[weight.dtype],
    }


def log_min_weights(pattern: LayerPattern) -> Tensor:
    """Logarithm of each query head's smallest weight of a found key, [num_heads], in the dtype of the hash."""
    logarithms = [math.log(weight) if weight else -math.inf for weight in pattern.min_weights]
    return torch.tensor(logarithms, dtype=pattern.bucket_hash.weight.dtype, device=pattern.bucket_hash.weight.device)
