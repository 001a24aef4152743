"""How many keys each head may find and read: every choice's cost is measured, then keys go where they save most.

The loss is predicted to second order (as in Optimal Brain Damage, LeCun et al. 1990): an error d of one head's output
costs d^T G d / 2 nats, where G is the mean outer product of the gradients of the model's own loss in that output, with
labels drawn from the model (the Fisher information). Errors of different heads and rows are taken as independent, so
the prediction is too low, but it ranks the choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.hashing import BucketHash
from hf_sparse_attn.patterns import LayerPattern, Marked, is_local, num_row_keys, row_keys, static_positions
from hf_sparse_attn.recording import admissible_pairs
from hf_sparse_attn.routing import BucketIndex

Array = npt.NDArray[Any]
Choice = TypeVar("Choice")

BUDGETS = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
MIN_WEIGHTS = (0.0, 1e-5, 3e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2)
KEY_BUDGET = 1536  # largest mean of a row's candidates that is chosen unless another one is asked for
NUM_SAMPLED_ROWS = 64
FIXED = "dense rows and layers, windows, static keys and rows' own"  # what is read in any case
_SMALLEST_WINDOW = 64
_BLOCK_ROWS = 8
_COUNTED_ROWS = 1024  # whose own keys are written out together
_STEPS = 40  # of each bisection
_PRICES = 1e-14, 1e2  # in nats, far outside of what a pair can be worth


@dataclass(frozen=True)
class Costs:
    """What the choices cost, summed over rows; leading dimensions (layers) are the same in all.

    Args:
        loss: [..., H, len(BUDGETS), len(MIN_WEIGHTS)], predicted loss in nats of every query head.
        read: of the same shape, (row, key) pairs that are read through the buckets.
        fixed: [...], pairs of one head that are read in any case (`fixed_pairs`).
        admissible: [...], pairs of one head that a dense layer reads.
        rows: number of sparse rows.
        tokens: number of tokens.
        group: query heads per KV head.
    """

    loss: Tensor
    read: Tensor
    fixed: Tensor
    admissible: Tensor
    rows: int
    tokens: int
    group: int

    def __add__(self, other: Costs) -> Costs:
        """Of two documents."""
        return Costs(
            self.loss + other.loss,
            self.read + other.read,
            self.fixed + other.fixed,
            self.admissible + other.admissible,
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.group,
        )

    @property
    def least_density(self) -> float:
        """Share of the admissible pairs that is read without any routed key."""
        return float(self.fixed.sum() / self.admissible.sum())

    @classmethod
    def stack(cls, layers: dict[int, Costs], num_layers: int) -> Costs:
        """All layers of a model; those without attention, and local ones, cost nothing and count no pairs."""
        some = next(iter(layers.values()))

        def stacked(name: str) -> Tensor:
            absent = torch.zeros_like(getattr(some, name))
            return torch.stack([getattr(layers[i], name) if i in layers else absent for i in range(num_layers)])

        return cls(
            stacked("loss"),
            stacked("read"),
            stacked("fixed"),
            stacked("admissible"),
            some.rows,
            some.tokens,
            some.group,
        )


@dataclass(frozen=True)
class Allocation:
    """One choice for every head.

    Args:
        key_budget: per layer and KV head, as in the config.
        min_weight: per layer and query head, as in the config.
        dense_layers: layers that read everything.
        mean_key_budget: keys found for a row, on average over the KV heads of the layers that count.
        density: read over admissible pairs that this is expected to take; pairs of local layers do not count.
        loss: predicted loss in nats per token.
    """

    key_budget: tuple[tuple[int, ...], ...]
    min_weight: tuple[tuple[float, ...], ...]
    dense_layers: tuple[int, ...]
    mean_key_budget: float
    density: float
    loss: float


def by_head(costs: Costs, choice: Allocation) -> tuple[Tensor, Tensor]:
    """What a choice comes to in each head: density and predicted loss in nats per token, [num_layers, num_heads] each.

    Dense layers have density 1 and loss 0; layers that count no pairs, such as local ones, have NaN.
    """
    budget, weight = np.searchsorted(BUDGETS, choice.key_budget), np.searchsorted(MIN_WEIGHTS, choice.min_weight)
    loss, read = map(torch.from_numpy, _at_choice(costs, budget, weight))
    dense = torch.zeros(len(loss), dtype=torch.bool).index_fill_(0, torch.tensor(choice.dense_layers).long(), True)
    density = torch.where(dense[:, None], 1, (costs.fixed[:, None] + read) / costs.admissible[:, None])
    loss = torch.where(dense[:, None], 0, loss / costs.tokens)
    return density, loss.masked_fill(costs.admissible[:, None] == 0, torch.nan)


def fixed_pairs(
    config: SparseAttentionConfig,
    layer_idx: int,
    num_tokens: int,
    sliding_window: int | None,
    marked: Marked | None = None,
) -> int:
    """(row, key) pairs of a document that one head reads in any case: dense rows, window, static keys, a row's own.

    `marked` says where `global_token_ids` stand.
    """
    position = torch.arange(num_tokens)
    admissible = position + 1 if sliding_window is None else (position + 1).clamp(max=sliding_window)
    if layer_idx in config.dense_layers:
        return int(admissible.sum())
    static = static_positions(config, num_tokens, position.device, marked=marked)
    older = torch.searchsorted(static, position - config.window_size, right=True)  # static keys older than the window
    if sliding_window is not None:
        older = (older - torch.searchsorted(static, position - sliding_window, right=True)).clamp(min=0)
    fixed = torch.minimum(admissible, config.window_size + older)
    if num_row_keys(config):
        pattern = LayerPattern(config, layer_idx, [], [], BucketHash.empty(1, 1), sliding_window)
        window = pattern.window(num_tokens)
        blocks = position.split(_COUNTED_ROWS)
        fixed = fixed + torch.cat([(row_keys(pattern, rows, static, window, 0) >= 0).sum(1) for rows in blocks])
    return int(torch.where(position < config.dense_below, admissible, fixed).sum())


def least_density(config: SparseAttentionConfig, windows: Mapping[int, int | None], num_tokens: int) -> float:
    """Share of a document's admissible pairs that is read without any routed key, those of `global_token_ids` aside.

    Args:
        config: what is not fitted.
        windows: by layer, the model's own sliding windows (`config.sliding_windows`); local layers do not count.
        num_tokens: length of the document.

    Raises:
        ValueError: all layers are local.
    """
    windows = {layer: window for layer, window in windows.items() if not is_local(config, window)}
    if not windows:
        raise ValueError(
            f"all of its layers have a sliding window of at most dense_below={config.dense_below} keys, which is read "
            "whole: there is nothing to make sparse"
        )
    config, position = config.replace(global_token_ids=()), torch.arange(num_tokens)
    fixed = sum(fixed_pairs(config, layer, num_tokens, window) for layer, window in windows.items())
    return fixed / sum(admissible_pairs(position, window) for window in windows.values())


def fitting_window_size(config: SparseAttentionConfig, num_tokens: int, density: float) -> int:
    """`window_size`, halved until the window takes at most a sixth of the pairs that may be read; at least 64 keys.

    Args:
        config, num_tokens: as for `least_density`.
        density: share of a document's admissible pairs that may be read.
    """
    return _halved(config.window_size, _SMALLEST_WINDOW, lambda size: 1 - (1 - size / num_tokens) ** 2, density)


def fitting_dense_below(
    config: SparseAttentionConfig, windows: Mapping[int, int | None], num_tokens: int, density: float
) -> int:
    """`dense_below`, halved until the rows under it take at most a sixth of the pairs that may be read.

    It stays at least as large as the window, which such rows read anyway, and as the own windows of local layers, which
    stay local.

    Args:
        config, windows, num_tokens: as for `least_density`.
        density: share of a document's admissible pairs that may be read.
    """
    least = max([config.window_size, *(window for window in windows.values() if window and is_local(config, window))])
    return _halved(config.dense_below, least, lambda rows: (rows / num_tokens) ** 2, density)


def _halved(number: int, least: int, share: Callable[[int], float], density: float) -> int:
    """`number`, halved until its share of the pairs is at most a sixth of `density`, but never to less than `least`."""
    while share(number) > density / 6 and number // 2 >= least:
        number //= 2
    return number


def first_row(config: SparseAttentionConfig) -> int:
    """The first row that is sparse and has older keys to choose from."""
    return max(config.dense_below, config.window_size + config.num_global_tokens)


def sampled_blocks(config: SparseAttentionConfig, num_rows: int) -> list[tuple[int, int]]:
    """Short runs of rows [start, stop), each inside one page, spread over the sparse rows of a document."""
    size = min(_BLOCK_ROWS, config.page_size)
    first = first_row(config)
    centres = torch.linspace(first, num_rows - size, NUM_SAMPLED_ROWS // size + 1, dtype=torch.float32)[1:].long()
    return [(start, start + size) for start in (centres // size * size).tolist()]


def measure_layer(
    rows: Tensor, key: Tensor, value: Tensor, sensitivity: Tensor, pattern: LayerPattern, scaling: float
) -> Costs:
    """What every choice costs in one layer on one document.

    A softcap or sinks of the model's own are left out.

    Args:
        rows: [num_heads, R, head_dim], the queries of the rows of `sampled_blocks`.
        key, value: [num_key_value_heads, N, head_dim], float32.
        sensitivity: [num_heads, head_dim, head_dim], mean outer product of the loss's gradient in the heads' outputs.
        pattern: the layer's pattern; its budgets and weights do not matter.
        scaling: factor on query . key.
    """
    config, num_rows, num_kv_heads = pattern.config, key.shape[1], len(key)
    group = len(rows) // num_kv_heads
    blocks = sampled_blocks(config, num_rows)
    shape = len(rows), len(BUDGETS), len(MIN_WEIGHTS)
    loss, read = torch.zeros((2, *shape), dtype=torch.float32)
    sampled = sum(stop - start for start, stop in blocks)
    root = sensitivity_root(sensitivity)
    bucket = pattern.bucket_hash.assign(key)
    static = static_positions(config, num_rows, key.device, marked=pattern.marked)
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        index = BucketIndex(key[kv_head], bucket[kv_head], static, blocks[0][0], 0, pattern)
        done = 0
        for start, stop in blocks:
            query = rows[heads, done : done + stop - start] * scaling
            done += stop - start
            routed, count = index.rows(start, stop).select(query.sum(0), BUDGETS[-1])
            position = torch.arange(start, stop)
            error, num_read = _errors(
                query, key[kv_head], value[kv_head], position, static, routed.long(), count, pattern
            )
            loss[heads] += (error.flatten(2, 3) @ root[heads]).square_().sum((0, 3)).view_as(loss[heads]) / 2
            read[heads] += num_read.sum(0)
    sparse_rows = max(num_rows - config.dense_below, 0)
    scale = 0.0 if pattern.dense_rows() is None else sparse_rows / sampled
    return Costs(
        loss.double() * scale,
        read.double() * scale,
        torch.tensor(
            fixed_pairs(config, pattern.layer_idx, num_rows, pattern.sliding_window, pattern.marked),
            dtype=torch.float64,
        ),
        torch.tensor(admissible_pairs(torch.arange(num_rows), pattern.sliding_window), dtype=torch.float64),
        sparse_rows,
        num_rows,
        group,
    )


def sensitivity_root(sensitivity: Tensor) -> Tensor:
    """R with R R^T = G for each head's G [num_heads, D, D], float32: an error d costs |d R|^2 / 2."""
    eigenvalues, eigenvectors = torch.linalg.eigh(sensitivity.double())
    return (eigenvectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(1)).float()


def _errors(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    static: Tensor,
    routed: Tensor,
    count: Tensor,
    pattern: LayerPattern,
) -> tuple[Tensor, Tensor]:
    """Error of the output under every choice, for rows [group, R, head_dim] that share a KV head.

    The smallest weights are compared with the dense attention's weights, which a row's own can only exceed.

    Returns:
        errors [R, group, len(BUDGETS), len(MIN_WEIGHTS), head_dim], and keys read through the buckets [R, group,
        len(BUDGETS), len(MIN_WEIGHTS)].
    """
    column = torch.arange(len(key))
    admissible = pattern.admissible(position[:, None] - column)
    weights = (rows @ key.T).masked_fill(~admissible, -torch.inf).softmax(-1)  # [group, R, N]
    local = column > position[:, None] - pattern.config.window_size
    local[:, static] = True
    own = row_keys(pattern, position, static, pattern.window(len(key)), 0)
    local.scatter_(1, own.where(own >= 0, position[:, None]), True)
    local &= admissible
    taken = weights.transpose(0, 1).gather(2, routed.unsqueeze(1).expand(-1, len(rows), -1))  # [R, group, keys]
    live = (torch.arange(routed.shape[1]) < count[:, None]) & ~local.gather(1, routed)  # but for a row's own keys
    taken = taken.masked_fill_(~live.unsqueeze(1), -1).unsqueeze(2)  # less than any smallest weight
    least = torch.tensor(MIN_WEIGHTS, dtype=weights.dtype)[:, None]
    local_weights = weights * local
    output = (local_weights @ value).transpose(0, 1).unsqueeze(2)  # grows by the keys of one budget after the other
    mass = local_weights.sum(-1).T.unsqueeze(2)
    tiny = torch.finfo(mass.dtype).tiny  # the dense weights of all that is read may have underflown
    number = torch.zeros((), dtype=weights.dtype)
    outputs, numbers = [], []
    for start, stop in zip((0, *BUDGETS), BUDGETS, strict=False):
        part = taken[..., start:stop]
        kept = (part >= least).to(part.dtype)  # [R, group, weights, keys]
        number = number + kept.sum(-1)
        kept *= part
        mass = mass + kept.sum(-1)
        index = routed[:, start:stop]
        values = value.index_select(0, index.flatten()).unflatten(0, index.shape)  # [R, keys, head_dim]
        output = output + (kept.flatten(1, 2) @ values).unflatten(1, kept.shape[1:3])
        outputs.append(output / mass.clamp(min=tiny).unsqueeze(-1))
        numbers.append(number)
    exact = (weights @ value).transpose(0, 1)[:, :, None, None]
    return torch.stack(outputs, 2) - exact, torch.stack(numbers, 2)


def allocate(costs: Costs, density: float, key_budget: int, fit_min_weight: bool = True) -> Allocation:
    """The choice with the smallest predicted loss under two limits, by Lagrange multipliers.

    Args:
        costs: of all layers.
        density: largest share of the admissible pairs that may be read.
        key_budget: largest mean, over layers and KV heads, of the keys that are found for a row.
        fit_min_weight: False: every key that is found is read.

    Raises:
        ValueError: if more than `density` is read even without any routed key.
    """
    if costs.least_density > density:
        raise ValueError(
            f"a density of {density:g} cannot be reached: {FIXED} alone take {costs.least_density:.4f}; make "
            "window_size or dense_below smaller"
        )

    num_weights = len(MIN_WEIGHTS) if fit_min_weight else 1

    def under_budget(read_price: float) -> Allocation:
        """The choice at a price per read pair, with found keys as expensive as their limit makes them."""
        best = (costs.loss.numpy() + read_price * costs.read.numpy())[..., :num_weights].min(-1)  # [L, H, B]
        best = best.reshape(len(best), -1, costs.group, len(BUDGETS)).sum(2)
        whole = read_price * costs.loss.shape[1] * (costs.admissible - costs.fixed).numpy()

        def budgets(found_price: float) -> tuple[Array, Array]:
            """Each KV head's budget, as an index [L, K], and which layers are cheaper dense [L]."""
            of_budget = best + found_price * costs.rows * np.array(BUDGETS)
            return of_budget.argmin(-1), whole < of_budget.min(-1).sum(1)

        budget, dense = _cheapest_fit(budgets, lambda choice: _mean_budget(costs, *choice) <= key_budget)
        loss, read = _at_choice(costs, budget)
        return _allocation(costs, budget, (loss + read_price * read)[..., :num_weights].argmin(-1), dense)

    return _cheapest_fit(under_budget, lambda choice: choice.density <= density)


def _cheapest_fit(choose: Callable[[float], Choice], fits: Callable[[Choice], bool]) -> Choice:
    """The choice at the lowest price, in nats, at which it fits."""
    choice = choose(0.0)
    if fits(choice):
        return choice
    low, high = _PRICES
    best = choose(high)
    for _ in range(_STEPS):
        price = (low * high) ** 0.5
        choice = choose(price)
        if fits(choice):
            high, best = price, choice
        else:
            low = price
    return best


def allocation_of(costs: Costs, config: SparseAttentionConfig) -> Allocation:
    """What the choice that a configuration holds already comes to.

    A budget or smallest weight that is not among BUDGETS or MIN_WEIGHTS counts as the nearest one that is.

    Args:
        costs: of all layers, measured with any hash.
        config: of the same model; its budgets, smallest weights and dense layers are looked at.
    """
    num_layers, num_heads = costs.loss.shape[:2]
    num_kv_heads = num_heads // costs.group
    has_choice = (costs.admissible > costs.fixed).numpy()
    dense = has_choice & np.isin(np.arange(num_layers), config.dense_layers)
    budget = np.zeros((num_layers, num_kv_heads), np.int64)
    weight = np.zeros((num_layers, num_heads), np.int64)
    for layer in np.flatnonzero(has_choice & ~dense).tolist():
        budget[layer] = _nearest(BUDGETS, config.key_budgets(layer, num_kv_heads))
        weight[layer] = _nearest(MIN_WEIGHTS, config.min_weights(layer, num_heads))
    return _allocation(costs, budget, weight, dense)


def _nearest(measured: Sequence[float], values: Sequence[float]) -> Array:
    """For each value the index of the measured one that is nearest."""
    return np.abs(np.subtract.outer(values, measured)).argmin(-1)


def _mean_budget(costs: Costs, budget: Array, dense: Array) -> float:
    """Mean of the budgets [L, K], given by index, over the KV heads of layers that count; 0 in dense layers [L]."""
    return float((np.array(BUDGETS)[budget] * ~dense[:, None])[(costs.admissible > 0).numpy()].mean())


def _at_choice(costs: Costs, budget: Array, weight: Array | slice = slice(None)) -> tuple[Array, Array]:
    """Loss and read pairs [L, H] of each head at its KV head's budget [L, K] and smallest weight [L, H], by index.

    Without weights, at each of them: [L, H, len(MIN_WEIGHTS)].
    """
    num_layers, num_heads = costs.loss.shape[:2]
    place = np.arange(num_layers)[:, None], np.arange(num_heads), budget.repeat(costs.group, 1), weight
    return costs.loss.numpy()[place], costs.read.numpy()[place]


def _allocation(costs: Costs, budget: Array, weight: Array, dense: Array) -> Allocation:
    """What a choice comes to.

    Args:
        costs: of all layers.
        budget: [L, K] int64, index of each KV head's budget.
        weight: [L, H] int64, index of each query head's smallest weight.
        dense: [L] bool, layers that read everything.
    """
    num_heads = costs.loss.shape[1]
    loss, read = (of_head.sum(1) for of_head in _at_choice(costs, budget, weight))  # [L]
    admissible, fixed = costs.admissible.numpy(), costs.fixed.numpy()
    pairs = np.where(dense, num_heads * admissible, num_heads * fixed + read)
    return Allocation(
        key_budget=tuple(tuple(BUDGETS[i] for i in layer) for layer in budget.tolist()),
        min_weight=tuple(tuple(MIN_WEIGHTS[i] for i in layer) for layer in weight.tolist()),
        dense_layers=tuple(np.flatnonzero(dense).tolist()),
        mean_key_budget=_mean_budget(costs, budget, dense),
        density=float(pairs.sum() / (num_heads * admissible.sum())),
        loss=float((loss * ~dense).sum() / costs.tokens),
    )
