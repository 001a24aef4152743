"""Products with gathered rows of a table, and weighted sums of them, without a tensor of all the rows gathered.

They are inside two operations that PyTorch has for embeddings: `embedding_bag` (a weighted sum of gathered rows) and
its gradient in the weights (dot products with gathered rows).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class GatherDot(torch.autograd.Function):
    """scores[r, m] = rows[r] . table[index[r, m]]: [R, D], [N, D], [R, M] -> [R, M], where table is source[order]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, table: Tensor, index: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(rows, table, index, order)
        return _gather_dot(rows, table, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        rows, table, index, order = ctx.saved_tensors
        (grad,) = grad_outputs
        return _gather_sum(grad, table, index), _scatter_sum(grad, rows, index, order), None, None, None


class GatherSum(torch.autograd.Function):
    """out[r] = sum of weights[r, m] * table[index[r, m]] over m: [R, M], [N, D], [R, M] -> [R, D]; as above."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, source: Tensor, table: Tensor, index: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(weights, table, index, order)
        return _gather_sum(weights, table, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        weights, table, index, order = ctx.saved_tensors
        (grad,) = grad_outputs
        grad = grad.contiguous()
        return _gather_dot(grad, table, index), _scatter_sum(weights, grad, index, order), None, None, None


def _gather_dot(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    num_rows, width = index.shape
    offsets = torch.arange(0, num_rows * width, width, device=index.device, dtype=index.dtype)
    bags = (
        torch.arange(num_rows, device=index.device, dtype=index.dtype)[:, None].expand(-1, width).contiguous().view(-1)
    )
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), table.contiguous(), index.reshape(-1), offsets, bags, 0
    ).view(num_rows, width)


def _gather_sum(weights: Tensor, table: Tensor, index: Tensor) -> Tensor:
    return F.embedding_bag(index, table.contiguous(), per_sample_weights=weights.contiguous(), mode="sum")


def _scatter_sum(weights: Tensor, rows: Tensor, index: Tensor, order: Tensor) -> Tensor:
    """out[order[n]] = sum of weights[r, m] * rows[r] over all (r, m) with index[r, m] == n: the gather reversed."""
    keys, pairs = torch.sort(index.reshape(-1), stable=True)
    first = torch.searchsorted(keys, torch.arange(len(order), device=keys.device, dtype=keys.dtype))
    row = torch.div(pairs, index.shape[1], rounding_mode="floor")
    sums = F.embedding_bag(row, rows.contiguous(), first, per_sample_weights=weights.reshape(-1)[pairs], mode="sum")
    return torch.empty_like(sums).index_copy_(0, order, sums)
