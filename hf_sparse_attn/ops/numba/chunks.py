"""Sparse attention with its inner loop compiled by Numba: on a CPU, forward and backward, memory linear in the length.

A row goes through its keys once: choose its buckets, score every key found, exact softmax, weighted sum. Keys and
values of a bucket stand side by side in memory, and each is loaded once for all query heads of its KV head.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.ops.common.chunked import Call, Piece, attend_in_pieces
from hf_sparse_attn.ops.common.threads import in_order, together
from hf_sparse_attn.ops.numba.kernels import STAGES as ROW_STAGES
from hf_sparse_attn.ops.numba.kernels import (
    Array,
    Head,
    Read,
    Rules,
    State,
    attend_heads,
    attend_rows,
    differentiate_rows,
    hash_keys,
    link_keys,
    move,
    move_back,
    unlink_keys,
)
from hf_sparse_attn.ops.numba.simd import LANES
from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.routing import MEANS_LAG, LayerPattern, random_keys, static_positions

_UNBOUNDED = 2**40  # stands for no sliding window
_MIN_CHUNK_PAGES = 4
_MAX_CHUNKS = 8  # of a document's sparse rows
_DENSE_ROWS = 256  # per chunk
_MOST_KEPT_ROWS = 64  # whose weights exist at a time
_KEYS_PER_LINKED_ROW = 100  # at most one linked row for so many keys; with more, sorting the keys pays
_FEW = 8  # rows or keys from which on libraries and threads pay
HALF = {torch.bfloat16: np.uint16, torch.float16: np.int16}  # stored so, computed in float32
_NOTHING = np.zeros(0, np.int32)

STAGES = ("hash", "tables", *ROW_STAGES)
_FIRST_OF_ROWS = STAGES.index(ROW_STAGES[0])


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

    def __init__(self, pattern: LayerPattern, num_kv_heads: int, key_offset: int) -> None:
        self.pattern, self.key_offset = pattern, key_offset
        self.length = self.row = 0
        num_buckets = pattern.bucket_hash.num_buckets
        weight, bias = pattern.bucket_hash.weight, pattern.bucket_hash.bias
        self._hash = weight.flatten(2).numpy(), bias.flatten(1).numpy(), bias.shape[2]
        head_dim, dtype = _padded(weight.shape[1]), self._hash[0].dtype
        self.bucket, self.previous = np.zeros((2, num_kv_heads, 0), np.int32)
        self.tail = np.full((num_kv_heads, num_buckets), -1, np.int32)
        self.static = np.zeros(0, np.int64)
        self.states = _empty_states(num_kv_heads, num_buckets, head_dim, dtype)

    def append(self, key: Tensor) -> None:
        """Take in the keys of [num_key_value_heads, N, head_dim] behind the first `length`."""
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
        if stop - start <= _FEW:
            hash_keys(new.numpy(), *self._hash, self.bucket, start)
        else:
            self.bucket[:, start:stop] = bucket_hash.assign(new).numpy()
        config, offset = self.pattern.config, self.key_offset
        static = static_positions(config, offset + stop, key.device, offset + start)
        if len(static):
            _never_route(self.bucket, static.numpy() - offset, self.tail.shape[1])
            self.static = np.concatenate([self.static, static.numpy()])
        link_keys(self.bucket, self.previous, self.tail, start, stop)
        self.length = stop

    def crop(self, length: int) -> None:
        """Forget the keys behind the first `length`."""
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
            window = min(config.window_size, self.pattern.sliding_window or _UNBOUNDED)
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


def _never_route(bucket: Any, static: Any, num_buckets: int) -> None:
    """Put the static keys at these indices, of which some may not be held, behind all buckets [..., N]."""
    bucket[:, static[(static >= 0) & (static < bucket.shape[1])]] = num_buckets


def _head(call: Call, kv_head: int, key: Tensor, value: Tensor, bucket: Tensor, static: Tensor) -> Head:
    """Of one KV head's keys and values [N, head_dim] with their buckets [N] int32, those of static keys set."""
    num_buckets = call.pattern.bucket_hash.num_buckets if call.budget(kv_head, len(key)) else 0
    sorted_bucket, order = torch.sort(bucket, stable=True)
    first = torch.searchsorted(sorted_bucket, torch.arange(num_buckets, dtype=torch.int32)).int()
    key, value = _filled(key), _filled(value)
    tables = key.index_select(0, order), value.index_select(0, order)
    arrays = (x.numpy() for x in (static, bucket, order.int(), first, *tables))
    return Head(key.numpy(), value.numpy(), call.key_offset, *arrays, _NOTHING)  # type: ignore[call-arg]


def _rules(call: Call, budget: int, min_weights: Array) -> Rules:
    """All but the sinks, which a chunk is given with its rows."""
    pattern, config = call.pattern, call.pattern.config
    sliding_window = pattern.sliding_window or _UNBOUNDED
    return Rules(
        dense_rows=pattern.dense_rows() or 0,
        page_size=config.page_size,
        window=min(config.window_size, sliding_window),
        sliding_window=sliding_window,
        means_lag=MEANS_LAG,
        budget=budget,
        min_weights=min_weights,
        softcap=call.softcap or 0.0,
        sinks=np.zeros((*min_weights.shape[:-1], 0), min_weights.dtype),
    )


def _empty_states(num_kv_heads: int, num_buckets: int, head_dim: int, dtype: Any) -> State:
    """Of all KV heads: each array has them first."""
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


def _of_head(states: State, kv_head: int) -> State:
    return State(*(x[kv_head] for x in states))


def _pieces(
    index: Index | None, query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call
) -> Iterator[Piece]:
    # At once, while PyTorch has all threads.
    bucket = (
        call.pattern.bucket_hash.assign(key) if index is None else torch.from_numpy(index.bucket[:, : index.length])
    )
    # In the backward each chunk adds to the gradients of all keys: no more of them than keep the threads busy.
    num_chunks = -(-2 * torch.get_num_threads() // len(key)) if call.backward else _MAX_CHUNKS
    return (
        Piece(heads, rows, kv_heads, chunk.attend, chunk.differentiate)
        for heads, rows, kv_heads, chunk in _chunks(query, key, value, bucket, start, end, call, num_chunks, index)
    )


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
    call = Call(partial(_pieces, None), pattern, 0, 0, scaling, None, True, None)
    start, end = call.dense_end(key.shape[1]), key.shape[1]
    until = STAGES.index(last)
    if start == end:
        return

    output = query.new_empty(key.shape[1], len(query), value.shape[-1]).transpose(0, 1)

    def work(part: tuple[slice, slice, slice, _Chunk]) -> None:
        heads, rows, _, chunk = part
        if until >= _FIRST_OF_ROWS:
            chunk.compute(query[heads, rows], None, output[heads, rows], until)

    bucket = pattern.bucket_hash.assign(key)
    if last == "hash":
        return
    parts = _chunks(query, key, value, bucket, start, end, call, _MAX_CHUNKS)
    for _ in in_order(work, parts, torch.get_num_threads()):
        pass


def _chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bucket: Tensor,
    start: int,
    end: int,
    call: Call,
    num_chunks: int,
    index: Index | None = None,
) -> Iterator[tuple[slice, slice, slice, _Chunk]]:
    """Rows at positions start .. end - 1, chunk after chunk of each KV head: heads, rows, KV heads and the chunk.

    They go on from the states of `index`, and move these, where there is one.
    """
    pattern, offset = call.pattern, call.query_offset
    group, page_size = len(query) // len(key), pattern.config.page_size
    chunk_rows = max(_MIN_CHUNK_PAGES, -(-(end - start) // (num_chunks * page_size))) * page_size
    static = static_positions(pattern.config, end, key.device)
    if index is None:  # an index has done this to its own
        bucket = bucket.int()
        _never_route(bucket, static - call.key_offset, pattern.bucket_hash.num_buckets)
    for kv_head in range(len(key)):
        head = _head(call, kv_head, key[kv_head], value[kv_head], bucket[kv_head], static)
        heads, row = slice(kv_head * group, (kv_head + 1) * group), start
        rules = _rules(call, call.budget(kv_head, key.shape[1]), np.array(pattern.min_weights[heads], head.key.dtype))
        if index is None or not len(head.first):
            state = _of_head(_empty_states(1, len(head.first), head.key.shape[1], head.key.dtype), 0)
        else:
            state = _of_head(index.states, kv_head)
        while row < end:
            stop = min(row // page_size * page_size + chunk_rows, end)
            known = state
            if row < rules.dense_rows:  # these ask for no bucket
                stop = min(row + _DENSE_ROWS, rules.dense_rows, end)
            else:
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
        num_heads, num_rows, head_dim = output.shape
        padded = self.head.value.shape[1]
        direct = padded == head_dim and output.stride(0) == head_dim and output.stride(2) == 1
        own = output.new_empty(num_rows, num_heads, padded).transpose(0, 1) if not direct else output
        self.compute(query, sinks, own)
        if not direct:
            output.copy_(own[..., :head_dim])

    def compute(self, query: Tensor, sinks: Tensor | None, output: Tensor, until: int = len(STAGES) - 1) -> None:
        """As `attend`, but nothing is computed after the stage `until`; each row of `output` must be contiguous."""
        rows = _by_row(query * self.call.scaling)
        for page, read in self._read(rows, sinks, output, until, self.call.recorder is not None):
            if self.call.recorder is not None:
                positions = torch.arange(self.start + page.start, self.start + page.stop)
                _record(self.call, self.kv_head, positions, read, self.head.order)

    def differentiate(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of the arguments of `attend` for that of its result."""
        rows, upstream = _by_row(query * self.call.scaling), _by_row(grad)
        head = self.head
        query_grad, key_grad, value_grad = (np.zeros_like(x) for x in (rows, head.key, head.value))
        table_key_grad, table_value_grad = np.zeros_like(key_grad), np.zeros_like(value_grad)
        sinks_grad = np.zeros(0 if sinks is None else len(sinks), rows.dtype)
        for page, read in self._read(rows, sinks, None, STAGES.index("softmax"), True):
            differentiate_rows(
                upstream[page],
                rows[page],
                head,
                self.call.softcap or 0.0,
                read,
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
        width = _num_columns(rules, len(self.head.static), len(self.head.key), config.num_random_keys)
        read = Read(
            np.empty((kept_rows, group, width), rows.dtype),
            np.empty((kept_rows, width), np.int32),
            np.empty((kept_rows, 3), np.int32),
        )
        flat, stride = _flat(output) if output is not None else (rows.reshape(-1), 0)
        summed = rows.sum(1)
        positions = torch.arange(self.start, self.start + num_rows)
        static = torch.from_numpy(self.head.static)
        drawn = random_keys(self.call.pattern, positions, static, rules.window, self.head.key_offset).int().numpy()
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


def _num_columns(rules: Rules, num_static: int, num_keys: int, num_random: int) -> int:
    fixed = num_static + min(max(rules.window, rules.dense_rows), num_keys) + num_random
    return _padded(fixed) + _padded(rules.budget) + LANES


def _record(call: Call, kv_head: int, position: Tensor, read: Read, order: Array | None) -> None:
    """Tell the recorder what rows of a KV head read; found slots are places in `order`, if there is one."""
    weights, slots, sizes = (x[: len(position)] for x in read)
    column = np.arange(slots.shape[1])
    num_fixed, first_found, stop = (sizes[:, i, None] for i in range(3))
    fixed, found = column < num_fixed, (column >= first_found) & (column < stop)
    if order is not None:
        slots = np.where(found, order[np.where(found, slots, 0)], slots)
    keys = torch.from_numpy(slots).long() + call.key_offset
    for i in range(weights.shape[1]):
        attended = torch.from_numpy(fixed | (found & (weights[:, i] != 0)))
        head = kv_head * weights.shape[1] + i
        call.record(head, position, attended, int(fixed.sum() + found.sum()), lambda: keys)


def _padded(number: int) -> int:
    return -(-number // LANES) * LANES


def _by_row(x: Tensor) -> Array:
    """[group, R, head_dim] -> [R, group, head_dim], filled up to a multiple of LANES."""
    return _filled(x.transpose(0, 1)).numpy()


def _flat_heads(x: Tensor) -> tuple[Array, int]:
    """The memory of [num_key_value_heads, N, head_dim] from its first element on, and the step from head to head.

    No copy is made of what a cache keeps, unless head_dim is no multiple of LANES.
    """
    if x.shape[2] % LANES or x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = _filled(x)
    length = (len(x) - 1) * x.stride(0) + x.shape[1] * x.shape[2]
    flat = x.detach().as_strided((length,), (1,))
    if x.dtype in HALF:
        return flat.view(torch.int16).numpy().view(HALF[x.dtype]), x.stride(0)
    return flat.numpy(), x.stride(0)


def _flat(output: Tensor) -> tuple[Array, int]:
    """The memory of [group, R, head_dim] from its first element on, and the step from row to row."""
    stride = output.stride(1)
    length = (output.shape[1] - 1) * stride + output.shape[0] * output.shape[2]
    return output.as_strided((length,), (1,)).numpy(), stride


def _filled(x: Tensor) -> Tensor:
    """Contiguous, without gradients, the last dimension filled up with zeros to a multiple of LANES."""
    missing = _padded(x.shape[-1]) - x.shape[-1]
    return F.pad(x.detach(), (0, missing)) if missing else x.detach().contiguous()


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    recorder: Recorder | None,
    index: Index | None = None,
) -> Tensor:
    """See `pieces.attend_in_pieces`; with the `index` of a cache, keys and values may be of half precision."""
    end, dense_rows = query_offset + query.shape[1], pattern.dense_rows()
    if dense_rows is None or end <= dense_rows:
        index = None  # it takes in all keys when the first row asks for them
    pieces = partial(_pieces, index)
    if index is not None:
        index.append(key)
        index.move_back(query_offset)
        index.row = end - 1
        few = query.shape[1] <= max(key.shape[1] // _KEYS_PER_LINKED_ROW, 1)
        if few and query_offset >= (dense_rows or 0):
            call = Call(pieces, pattern, query_offset, key_offset, scaling, softcap, sinks is None, recorder)
            return _attend_linked(call, index, query, key, value, sinks)
    return attend_in_pieces(
        pieces,
        query,
        key.to(query.dtype),
        value.to(query.dtype),
        pattern=pattern,
        query_offset=query_offset,
        key_offset=key_offset,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        recorder=recorder,
        dense_rows_too=True,
    )


def _attend_linked(call: Call, index: Index, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """Few sparse rows: their keys are where the cache has them."""
    num_kv_heads, num_rows, group = len(key), query.shape[1], len(query) // len(key)
    rows = _filled((query * call.scaling).unflatten(0, (num_kv_heads, group)).transpose(1, 2)).numpy()
    budgets = np.array([call.budget(h, key.shape[1]) for h in range(num_kv_heads)])
    min_weights = np.array(call.pattern.min_weights, rows.dtype).reshape(num_kv_heads, group)
    rules = _rules(call, int(budgets.max()), min_weights)
    if sinks is not None:
        rules = rules._replace(sinks=sinks.numpy().reshape(num_kv_heads, group))
    positions = torch.arange(call.query_offset, call.query_offset + num_rows)
    static = torch.from_numpy(index.static)
    drawn = random_keys(call.pattern, positions, static, rules.window, call.key_offset).int().numpy()
    keep = call.recorder is not None
    width = _num_columns(rules, len(index.static), key.shape[1], call.pattern.config.num_random_keys)
    kept_rows = num_rows if keep else 1
    read = Read(
        np.empty((num_kv_heads, kept_rows, group, width), rows.dtype),
        np.empty((num_kv_heads, kept_rows, width), np.int32),
        np.empty((num_kv_heads, kept_rows, 3), np.int32),
    )
    value_dim = _padded(value.shape[-1])
    output = query.new_empty(num_rows, len(query), value_dim)
    (flat_key, key_step), (flat_value, value_step) = _flat_heads(key), _flat_heads(value)
    keys = (key.shape[1], flat_key, flat_value, key_step, value_step, value_dim)
    attend = partial(
        attend_heads,
        position=call.query_offset,
        query=rows,
        summed=rows.sum(2),
        keys=keys,
        key_offset=call.key_offset,
        static=index.static,
        index=(index.bucket, index.previous, index.states),
        rules=rules,
        budgets=budgets,
        drawn=drawn,
        output=output.view(-1).numpy(),
        read=read,
        keep=keep,
    )
    # The threads of PyTorch's last operation still wait for the next one, busily: for a few rows a core is not free.
    num_workers = min(torch.get_num_threads(), num_kv_heads) if num_rows >= _FEW else 1
    ends = [i * num_kv_heads // num_workers for i in range(num_workers + 1)]
    together([partial(attend, low, high) for low, high in pairwise(ends)])
    if keep:
        for h in range(num_kv_heads):
            _record(call, h, positions, Read(*(x[h] for x in read)), None)
    return output[..., : value.shape[-1]].contiguous().transpose(0, 1)
