"""The windows of consecutive rows as banded matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.ops.common.chunked import cap

_BLOCK = 64  # rows per product


@dataclass(frozen=True)
class Band:
    """Windows of the rows at positions start .. stop - 1: keys at p - before .. p + after, in blocks of rows.

    Column c of block b is the key at position start + b * _BLOCK - before + c; there are width = _BLOCK + before +
    after columns.

    Args:
        start, stop: the rows.
        before, after: keys of a window before and after the row's own.
        first_key: position of the first key.
    """

    start: int
    stop: int
    before: int
    after: int = 0
    first_key: int = 0

    @property
    def _num_blocks(self) -> int:
        return -(-(self.stop - self.start) // _BLOCK)

    @property
    def width(self) -> int:
        """Columns of a block."""
        return _BLOCK + self.before + self.after

    def keys(self, x: Tensor) -> Tensor:
        """The keys or values x [N, head_dim] that each block of rows can see: [num_blocks, head_dim, width], a view.

        Zeros stand for positions before the first key and after the last one that a row sees.
        """
        low, high = self.start - self.before - self.first_key, min(self.stop + self.after - self.first_key, len(x))
        seen = x[max(low, 0) : high]
        head = max(-low, 0)
        tail = self._num_blocks * _BLOCK + self.before + self.after - head - len(seen)
        return F.pad(seen, (0, 0, head, tail)).unfold(0, self.width, _BLOCK)

    def bias(self, keys: Tensor, num_keys: int) -> Tensor:
        """0 where a row of a block sees the key in a column, else -inf: [1 or num_blocks, _BLOCK, width].

        Args:
            keys: what `keys` returned.
            num_keys: how many keys there are.
        """
        row = torch.arange(_BLOCK, device=keys.device)[:, None]
        column = torch.arange(self.width, device=keys.device)
        outside = ((column < row) | (column > row + self.before + self.after))[None]
        end = self.first_key + num_keys
        if self.start - self.before < self.first_key or self.stop + self.after > end:
            first = self.start - self.before + _BLOCK * torch.arange(len(keys), device=keys.device)
            position = first[:, None, None] + column
            outside = outside | (position < self.first_key) | (position >= end)
        return torch.zeros(outside.shape, dtype=keys.dtype, device=keys.device).masked_fill_(outside, -torch.inf)

    def positions(self, device: torch.device) -> Tensor:
        """Position of the key in every column of a row's scores: [R, width]."""
        block = torch.arange(self.stop - self.start, device=device) // _BLOCK * _BLOCK + self.start - self.before
        return block[:, None] + torch.arange(self.width, device=device)


def window_scores(rows: Tensor, keys: Tensor, bias: Tensor, softcap: float | None) -> Tensor:
    """[R, head_dim] queries, with `Band.keys` and its `bias` -> [R, width]."""
    blocks = _blocks(rows, len(keys))
    if softcap is None:
        scores = torch.baddbmm(bias.expand(len(keys), -1, -1), blocks, keys)
    else:
        scores = cap(blocks @ keys, softcap) + bias
    return scores.flatten(0, 1)[: len(rows)]


def window_values(weights: Tensor, values: Tensor) -> Tensor:
    """[R, width] weights, with `Band.keys` of the values -> [R, head_dim]."""
    return (_blocks(weights, len(values)) @ values.transpose(1, 2)).flatten(0, 1)[: len(weights)]


def _blocks(rows: Tensor, num_blocks: int) -> Tensor:
    """[R, C] -> [num_blocks, _BLOCK, C], filled up with zeros."""
    missing = num_blocks * _BLOCK - len(rows)
    return (F.pad(rows, (0, 0, 0, missing)) if missing else rows).unflatten(0, (num_blocks, _BLOCK))
