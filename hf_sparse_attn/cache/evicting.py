"""The keys that a cache layer keeps under an eviction policy, and attention to them.

What a KV head keeps is a shorter document: its keys stand side by side in order of position, each with the rotary
position that it had, and the sparse pattern counts kept keys. A call attends to what was kept before and, causally, to
all its own keys; only then are keys evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_sparse_attn import ops
from hf_sparse_attn.cache.buffers import is_writable, size_ahead
from hf_sparse_attn.cache.policies import Composition, UniformBudget
from hf_sparse_attn.masks.documents import Document
from hf_sparse_attn.ops.common.chunked import cap, with_sinks
from hf_sparse_attn.patterns import LayerPattern
from hf_sparse_attn.recording import HeadsFrom, Recorder

_BLOCK_WEIGHTS = 2**22  # attention weights that exist at a time


class KeptKeys:
    """The kept keys of every batch row in one layer; the attention function finds it at the new keys' tensor.

    Args:
        policy: which keys are kept.
        budget: how many.
        report: is told the bytes held whenever they change.
    """

    def __init__(self, policy: Composition, budget: UniformBudget, report: Callable[[int], None]) -> None:
        self.policy, self.budget, self.report = policy, budget, report
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.num_slots = 0  # tokens that the layer was given, padding included
        self.num_seen: list[int] = []  # tokens of each row, without padding
        self.rows: list[list[HeadGroup]] = []
        self.has_evicted = False
        self._expected = 0
        self.report(0)

    def expect(self, num_new: int) -> None:
        """The layer was given new keys, which come to `attend` next.

        Raises:
            ValueError: those before never came.
        """
        if self._expected:
            raise ValueError(
                "a SparseCache with a policy was given keys that never came to the sparse attention: the model's "
                'attn_implementation must stay "sparse", without torch.compile; a call that failed needs cache.reset()'
            )
        self.num_slots += num_new
        self._expected = num_new

    def begin(self, documents: Sequence[Document], batch_size: int, num_kv_heads: int) -> None:
        """A call with these documents goes on where the last one ended.

        Raises:
            ValueError: it does not.
        """
        if not self.rows:
            size = 1 if self.budget.by_head else num_kv_heads
            heads = [slice(first, first + size) for first in range(0, num_kv_heads, size)]
            self.rows = [[HeadGroup(part) for part in heads] for _ in range(batch_size)]
            self.num_seen = [0] * batch_size
        if len(self.rows) != batch_size:
            raise ValueError(f"the cache holds {len(self.rows)} rows, got {batch_size}")
        if not self._expected:
            raise ValueError(
                "a SparseCache with a policy was asked to attend without new keys: a layer reads another layer's keys, "
                "or its keys were attended to already"
            )
        if len({document.batch for document in documents}) != len(documents):
            raise ValueError(
                "a SparseCache with a policy holds one document in each row; it does not take several packed ones"
            )
        for document in documents:
            if document.query_offset != self.num_seen[document.batch]:
                raise ValueError(
                    f"a SparseCache with a policy has seen {self.num_seen[document.batch]} tokens of row "
                    f"{document.batch}, but the attention_mask says that new ones follow {document.query_offset}: the "
                    "mask must be that of all tokens since the first"
                )
        self._expected = 0

    def attend(
        self,
        row: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        pattern: LayerPattern,
        sinks: Tensor | None,
        scaling: float,
        softcap: float | None,
        recorder: Recorder | None,
    ) -> Tensor:
        """Attention of a document's new rows to the kept keys and to their own, which are kept or evicted afterwards.

        Args:
            row: index of the batch row.
            query: [num_heads, Q, head_dim].
            key, value: [num_key_value_heads, Q, head_dim], the new ones.
            pattern: the layer's pattern.
            sinks: [num_heads], or None.
            scaling, softcap, recorder: as for `ops.document_attention`; the recorder is told of places among kept keys.

        Returns:
            [num_heads, Q, head_dim].
        """
        num_new, heads_each = query.shape[1], len(query) // len(key)
        position = torch.arange(self.num_seen[row], self.num_seen[row] + num_new, dtype=torch.int32, device=key.device)
        has_grown, outputs = False, []
        for group in self.rows[row]:
            heads = slice(group.heads.start * heads_each, group.heads.stop * heads_each)
            own_sinks, start = None if sinks is None else sinks[heads], group.length
            new = [key[group.heads], value[group.heads], position.expand(len(key[group.heads]), -1)]
            if self.policy.ranker.reads_weights:
                new.append(torch.zeros(new[2].shape, dtype=torch.float32, device=key.device))
            complete = start == self.num_seen[row]  # room for a budget is made while nothing was evicted
            has_grown |= group.append(new, self.budget.tokens + self.budget.slack if complete else 0)
            # No index of the keys by bucket: it takes as much memory as the keys themselves.
            output = ops.document_attention(
                query[heads],
                group.keys,
                group.values,
                pattern=pattern if heads == slice(0, len(query)) else pattern.of_kv_heads(group.heads),
                query_offset=start,
                key_offset=0,
                sinks=own_sinks,
                scaling=scaling,
                softcap=softcap,
                recorder=None if recorder is None else HeadsFrom(recorder, heads.start),
            )
            outputs.append(output)
            if group.weights is not None:
                group.weights.add_(received_weights(query[heads], group.keys, scaling, softcap, own_sinks))
        self.num_seen[row] += num_new
        if has_grown:
            self.report(self.nbytes)
        self._evict(row, num_new)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _evict(self, row: int, num_new: int) -> None:
        """Keep what the budget has room for, once another call of as many tokens would go beyond the slack."""
        groups, budget = self.rows[row], self.budget
        num_heads = sum(group.num_heads for group in groups)
        too_many = sum(group.num_heads * (group.length - budget.tokens) for group in groups)
        if too_many <= max(0, num_heads * (budget.slack - num_new)):
            return
        self.has_evicted = True
        seen = self.num_seen[row]
        priorities = [self.policy.priorities(g.keys, g.positions, g.weights, seen) for g in groups]
        for group, scores, count in zip(groups, priorities, budget.counts(priorities), strict=True):
            best = scores.sort(descending=True, stable=True).indices[:, :count]
            group.keep(best.sort().values, count + budget.slack)
        self.report(self.nbytes)

    def crop(self, num_removed: int) -> None:
        """Remove the last tokens of every row; the weights that they gave to others stay.

        Raises:
            ValueError: something was evicted, which would have to come back.
        """
        if self.has_evicted:
            raise ValueError("a SparseCache cannot be cropped after its policy has evicted keys")
        self.num_slots -= num_removed
        for row, groups in enumerate(self.rows):
            self.num_seen[row] = max(0, self.num_seen[row] - num_removed)
            for group in groups:
                group.length = self.num_seen[row]

    def select(self, rows: list[int]) -> None:
        """Row i becomes a copy of what row rows[i] was."""
        self.rows = [[group.copy() for group in self.rows[row]] for row in rows]
        self.num_seen = [self.num_seen[row] for row in rows]
        self.report(self.nbytes)

    def move(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        for group in (group for groups in self.rows for group in groups):
            group.tensors = [x.to(device, non_blocking=True) for x in group.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, positions and weights, those allocated ahead included."""
        return sum(x.nbytes for groups in self.rows for group in groups for x in group.tensors)


class HeadGroup:
    """Kept keys of some KV heads of one batch row, equally many for each head, in buffers with room for more.

    Args:
        heads: which KV heads.
    """

    def __init__(self, heads: slice) -> None:
        self.heads = heads
        self.length = 0
        # [heads, room, ...]: keys, values, positions (int32), and the weights (float32) where a policy reads them
        self.tensors: list[Tensor] = []

    @property
    def num_heads(self) -> int:
        return self.heads.stop - self.heads.start

    @property
    def keys(self) -> Tensor:
        """[heads, length, head_dim], in order of position."""
        return self.tensors[0][:, : self.length]

    @property
    def values(self) -> Tensor:
        """[heads, length, head_dim]."""
        return self.tensors[1][:, : self.length]

    @property
    def positions(self) -> Tensor:
        """[heads, length] int32, in the document, padding not counted."""
        return self.tensors[2][:, : self.length]

    @property
    def weights(self) -> Tensor | None:
        """[heads, length] float32: attention that each key got so far; None where no policy reads it."""
        return self.tensors[3][:, : self.length] if len(self.tensors) > 3 else None

    def append(self, new: list[Tensor], full_size: int) -> bool:
        """Put tokens after those held; buffers that are too small grow ahead, but not beyond `full_size` for that.

        Returns:
            Whether they have grown.
        """
        start, stop = self.length, self.length + new[0].shape[1]
        grows = not self.tensors or self.tensors[0].shape[1] < stop or not is_writable(self.tensors[0])
        if grows:
            self._resize(new, start, max(stop, min(size_ahead(stop), full_size)))
        for whole, states in zip(self.tensors, new, strict=True):
            whole[:, start:stop] = states
        self.length = stop
        return grows

    def keep(self, index: Tensor, size: int) -> None:
        """Keep the keys at index [heads, count] of each head, in buffers of `size`, at least count."""
        self.length = index.shape[1]
        for i, whole in enumerate(self.tensors):
            found = whole.gather(1, index.view(*index.shape, *[1] * (whole.ndim - 2)).expand(-1, -1, *whole.shape[2:]))
            if whole.shape[1] != size or not is_writable(whole):
                whole = self.tensors[i] = whole.new_empty(len(whole), size, *whole.shape[2:])
            whole[:, : self.length] = found

    def copy(self) -> HeadGroup:
        other = HeadGroup(self.heads)
        other.length, other.tensors = self.length, [x.clone() for x in self.tensors]
        return other

    def _resize(self, like: list[Tensor], length: int, size: int) -> None:
        """Buffers of `size`, each of the kind of one of `like`, with the present first `length` tokens."""
        held, self.tensors = self.tensors, []
        for i, states in enumerate(like):
            whole = states.new_empty(len(states), size, *states.shape[2:])
            if length:
                whole[:, :length] = held[i][:, :length]
                held[i] = whole  # drops the old one before the next one is made
            self.tensors.append(whole)


@torch.no_grad()
def received_weights(
    query: Tensor, key: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Softmax weights that the rows give each key, added up over rows and over the query heads of its KV head.

    The rows read all keys up to their own, whatever the sparse pattern.

    Args:
        query: [num_heads, Q, head_dim], the rows of the last Q keys.
        key: [num_key_value_heads, K, head_dim].
        scaling, softcap, sinks: as for `ops.document_attention`.

    Returns:
        [num_key_value_heads, K] float32.
    """
    (num_kv_heads, num_keys, _), num_rows = key.shape, query.shape[1]
    dtype = ops.compute_dtype(query, key)
    grouped = query.to(dtype).unflatten(0, (num_kv_heads, -1)) * scaling  # [heads, group, Q, head_dim]
    transposed = key.to(dtype).unsqueeze(1).transpose(-1, -2)
    sinks = None if sinks is None else sinks.to(dtype).view(grouped.shape[:2])
    column = torch.arange(num_keys, device=key.device)
    own = column[num_keys - num_rows :, None]
    total = torch.zeros(num_kv_heads, num_keys, dtype=torch.float32, device=key.device)
    size = max(1, _BLOCK_WEIGHTS // (len(query) * num_keys))
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, num_rows, size):
            scores = cap(grouped[:, :, start : start + size] @ transposed, softcap)
            scores.masked_fill_(column > own[start : start + size], -torch.inf)
            total += with_sinks(scores, sinks).softmax(-1)[..., :num_keys].sum((1, 2))
    return total
