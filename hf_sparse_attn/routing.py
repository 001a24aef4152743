"""The candidates of each row: the index of keys by bucket, the scores of buckets, the selection.

Everything here is causal: what a row is given depends on its own query and on keys at or before it. (For attention
that is not, see `routing_both_sides`.) Positions count from the first token of the document. Nothing here carries a
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.patterns import LayerPattern

CHUNK_PAGES = 16  # pages of rows that are routed and computed together
MEANS_LAG = 1  # the bucket means of a page hold the keys at least this much older than its first row
_MAX_CHUNK_ROWS = 1024  # a page may have more rows
_COUNTED_ROWS = 64  # rows whose keys one product counts


def row_chunks(pattern: LayerPattern, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Rows at positions start .. end - 1 in chunks that `BucketIndex.rows` takes: in CHUNK_PAGES pages, not long."""
    size = CHUNK_PAGES * pattern.config.page_size
    while start < end:
        stop = min((start // size + 1) * size, start + _MAX_CHUNK_ROWS, end)
        yield start, stop
        start = stop


class BucketIndex:
    """The routable keys of one KV head of one document, grouped by bucket.

    Args:
        key: [N, head_dim], the keys at positions key_offset .. key_offset + N - 1.
        bucket: [N], each key's bucket.
        static: sorted positions of the static keys; they are not routable.
        first_row: no row before this position will be asked for.
        key_offset: position of the first key.
        pattern: the layer's pattern.
    """

    def __init__(
        self, key: Tensor, bucket: Tensor, static: Tensor, first_row: int, key_offset: int, pattern: LayerPattern
    ) -> None:
        config = pattern.config
        self.num_buckets = pattern.bucket_hash.num_buckets
        # Under a page as long as the document, no row knows any bucket either.
        self.page_size = min(config.page_size, max(key_offset + len(key), 1))
        self.window_size = config.window_size
        self.sliding_window = pattern.sliding_window
        self.key_offset = key_offset
        self.key = key.detach()
        # Static keys get a bucket of their own after all others.
        self.bucket = bucket.clone()
        held = static[(static >= key_offset) & (static < key_offset + len(bucket))] - key_offset
        self.bucket[held] = self.num_buckets
        sorted_bucket, order = torch.sort(self.bucket.int(), stable=True)
        self.order = order.int()  # [N] keys by bucket, oldest first
        edges = torch.arange(self.num_buckets, device=key.device, dtype=torch.int32)
        self.start = torch.searchsorted(sorted_bucket, edges).int()  # [num_buckets]
        self.first_page = first_row // self.page_size // CHUNK_PAGES * CHUNK_PAGES
        self._entered = self._chunk_sums(MEANS_LAG)
        self._left = None if self.sliding_window is None else self._chunk_sums(self._page_lag())
        self._columns = 64  # buckets per row looked at first; grows to what budgets need

    def rows(self, start: int, stop: int) -> RowChunk:
        """Bucket means and counts as the rows at positions start .. stop - 1 may know them.

        The rows must lie in one chunk of CHUNK_PAGES pages.
        """
        pages = range(start // self.page_size, -(-stop // self.page_size))
        sums, counts = self._page_state(pages, self._entered, MEANS_LAG)
        upper = self._row_counts(start, stop, self.window_size)
        lower = None
        if self.sliding_window is not None:
            left_sums, left_counts = self._page_state(pages, self._left, self._page_lag())
            sums, counts = sums - left_sums, counts - left_counts
            lower = self._row_counts(start, stop, self.sliding_window)
        routable = counts > 0
        means = sums.div_(counts.clamp(min=1).unsqueeze(-1))
        return RowChunk(self, start, stop, means, routable, upper, lower)

    def _page_lag(self) -> int:
        """How much older than a page's first row a key may be and yet lie inside the window of all its rows."""
        assert self.sliding_window is not None
        return self.sliding_window - self.page_size + 1

    def _page_of_entry(self, lag: int, position: Tensor) -> Tensor:
        """First page to whose first row each key is at least `lag` older."""
        return -(-(position + lag) // self.page_size)

    def _chunk_sums(self, lag: int) -> Tensor:
        """Sums of keys and their number, per chunk start: [num_chunks, num_buckets + 1, head_dim + 1].

        Entry c holds the keys at least `lag` older than the first row of chunk c.
        """
        end = self.key_offset + len(self.key)
        num_chunks = -(-end // self.page_size) // CHUNK_PAGES + 1 - self.first_page // CHUNK_PAGES
        position = torch.arange(self.key_offset, end, device=self.key.device)
        chunk = -(-(self._page_of_entry(lag, position) - self.first_page) // CHUNK_PAGES)
        inside = chunk < num_chunks
        return self._sum_by(chunk[inside].clamp(min=0), num_chunks, torch.nonzero(inside).flatten()).cumsum(0)

    def _sum_by(self, group: Tensor, num_groups: int, index: Tensor) -> Tensor:
        width = self.num_buckets + 1
        table = self.key.new_zeros(num_groups * width, self.key.shape[-1] + 1)
        slot = group * width + self.bucket[index]
        table[:, :-1].index_add_(0, slot, self.key[index])
        table[:, -1].index_add_(0, slot, self.key.new_ones(len(index)))
        return table.view(num_groups, width, -1)

    def _page_state(self, pages: range, chunk_sums: Tensor | None, lag: int) -> tuple[Tensor, Tensor]:
        """Sums [num_pages, num_buckets, head_dim] and counts [num_pages, num_buckets] at the start of each page."""
        assert chunk_sums is not None
        chunk = pages[0] // CHUNK_PAGES
        first = chunk * CHUNK_PAGES
        # Keys that enter between the chunk's first page and the last page asked for.
        low = max(first * self.page_size - lag + 1 - self.key_offset, 0)
        high = min(pages[-1] * self.page_size - lag + 1 - self.key_offset, len(self.key))
        index = torch.arange(low, max(low, high), device=self.key.device)
        entered = self._page_of_entry(lag, index + self.key_offset) - first
        table = self._sum_by(entered, pages[-1] - first + 1, index)
        table[0] += chunk_sums[chunk - self.first_page // CHUNK_PAGES]
        table = table.cumsum(0)[pages[0] - first :, : self.num_buckets]
        return table[..., :-1], table[..., -1]

    def _row_counts(self, start: int, stop: int, lag: int) -> Tensor:
        """Keys of each bucket at least `lag` older than each row at start .. stop - 1: [rows, num_buckets], int32."""
        first = start - lag - self.key_offset  # index of the key that enters with the first row
        return row_counts(self.bucket, self.num_buckets, first, stop - start, self.key.dtype)


def row_counts(bucket: Tensor, num_buckets: int, first: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    """How many of the keys up to index first + r are in each bucket, for rows r: [num_rows, num_buckets], int32.

    Args:
        bucket: [N]; keys in bucket `num_buckets` are not counted.
        first: an index that may be before the first or after the last key.
        dtype: a float dtype to count in.
    """
    wanted, num_rows = num_rows, -(-num_rows // _COUNTED_ROWS) * _COUNTED_ROWS
    low, high = max(0, min(first, len(bucket))), max(0, min(first + num_rows, len(bucket)))
    row = torch.arange(low - first, high - first, device=bucket.device)
    dynamic = bucket[low:high] < num_buckets
    steps = torch.zeros(num_rows, num_buckets, dtype=dtype, device=bucket.device)
    steps[row[dynamic], bucket[low:high][dynamic]] = 1
    base = torch.bincount(bucket[:low], minlength=num_buckets + 1)[:-1].to(steps)
    # A running sum down the rows, as a product with a triangle of ones inside each block of rows.
    steps = steps.unflatten(0, (-1, _COUNTED_ROWS))
    triangle = torch.ones(_COUNTED_ROWS, _COUNTED_ROWS, device=steps.device, dtype=steps.dtype).tril()
    within = torch.matmul(triangle, steps)
    total = within[:, -1]
    carried = total.cumsum(0) - total + base
    return within.add_(carried.unsqueeze(1)).flatten(0, 1)[:wanted].int()


@dataclass
class RowChunk:
    """Rows at positions start .. stop - 1 of one KV head, ready to select their routed keys."""

    index: BucketIndex
    start: int
    stop: int
    means: Tensor  # [num_pages, num_buckets, head_dim]
    routable: Tensor  # [num_pages, num_buckets], bool
    upper: Tensor  # [R, num_buckets]: keys of the bucket that are older than the window
    lower: Tensor | None  # [R, num_buckets]: of these, keys already outside the model's own window

    def select(self, query: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Keys found through the buckets for every row.

        Args:
            query: [R, head_dim], the sum of the queries of the KV head's group at each token.
            budget: keys per row.

        Returns:
            key index [R, budget or all keys] (int32, into the keys that the index was built from) and how many of its
            entries count, [R]; the others repeat an arbitrary key.
        """
        slots, count = self.select_slots(query, budget)
        return self.index.order.index_select(0, slots.view(-1)).view_as(slots), count

    def select_slots(self, query: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """As `select`, but with places in `index.order`, where each bucket's keys stand side by side."""
        index = self.index
        budget = min(budget, len(index.order))
        ranked = rank(self._scores(query), index.num_buckets)
        while True:
            columns = min(index._columns, index.num_buckets)
            available, end = self._candidates(ranked, columns)
            reached = available.cumsum(-1, dtype=torch.int32)
            if columns == index.num_buckets or bool(((reached[:, -1] >= budget) | (available[:, -1] == 0)).all()):
                break
            index._columns *= 2
        before = reached - available
        taken = torch.minimum((budget - before).clamp(min=0), available)
        # Each bucket's newest keys first, so that a smaller budget finds the first ones of these.
        slots = -_expand(1 - end, taken, before, budget)
        slots.clamp_(0, len(index.order) - 1)
        return slots, taken.sum(-1)

    def _scores(self, query: Tensor) -> Tensor:
        """Product of each row's query with the bucket means of its page: [R, num_buckets]."""
        scores = query.new_empty(len(query), self.index.num_buckets)
        page_size = self.index.page_size
        # A bucket may be known and hold nothing that is older than the row's window.
        unroutable = self.upper == (0 if self.lower is None else self.lower)
        low = self.start
        for page in range(len(self.means)):
            high = min((low // page_size + 1) * page_size, self.stop)
            rows = slice(low - self.start, high - self.start)
            torch.mm(query[rows], self.means[page].T, out=scores[rows])
            unroutable[rows] |= ~self.routable[page]
            low = high
        # Finite, as `rank` writes into the last bits of each score, and apart from those of unroutable buckets.
        largest = torch.finfo(scores.dtype).max / 2
        return scores.clamp_(-largest, largest).masked_fill_(unroutable, -2 * largest)

    def _candidates(self, ranked: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """The best `columns` buckets of each row: keys available and end of their run in `order`. [R, C], int32"""
        best = ranked[:, -columns:].flip(-1)
        bucket = (best.view(_integer(best.dtype)) & (self.index.num_buckets - 1)).long()
        upper = self.upper.gather(1, bucket)
        available = upper if self.lower is None else upper - self.lower.gather(1, bucket)
        available = available.masked_fill(best < -0.75 * torch.finfo(best.dtype).max, 0)
        return available, self.index.start.take(bucket) + upper


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def rank(scores: Tensor, num_buckets: int) -> Tensor:
    """Sort each row of `scores` in place, ascending, with the bucket number in the lowest bits of each score.

    The bits make room at 2**-13 of the score in float32 and 2**-42 in float64. Sorting bare numbers lets NumPy use
    its vectorised sort, several times faster than any sort or top-k that carries indices along.
    """
    bits = scores.view(_integer(scores.dtype))
    bits &= ~(num_buckets - 1)
    bits |= torch.arange(num_buckets, device=bits.device, dtype=bits.dtype)
    if scores.device.type != "cpu":
        return scores.sort(-1).values
    scores.numpy().sort(-1)
    return scores


def _expand(start: Tensor, length: Tensor, before: Tensor, width: int) -> Tensor:
    """Write runs of consecutive numbers side by side: [R, C] starts and lengths -> [R, width].

    Run c of a row stands at columns before[c] .. before[c] + length[c] - 1; empty runs come last. The result is the
    running sum of its own differences: one inside a run, a jump where the next one starts.
    """
    jump = start.clone()
    jump[:, 1:] -= start[:, :-1] + length[:, :-1] - 1
    steps = torch.ones(len(start), width + 1, dtype=torch.int32, device=start.device)
    steps.scatter_(1, torch.where(length > 0, before, width).long(), jump)
    return steps[:, :width].cumsum(-1, dtype=torch.int32)
