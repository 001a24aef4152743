"""The candidates of each row where attention is not causal: `routing` for rows that read on both sides.

A bucket's mean is that of all its keys of the document, and of the last bucket that the budget reaches, a row takes the
keys that are nearest to it, of two at the same distance the earlier one. Nothing here carries a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.patterns import LayerPattern
from hf_sparse_attn.routing import rank, row_counts


class BothSidesIndex:
    """The routable keys of one KV head of one document, grouped by bucket.

    Args:
        key: [N, head_dim], all keys of the document.
        bucket: [N], each key's bucket.
        static: sorted positions of the static keys; they are not routable.
        pattern: the layer's pattern.
    """

    def __init__(self, key: Tensor, bucket: Tensor, static: Tensor, pattern: LayerPattern) -> None:
        self.num_buckets = pattern.bucket_hash.num_buckets
        self.window_size, self.sliding_window = pattern.config.window_size, pattern.sliding_window
        self.bucket = bucket.clone()
        self.bucket[static] = self.num_buckets  # static keys get a bucket of their own after all others
        sorted_bucket, order = torch.sort(self.bucket.int(), stable=True)
        self.order = order.int()  # [N] keys by bucket, in the order of their positions
        edges = torch.arange(self.num_buckets + 1, device=key.device, dtype=torch.int32)
        edges = torch.searchsorted(sorted_bucket, edges).int()
        self.start = edges[:-1]  # [num_buckets]
        self.size = edges.diff()  # [num_buckets]
        sums = torch.zeros(self.num_buckets + 1, key.shape[1], dtype=key.dtype, device=key.device)
        sums.index_add_(0, self.bucket, key.detach())
        self.means = sums[:-1] / self.size.clamp(min=1).unsqueeze(-1)

    def rows(self, start: int, stop: int) -> BothSidesChunk:
        """What rows at positions start .. stop - 1 may read of each bucket."""
        left = self._keys_to(start, stop, -self.window_size)
        right = self._keys_to(start, stop, self.window_size - 1)
        first, end = torch.zeros_like(left), self.size.expand_as(right)
        if self.sliding_window is not None:
            first = self._keys_to(start, stop, -self.sliding_window)
            end = self._keys_to(start, stop, self.sliding_window - 1)
        # Inside of a window that is narrower than the config's own, there is nothing to route.
        return BothSidesChunk(self, start, left, (left - first).clamp_(min=0), right, (end - right).clamp_(min=0))

    def _keys_to(self, start: int, stop: int, ahead: int) -> Tensor:
        """Keys of each bucket up to position p + ahead, for rows p from start to stop - 1: [rows, num_buckets]."""
        return row_counts(self.bucket, self.num_buckets, start + ahead, stop - start, self.means.dtype)


@dataclass
class BothSidesChunk:
    """Some rows of one KV head, ready to select their routed keys. Each tensor is [R, num_buckets], int32."""

    index: BothSidesIndex
    start: int  # position of the first row
    left_end: Tensor  # place in the bucket after the last key that is older than the row's window
    num_left: Tensor  # how many of those before it the row may read
    right_start: Tensor  # place in the bucket of the first key that is newer than the row's window
    num_right: Tensor  # how many from there on the row may read

    def select_slots(self, query: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Keys found through the buckets for every row, as places in `index.order`; see `RowChunk.select`.

        Args:
            query: [R, head_dim], the sum of the queries of the KV head's group at each token.
            budget: keys per row.

        Returns:
            [R, budget or all keys] (int32) and how many of its entries count, [R]; the others repeat arbitrary places.
        """
        index = self.index
        budget = min(budget, len(index.order))
        available = self.num_left + self.num_right
        scores = query @ index.means.T
        # Finite, as `rank` writes into the last bits of each score, and apart from those of empty buckets.
        largest = torch.finfo(scores.dtype).max / 2
        scores = scores.clamp_(-largest, largest).masked_fill_(available == 0, -2 * largest)
        integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
        bucket = (rank(scores, index.num_buckets).flip(-1).view(integer) & (index.num_buckets - 1)).long()
        available, left, right = (x.gather(1, bucket) for x in (available, self.num_left, self.num_right))
        before = available.cumsum(-1, dtype=torch.int32) - available
        taken = torch.minimum((budget - before).clamp(min=0), available)
        num_columns = max(int((taken > 0).sum(-1).max()), 1)  # empty buckets come last
        bucket, taken, left, right = (x[:, :num_columns] for x in (bucket, taken, left, right))
        left_end = index.start[bucket] + self.left_end.gather(1, bucket)
        right_start = index.start[bucket] + self.right_start.gather(1, bucket)
        cut = (taken > 0) & (taken < left + right)
        num_older = torch.minimum(taken, left)
        row, column = torch.nonzero(cut, as_tuple=True)
        num_older[cut] = self._num_older(row, column, taken, left, right, left_end, right_start)
        # Each bucket is two runs of places, of older and of newer keys.
        starts = torch.stack([left_end - num_older, right_start], -1).flatten(1)
        lengths = torch.stack([num_older, taken - num_older], -1).flatten(1)
        ends = lengths.cumsum(-1, dtype=torch.int32)
        column = torch.arange(budget, dtype=torch.int32, device=query.device).expand(len(query), -1)
        run = torch.searchsorted(ends, column.contiguous(), right=True).clamp_(max=ends.shape[1] - 1)
        slots = (starts + lengths - ends).gather(1, run) + column
        return slots.clamp_(0, len(index.order) - 1), taken.sum(-1)

    def _num_older(
        self,
        row: Tensor,
        column: Tensor,
        taken: Tensor,
        left: Tensor,
        right: Tensor,
        left_end: Tensor,
        right_start: Tensor,
    ) -> Tensor:
        """How many of a bucket's `taken` keys nearest to the row are older than it, for each pair of row and column.

        The n-th older key is one of them if no more than taken - n newer ones are nearer: found by bisection.
        """
        order, last = self.index.order, len(self.index.order) - 1
        position = row + self.start
        taken, left, right, left_end, right_start = (
            x[row, column].long() for x in (taken, left, right, left_end, right_start)
        )
        low, high = torch.zeros_like(taken), torch.minimum(taken, left)
        while bool((low < high).any()):
            middle = (low + high + 1) // 2
            newer = taken - middle  # the first of the newer keys that is then left out
            distance = position - order[(left_end - middle).clamp(0, last)]
            left_out = order[(right_start + newer).clamp(0, last)] - position
            is_one = (newer >= right) | (distance <= left_out)
            low, high = torch.where(is_one, middle, low), torch.where(is_one, high, middle - 1)
        return low.int()
