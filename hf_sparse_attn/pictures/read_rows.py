"""What sampled rows of a forward read, what they missed, and where the mass of the dense softmax lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.ops import compute_dtype, document_attention
from hf_sparse_attn.patterns import LayerPattern, global_patterns, row_patterns, static_patterns
from hf_sparse_attn.recording import admissible_pairs

# Why a row reads a key (the first that holds), and why not: its weight is under min_weight, or it was never scored.
READ_KINDS = ("window", "static", "own", "routed", "dense")
KINDS = (*READ_KINDS, "light", "unscored")
_WINDOW, _STATIC, _OWN, _ROUTED, _DENSE, _LIGHT, _UNSCORED = range(len(KINDS))


def spread_rows(num_tokens: int, num_rows: int) -> list[int]:
    """Positions of `num_rows` rows, at most `num_tokens`, spread evenly over a document; the last one is its last."""
    return [(i + 1) * num_tokens // num_rows - 1 for i in range(num_rows)]


@dataclass(frozen=True)
class RowKeys:
    """What one row of one head reads, and the heaviest keys that it misses.

    Args:
        position: of the row, in its document.
        num_admissible, num_scored, num_read: keys that it may read, that it scores, that it reads.
        kept: share of the dense softmax that lies on the keys that it reads.
        keys: [K] int64, ascending: all that it reads, and the missed ones.
        kinds: [K] uint8, places in `KINDS`.
        weights: [K], weights of the dense softmax over all admissible keys.
    """

    position: int
    num_admissible: int
    num_scored: int
    num_read: int
    kept: float
    keys: Tensor
    kinds: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LayerMass:
    """One layer by head.

    Args:
        density: [num_heads] float64, attended over admissible pairs of all rows.
        mass: [num_heads, READ_KINDS] float64, mean share of the dense softmax over the sampled rows, by why it is read;
            what is left to 1 is missed.
    """

    density: Tensor
    mass: Tensor

    @property
    def kept(self) -> Tensor:
        """[num_heads] float64, mean share of the dense softmax that is read."""
        return self.mass.sum(-1)


class RowReader:
    """A recorder and an observer of one forward of one document, by `record` and `observe` of `integration`.

    The weights are those of a dense softmax over the queries and keys that the forward itself has, so that they belong
    to the keys that it reads. A softcap or sinks of the model are left out of them.

    Args:
        num_tokens: length of the document.
        rows: positions of the sampled rows.
        layers, heads: whose sampled rows are kept key by key.
        num_missed: how many of the heaviest missed keys are kept of a row.

    `layers[layer]` is then a `LayerMass` for each layer with attention, and `rows[layer, head]` a list of `RowKeys`.
    """

    def __init__(
        self, num_tokens: int, rows: Sequence[int], layers: Sequence[int], heads: Sequence[int], num_missed: int = 16
    ) -> None:
        self.layers: dict[int, LayerMass] = {}
        self.rows: dict[tuple[int, int], list[RowKeys]] = {}
        self._num_tokens = num_tokens
        self._rows = torch.tensor(sorted(set(rows)))
        self._chosen = layers, heads
        self._num_missed = num_missed
        self._seen: _Seen | None = None  # by the layer that is computed

    def add(self, pattern: LayerPattern, *rows: Any) -> None:
        self._of(pattern).add(pattern, *rows)

    def add_dense(self, pattern: LayerPattern, *rows: Any) -> None:
        self._of(pattern).add_dense(pattern, *rows)

    @torch.no_grad()
    def observe(
        self, pattern: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
    ) -> None:
        """An `integration.Observer`; the layer's rows have been recorded before."""
        seen, self._seen = self._seen, None
        if seen is None or len(query) != 1 or query.shape[2] != self._num_tokens:
            return  # not the forward of the document
        dtype, num_heads, group = compute_dtype(query, key), query.shape[1], query.shape[1] // key.shape[1]
        layer, (layers, heads) = pattern.layer_idx, self._chosen
        of_head = [seen.patterns[head] for head in range(num_heads)]
        scored = self._scored(pattern, seen, query[0], key[0], value[0], scaling) if layer in layers else None
        admissible = _admissible(self._rows, self._num_tokens, of_head[0])
        kinds_of = {id(own): own for own in of_head}  # patterns are few
        reasons = {place: _reasons(self._rows, self._num_tokens, own) for place, own in kinds_of.items()}
        mass = torch.zeros(num_heads, len(KINDS), dtype=torch.float64)
        sampled = query[0][:, self._rows.to(query.device)].to(dtype)
        for head in range(num_heads):
            scores = (sampled[head] @ key[0, head // group].to(dtype).T * scaling).cpu()
            weights = scores.masked_fill_(~admissible, -torch.inf).softmax(-1)
            kinds = torch.where(seen.read[head], reasons[id(of_head[head])], _UNSCORED)
            shares = weights.new_zeros(len(self._rows), len(KINDS)).scatter_add_(1, kinds.long(), weights)
            mass[head] = shares.double().mean(0)
            if scored is not None and head in heads:
                kinds[scored[head] & ~seen.read[head]] = _LIGHT
                self.rows[layer, head] = self._keys(kinds, weights, admissible)
        attended, possible = torch.stack([seen.pairs[head] for head in range(num_heads)], 1)
        self.layers[layer] = LayerMass(attended / possible, mass[:, : len(READ_KINDS)])

    def _of(self, pattern: LayerPattern) -> _Seen:
        if self._seen is None or self._seen.layer_idx != pattern.layer_idx:
            self._seen = _Seen(pattern.layer_idx, self._rows, self._num_tokens)
        return self._seen

    def _scored(
        self, pattern: LayerPattern, seen: _Seen, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> dict[int, Tensor]:
        """What each head's rows score, [R, N] bool: what they would read if no weight were too small."""
        if not any(pattern.min_weights):
            return seen.read
        told = seen.patterns[0]  # of these heads alone, but with all that a forward says
        all_read = replace(
            pattern,
            min_weights=[0.0] * len(query),
            sliding_window=told.sliding_window,
            is_causal=told.is_causal,
            marked=told.marked,
        )
        scored = _Seen(pattern.layer_idx, self._rows, self._num_tokens)
        document_attention(
            query, key, value, pattern=all_read, query_offset=0, key_offset=0, scaling=scaling, recorder=scored
        )
        return scored.read

    def _keys(self, kinds: Tensor, weights: Tensor, admissible: Tensor) -> list[RowKeys]:
        """From kinds, weights and admissible keys [R, N] of one head."""
        missed = (kinds >= _LIGHT) & admissible
        top = weights.masked_fill(~missed, -1).topk(min(self._num_missed, self._num_tokens), -1).indices
        is_read = kinds < _LIGHT
        shown = is_read | (torch.zeros_like(missed).scatter_(1, top, True) & missed)
        found = []
        for row, position in enumerate(self._rows.tolist()):
            keys = shown[row].nonzero().flatten()
            num_scored = int((kinds[row] < _UNSCORED).sum())
            kept = float(weights[row][is_read[row]].sum())
            numbers = int(admissible[row].sum()), num_scored, int(is_read[row].sum())
            found.append(RowKeys(position, *numbers, kept, keys, kinds[row][keys], weights[row][keys]))
        return found


class _Seen:
    """A recorder of one layer: which keys the sampled rows read, and how many pairs all rows do.

    By head: `patterns`, `read` [R, N] bool, and `pairs` [2] float64, attended and admissible ones.
    """

    def __init__(self, layer_idx: int, rows: Tensor, num_tokens: int) -> None:
        self.layer_idx = layer_idx
        self.rows = rows
        self.num_tokens = num_tokens
        self.patterns: dict[int, LayerPattern] = {}
        self.read: dict[int, Tensor] = {}
        self.pairs: dict[int, Tensor] = {}

    def add(
        self,
        pattern: LayerPattern,
        head: int,
        position: Tensor,
        num_attended: int,
        num_scored: int,
        read: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self._count(pattern, head, num_attended, admissible_pairs(position, pattern.sliding_window, pattern.num_tokens))
        is_sampled = torch.isin(position.cpu(), self.rows)
        if is_sampled.any():
            attended, keys = read()
            chosen = is_sampled.to(attended.device)
            attended, keys = attended[chosen].cpu(), keys.expand_as(attended)[chosen].cpu()
            slot = torch.searchsorted(self.rows, position.cpu()[is_sampled])
            row, column = attended.nonzero(as_tuple=True)
            self.read[head][slot[row], keys[row, column].long()] = True

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        pairs = admissible_pairs(torch.arange(start, stop), pattern.sliding_window, pattern.num_tokens)
        inside = (self.rows >= start) & (self.rows < stop)
        admissible = _admissible(self.rows[inside], self.num_tokens, pattern)
        for head in heads:
            self._count(pattern, head, pairs, pairs)
            self.read[head][inside] = admissible

    def _count(self, pattern: LayerPattern, head: int, num_attended: int, num_admissible: int) -> None:
        if head not in self.patterns:
            self.patterns[head] = pattern
            self.read[head] = torch.zeros(len(self.rows), self.num_tokens, dtype=torch.bool)
            self.pairs[head] = torch.zeros(2, dtype=torch.float64)
        self.pairs[head] += torch.tensor([num_attended, num_admissible])


def _admissible(rows: Tensor, num_tokens: int, pattern: LayerPattern) -> Tensor:
    """Keys that the model itself lets rows at positions `rows` [R] see: [R, N] bool."""
    return pattern.admissible(rows[:, None] - torch.arange(num_tokens))


def _reasons(rows: Tensor, num_tokens: int, pattern: LayerPattern) -> Tensor:
    """Why rows at positions `rows` [R] read each key, if they do: [R, N] uint8, places in `READ_KINDS`."""
    key = torch.arange(num_tokens)
    reasons = torch.full((len(rows), num_tokens), _ROUTED, dtype=torch.uint8)
    for own in row_patterns(pattern.config, pattern.num_tokens):
        for i, row in enumerate(rows.tolist()):
            reasons[i, own.admits(row, key)] = _OWN
    for static in static_patterns(pattern.config, pattern.marked):
        reasons[:, static.admits(key)] = _STATIC
    reasons[(rows[:, None] - key).abs() < pattern.config.window_size] = _WINDOW
    if not pattern.is_causal:
        for static in global_patterns(pattern.config, pattern.marked):
            reasons[static.admits(rows)] = _DENSE
    dense_rows = pattern.dense_rows()
    reasons[rows < (num_tokens if dense_rows is None else dense_rows)] = _DENSE
    return reasons
