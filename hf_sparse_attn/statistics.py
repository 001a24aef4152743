"""What a call of the attention read, and how much of the dense attention's mass that was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_attn.recording import Recorder, Recorders, admissible_pairs

if TYPE_CHECKING:
    from hf_sparse_attn.ops.common.call import AttentionCall
    from hf_sparse_attn.patterns import LayerPattern


class AttentionStatistics:
    """A recorder of `sparse_attention`; calls of one layer add up.

    With w the weights of a row's dense softmax over all keys that it may see, and S the keys that it reads:

        density = pairs read / pairs that may be seen      keys_per_row = |S|      kept_mass = sum of w over S

    Args:
        num_rows: rows of each document whose `kept_mass` is computed, evenly spaced, the last one among them; 0: none.
            Memory for [num_heads, num_rows, N] numbers is needed.
    """

    def __init__(self, num_rows: int = 64) -> None:
        self.num_rows = num_rows
        self._pairs = torch.zeros(2, dtype=torch.int64)  # read, may be seen
        self._reads = torch.zeros(0, 2, dtype=torch.int64)  # of each head: keys read, rows
        self._mass = torch.zeros(0, 2, dtype=torch.float64)  # of each head: kept, sampled rows
        self._weights: Tensor | None = None
        self._rows, self._key_offset = range(0), 0

    @property
    def density(self) -> float:
        """Pairs of rows and keys that were read over those that may be seen; NaN before any call."""
        return float(self._pairs[0] / self._pairs[1])

    @property
    def keys_per_row(self) -> Tensor:
        """Keys that a row reads, on average: [num_heads], float64."""
        return self._reads[:, 0] / self._reads[:, 1].double()

    @property
    def kept_mass(self) -> Tensor:
        """Share of the dense mass that lies on the keys which a sampled row reads, on average: [num_heads], float64."""
        return self._mass[:, 0] / self._mass[:, 1]

    def __repr__(self) -> str:
        kept = f", kept_mass={self.kept_mass.mean():.4f}" if self._mass[:, 1].any() else ""
        return f"AttentionStatistics(density={self.density:.4f}, keys_per_row={self.keys_per_row.mean():.1f}{kept})"

    @torch.no_grad()
    def begin(self, query: Tensor, key: Tensor, call: AttentionCall) -> None:
        """Compute the sampled rows' dense weights, before a document's rows are told; see `AttentionCall`."""
        if not len(self._reads):
            self._reads, self._mass = self._reads.new_zeros(len(query), 2), self._mass.new_zeros(len(query), 2)
        num_queries, dtype = query.shape[1], torch.promote_types(query.dtype, torch.float32)
        step, stop = -(-num_queries // max(self.num_rows, 1)), call.query_offset + num_queries
        self._rows = range(call.query_offset + (num_queries - 1) % step, stop, step) if self.num_rows else range(0)
        self._key_offset = call.key_offset
        if not self._rows:
            return
        rows = torch.arange(self._rows.start, stop, step, device=key.device)
        position = torch.arange(key.shape[1], device=key.device) + call.key_offset
        visible = call.pattern.admissible(rows[:, None] - position)
        grouped = query[:, rows - call.query_offset].to(dtype).unflatten(0, (len(key), -1)) * call.scaling
        scores = (grouped @ key.to(dtype).unsqueeze(1).transpose(-1, -2)).flatten(0, 1)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        self._weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)

    def add(
        self,
        pattern: LayerPattern,
        head: int,
        position: Tensor,
        num_attended: int,
        num_scored: int,
        read: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        """See `recording.Recorder`."""
        self._count(pattern, range(head, head + 1), position, num_attended)
        inside = [place for place, row in enumerate(position.tolist()) if row in self._rows]
        if not inside:
            return
        assert self._weights is not None
        attended, keys = (x[inside] for x in read())
        sampled = [self._rows.index(row) for row in position[inside].tolist()]
        weights = self._weights[head, sampled]
        # Whatever stands in columns that are not attended may be no key at all.
        kept = weights.gather(-1, torch.where(attended, keys - self._key_offset, 0).long()).masked_fill(~attended, 0)
        self._mass[head] += torch.tensor([float(kept.double().sum()), len(inside)], dtype=torch.float64)

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        """See `recording.Recorder`."""
        position = torch.arange(start, stop)
        pairs = admissible_pairs(position, pattern.sliding_window, pattern.num_tokens)
        self._count(pattern, heads, position, pairs)
        self._mass[heads.start : heads.stop] += sum(row in self._rows for row in range(start, stop))

    def _count(self, pattern: LayerPattern, heads: range, position: Tensor, num_attended: int) -> None:
        """`num_attended` pairs for each of the heads."""
        admissible = admissible_pairs(position, pattern.sliding_window, pattern.num_tokens)
        self._pairs += len(heads) * torch.tensor([num_attended, admissible])
        self._reads[heads.start : heads.stop] += torch.tensor([num_attended, len(position)])


def statistics_in(recorder: Recorder | None) -> list[AttentionStatistics]:
    """Those that a recorder is or holds; they want to see a document before its rows are told."""
    if isinstance(recorder, Recorders):
        return [found for part in recorder.recorders for found in statistics_in(part)]
    return [recorder] if isinstance(recorder, AttentionStatistics) else []
