"""The frame of the implementations: rows are computed in pieces, and the backward computes each piece again.

Rows that read everything are one kind of piece, computed here, by SDPA where it can. The sparse rows' pieces are each
implementation's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.common.dropout import Dropout
from hf_sparse_attn.ops.common.threads import in_order
from hf_sparse_attn.patterns import LayerPattern
from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.tracing import carries_gradients

_DENSE_BLOCK = 1024  # dense rows per piece where they need a mask, at most
_FEWEST_DENSE_ROWS = 16  # for which an implementation's own way pays
_WINDOW_BLOCK = 64  # and at least, where the model's own window is small
_DENSE_SCORES = 2**25  # scores per piece where dense rows cannot go through SDPA
_PARALLEL_ROWS = 64  # sparse rows from which on threads pay
ONCE = (
    'attn_implementation="sparse" has no second derivatives; use implementation="reference" or '
    'attn_implementation="eager" where they are needed'
)
_EVERYTHING = slice(None)
_RECORDING = threading.Lock()  # recorders need not be safe for threads

Result = TypeVar("Result")


class DenseRows(Protocol):
    """An implementation's own way to compute rows that read everything, without softcap and dropout."""

    def attend(
        self,
        call: Call,
        num_older: int,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None = None,
    ) -> None:
        """Fill output [num_heads, R, head_dim] for rows of which the first one's own key has `num_older` before it.

        Where `call.statistics` is a list, it is left what `differentiate` needs there.
        """

    def differentiate(
        self,
        call: Call,
        num_older: int,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key, value and sinks for that of the output."""


class SparsePieces(Protocol):
    """Cuts the rows at positions start .. end - 1 into pieces, lazily."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, start: int, end: int, call: Call
    ) -> Iterator[Piece]: ...


def attend_in_pieces(
    sparse_pieces: SparsePieces,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    *,
    own_dense: DenseRows | None = None,
    in_threads: bool = True,
) -> Tensor:
    """Sparse attention of one document, without padding.

    Args:
        sparse_pieces: the implementation.
        query, key, value, call: as for a backend's `document_attention`.
        own_dense: the implementation's own way to compute many rows that read everything; None: by SDPA.
        in_threads: on a CPU, several pieces may be computed at a time, and be cut before others are computed.

    Returns:
        [num_heads, Q, head_dim].
    """
    sinks, start, end = call.sinks, call.query_offset, call.query_offset + query.shape[1]
    own = Call.of(call, sparse_pieces, own_dense=own_dense, in_threads=in_threads)
    if carries_gradients(query, key, value, sinks):
        own = replace(own, statistics=[])
    by_sdpa = not own.has_own_dense(end - start)
    if own.dense_end(end) == end and by_sdpa and len(list(_dense_blocks(start, end, query.shape[0], own))) == 1:
        # Nothing is sparse and there is one block: a backward of its own needs no second computation.
        if call.recorder is not None:
            call.recorder.add_dense(call.pattern, range(query.shape[0]), start, end)
        keys = _dense_keys(start, end, own)
        return _dense(own, start, own.key_offset + keys.start, query, key[:, keys], value[:, keys], sinks)
    return _Attention.apply(query, key, value, sinks, own)


@dataclass(frozen=True)
class Call:
    """The part of a call that its pieces know; an `AttentionCall` without its tensors.

    Where there will be a backward, an implementation may leave `statistics` of all rows for it; the backward then has
    the `output` too.
    """

    sparse_pieces: SparsePieces
    pattern: LayerPattern
    query_offset: int = 0
    key_offset: int = 0
    scaling: float = 1.0
    softcap: float | None = None
    no_sinks: bool = True
    dropout: Dropout | None = None
    candidates: Tensor | None = None
    recorder: Recorder | None = None
    own_dense: DenseRows | None = None
    in_threads: bool = True
    backward: bool = False
    statistics: list[Tensor] | None = None
    output: Tensor | None = None
    newest: Tensor | None = None

    @classmethod
    def of(cls, call: AttentionCall, sparse_pieces: SparsePieces, **others: Any) -> Call:
        """The pieces' view of a call."""
        shared = (call.pattern, call.query_offset, call.key_offset, call.scaling, call.softcap)
        own = call.sinks is None, call.dropout, call.candidates, call.recorder
        return cls(sparse_pieces, *shared, *own, newest=call.newest, **others)

    @property
    def plain(self) -> bool:
        """Whether SDPA can compute the dense rows."""
        return self.softcap is None and self.no_sinks and self.dropout is None

    def has_own_dense(self, num_rows: int) -> bool:
        """Whether the implementation itself computes so many rows that read everything."""
        known = self.softcap is None and self.dropout is None
        return self.own_dense is not None and known and num_rows >= _FEWEST_DENSE_ROWS

    def budget(self, kv_head: int, num_keys: int) -> int:
        """Keys that rows find of this KV head, which has so many, through buckets."""
        window, sliding_window = self.pattern.config.window_size, self.pattern.sliding_window
        nothing_older = sliding_window is not None and sliding_window <= window
        return 0 if nothing_older else min(self.pattern.budgets[kv_head], num_keys)

    def record(self, head: int, *rows: Any) -> None:
        """Tell the recorder, from any thread; see `recording.Recorder.add`."""
        if self.recorder is not None:
            with _RECORDING:
                self.recorder.add(self.pattern, head, *rows)

    def dense_end(self, end: int) -> int:
        """The rows before this position read everything; `end` is the position after the last row."""
        dense_rows = self.pattern.dense_rows()
        return end if dense_rows is None else max(self.query_offset, min(dense_rows, end))


@dataclass(frozen=True)
class Piece:
    """Rows that are computed together.

    Args:
        heads, rows, kv_heads: which these are.
        keys: which keys the parts hold.
        attend: takes room for the output, [heads, rows, head_dim], and the parts of `of`; fills the first.
        differentiate: from the output's gradient and these parts to the parts' gradients.
    """

    heads: slice
    rows: slice
    kv_heads: slice
    attend: Callable[..., None]
    differentiate: Callable[..., tuple[Tensor, ...]]
    keys: slice = field(default_factory=lambda: _EVERYTHING)

    @classmethod
    def by_autograd(
        cls, heads: slice, rows: slice, kv_heads: slice, compute: Callable[..., Tensor], keys: slice = _EVERYTHING
    ) -> Piece:
        """The gradients of a differentiable function from the parts of `of` to the output."""

        def attend(output: Tensor, *parts: Tensor) -> None:
            output.copy_(compute(*parts))

        def differentiate(grad: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            inputs = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                output = compute(*inputs)
            return torch.autograd.grad(output, inputs, grad)

        return cls(heads, rows, kv_heads, attend, differentiate, keys)

    def of(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> list[Tensor]:
        """The piece's own rows, keys, values and, where there are any, sinks."""
        parts = [query[self.heads, self.rows], *(x[self.kv_heads, self.keys] for x in (key, value))]
        return parts if sinks is None else [*parts, sinks[self.heads]]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the backward of a `torch.autograd.Function` give an error to whoever differentiates its gradients again.

    The gradients depend on the saved inputs as well as on what comes in. PyTorch's `once_differentiable` does not tie
    them to those, so a second pass that looks for the inputs alone would take them for constants.
    """

    def first_only(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        depends_on = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
        return tuple(None if x is None else _FirstDerivative.apply(x, *depends_on) for x in found)

    return first_only


class _FirstDerivative(torch.autograd.Function):
    """A gradient that cannot be differentiated, and what it depends on."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ONCE)


class _Attention(torch.autograd.Function):
    """All rows, piece by piece; the backward computes each piece again, so that little but inputs and output stays."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: Call) -> Tensor:
        # Heads side by side at each token, as what follows in a model wants them.
        output = query.new_empty(query.shape[1], query.shape[0], value.shape[-1]).transpose(0, 1)

        def attend(piece: Piece) -> None:
            piece.attend(output[piece.heads, piece.rows], *piece.of(query, key, value, sinks))

        for _ in _each_piece(attend, query, key, value, call):
            pass
        ctx.call, statistics = replace(call, statistics=None), call.statistics or []
        ctx.save_for_backward(query, key, value, sinks, output if statistics else None, *statistics)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, *statistics = ctx.saved_tensors

        def gradients(piece: Piece) -> tuple[Piece, tuple[Tensor, ...]]:
            parts = piece.of(query, key, value, sinks)
            return piece, piece.differentiate(grad[piece.heads, piece.rows], *parts)

        precise = torch.promote_types(key.dtype, torch.float32)  # many pieces are added up
        grads = [torch.empty_like(query)] + [torch.zeros_like(x, dtype=precise) for x in (key, value)]
        sinks_grad = None if sinks is None else torch.zeros_like(sinks)  # float32 or float64, always
        call = replace(ctx.call, recorder=None, backward=True, statistics=statistics, output=output)
        # Autocast is off as in the forward, wherever backward() is called; threads start with it off.
        with torch.autocast(query.device.type, enabled=False):
            for piece, parts in _each_piece(gradients, query, key, value, call):
                grads[0][piece.heads, piece.rows] = parts[0]
                grads[1][piece.kv_heads, piece.keys] += parts[1]
                grads[2][piece.kv_heads, piece.keys] += parts[2]
                if sinks_grad is not None:
                    sinks_grad[piece.heads] += parts[3]
        return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype), sinks_grad, None


def _each_piece(
    work: Callable[[Piece], Result], query: Tensor, key: Tensor, value: Tensor, call: Call
) -> Iterator[Result]:
    """`work` of every piece, in order: first the dense rows, then the sparse ones, on a CPU several at a time."""
    end = call.query_offset + query.shape[1]
    dense_end = call.dense_end(end)
    yield from map(work, dense_pieces(query, call.query_offset, dense_end, call))
    parallel = call.in_threads and query.device.type == "cpu" and end - dense_end >= _PARALLEL_ROWS
    num_workers = torch.get_num_threads() if parallel else 1
    if end > dense_end:
        yield from in_order(work, call.sparse_pieces(query, key, value, dense_end, end, call), num_workers)


def dense_pieces(query: Tensor, start: int, end: int, call: Call) -> Iterator[Piece]:
    """Rows at positions start .. end - 1, which read everything."""
    own = call.own_dense if call.has_own_dense(end - start) else None
    for row, stop in _dense_blocks(start, end, query.shape[0], call) if own is None else [(start, end)]:
        if call.recorder is not None:
            with _RECORDING:
                call.recorder.add_dense(call.pattern, range(query.shape[0]), row, stop)
        rows = slice(row - call.query_offset, stop - call.query_offset)
        keys = _dense_keys(row, stop, call)
        first = call.key_offset + keys.start
        if own is None:
            yield Piece.by_autograd(_EVERYTHING, rows, _EVERYTHING, partial(_dense, call, row, first), keys)
        else:
            ways = partial(own.attend, call, row - first), partial(own.differentiate, call, row - first)
            yield Piece(_EVERYTHING, rows, _EVERYTHING, *ways, keys)


def _dense_blocks(start: int, stop: int, num_heads: int, call: Call) -> Iterator[tuple[int, int]]:
    """Dense rows in one piece where SDPA needs no mask for them, else in blocks whose tables stay small."""
    num_tokens, size = call.pattern.num_tokens, _DENSE_BLOCK
    num_keys, sides = (stop - call.key_offset, 1) if num_tokens is None else (num_tokens, 2)
    window = call.pattern.sliding_window or num_keys
    if window < num_keys:  # in shorter blocks, as each row is compared with the keys of all rows of its block
        size = min(max(window // 4, _WINDOW_BLOCK), size)
        num_keys = min(sides * window + size, num_keys)
    elif call.plain and (start == call.key_offset or num_tokens is not None):
        size = max(stop - start, 1)
    if not call.plain:
        size = max(min(_DENSE_SCORES // (num_heads * max(num_keys, 1)), size), 1)
    yield from ((row, min(row + size, stop)) for row in range(start, stop, size))


def _dense_keys(start: int, stop: int, call: Call) -> slice:
    """The keys that the dense rows at positions start .. stop - 1 read, together."""
    sliding_window, num_tokens = call.pattern.sliding_window, call.pattern.num_tokens
    first = 0 if sliding_window is None else max(start - sliding_window + 1 - call.key_offset, 0)
    if num_tokens is None:
        return slice(first, stop - call.key_offset)
    return slice(first, num_tokens if sliding_window is None else min(stop + sliding_window - 1, num_tokens))


def _dense(
    call: Call, start: int, first: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """Rows from position `start` on that read everything of their `_dense_keys`, which are at positions from `first`
    on: [num_heads, R, head_dim]."""
    sliding_window, is_causal = call.pattern.sliding_window, call.pattern.is_causal
    row = torch.arange(start, start + query.shape[1], device=key.device)[:, None]
    if call.newest is not None:
        row = call.newest[:, None] + call.key_offset
    column = torch.arange(first, first + key.shape[1], device=key.device)
    mask = None
    if (is_causal and (start > first or not call.plain)) or (sliding_window or key.shape[1]) < key.shape[1]:
        mask = call.pattern.admissible(row - column)
    dtype = query.dtype
    if not call.plain or query.device.type == "cpu":  # where SDPA may take five times as long in half precision
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    if call.plain:
        if len(key) == 1:  # SDPA's backward takes 20 times as long if it repeats the one KV head itself
            key, value = (x.expand(len(query), -1, -1) for x in (key, value))
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal and mask is None, scale=call.scaling, enable_gqa=True
        )
        return output[0].to(dtype)
    grouped = (query * call.scaling).unflatten(0, (len(key), -1))  # [num_key_value_heads, group, R, head_dim]
    scores = hide(cap(grouped @ key.unsqueeze(1).transpose(-1, -2), call.softcap), None if mask is None else ~mask)
    sinks = None if sinks is None else sinks.view(grouped.shape[:2])
    weights = with_sinks(scores, sinks).softmax(-1)[..., : key.shape[1]]
    if call.dropout is not None:
        head = torch.arange(query.shape[0], device=key.device).view(*grouped.shape[:2], 1, 1)
        weights = weights * call.dropout.factors(head, row, column).to(weights)
    return (weights @ value.unsqueeze(1)).flatten(0, 1).to(dtype)


def hide(scores: Tensor, hidden: Tensor | None) -> Tensor:
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax_or_zeros(scores: Tensor) -> Tensor:
    """The softmax of [..., K], with zeros where everything is hidden."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Append a column with each head's sink: [..., R, K] and [...] -> [..., R, K + 1]."""
    if sinks is None:
        return scores
    return torch.cat([scores, sinks[..., None, None].expand(*scores.shape[:-1], 1)], -1)
