"""What a refit moves: the hash and the choice that a converted model had, against those of its present weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.calibration.budget_allocation import KEY_BUDGET, Allocation, Costs, allocation_of, by_head
from hf_sparse_attn.calibration.calibrate import Calibration, calibrate
from hf_sparse_attn.config import SparseAttentionConfig

# Fields that no conversion is given, but for a min_weight of 0, which stays.
FITTED = ("key_budget", "min_weight", "hash", "calibrated_hash")


@dataclass(frozen=True)
class MovedLayer:
    """What a refit moved in one layer.

    Args:
        layer: its index.
        old_loss, new_loss: predicted loss in nats per token, summed over the layer's heads; 0 where it is dense.
        was_dense, is_dense: whether all of its rows read everything.
        num_changed: query heads whose smallest weight, or whose KV head's budget, is another one.
        num_heads: all of its query heads.
    """

    layer: int
    old_loss: float
    new_loss: float
    was_dense: bool
    is_dense: bool
    num_changed: int
    num_heads: int

    @property
    def change(self) -> str:
        """What changed, in a few words."""
        if self.was_dense != self.is_dense:
            return "became dense" if self.is_dense else "became sparse"
        return "stays dense" if self.is_dense else f"{self.num_changed} of {self.num_heads} heads"


@dataclass(frozen=True)
class Refit:
    """The old hash and choice against the new ones, predicted with the same weights on the same documents.

    The fields that are not fitted are in both cases those of the refit. The new hash and choice are fitted to these
    documents, so that what they gain here is a little more than elsewhere.

    Args:
        old: the old choice with the old hash.
        rehashed: the old choice with the new hash: against `old` it tells how well the old hash still finds.
        new: the new choice with the new hash.
        layers: those with attention, but for local ones.
    """

    old: Allocation
    rehashed: Allocation
    new: Allocation
    layers: tuple[MovedLayer, ...]

    @property
    def steps(self) -> list[tuple[str, Allocation]]:
        """From the old to the new, by name."""
        names = "old hash, old choice", "new hash, old choice", "new hash, new choice"
        return list(zip(names, (self.old, self.rehashed, self.new), strict=True))


def refit(
    model: PreTrainedModel, documents: Sequence[Tensor], old: SparseAttentionConfig
) -> tuple[SparseAttentionConfig, Refit]:
    """Fit hash and choice anew, at the density that the old choice has with the present weights.

    Args:
        model: with attn_implementation="sparse"; left as it was.
        documents: [N] int64 token ids each.
        old: the configuration with the calibrated hash that the model has had.

    Returns:
        The new configuration, and what moved.

    Raises:
        ValueError: if the documents are too short to have routed keys.
    """
    calibration = calibrate(model, documents, not_fitted(old), old=old)
    new, choice = calibration.choose(*aims_of(calibration, old))
    return new, compare(calibration, old, new, choice)


def not_fitted(old: SparseAttentionConfig) -> SparseAttentionConfig:
    """The fields that a refit keeps; `dense_layers` may have been fitted, and is empty."""
    kept = {name: value for name, value in old.to_dict().items() if name not in (*FITTED, "dense_layers")}
    if not np.any(old.min_weight):
        kept["min_weight"] = 0.0
    return SparseAttentionConfig.from_dict(kept)


def aims_of(calibration: Calibration, old: SparseAttentionConfig) -> tuple[float, int]:
    """The density of the old choice with the present weights, or the least one that can be; and the largest mean of a
    row's candidates, at least that of the old choice."""
    assert calibration.old_costs is not None
    before = allocation_of(calibration.old_costs, old)
    return max(before.density, calibration.costs.least_density), max(KEY_BUDGET, math.ceil(before.mean_key_budget))


def compare(
    calibration: Calibration, old: SparseAttentionConfig, new: SparseAttentionConfig, choice: Allocation
) -> Refit:
    """Tell what a refit moved.

    Args:
        calibration: of the refit, with `old_costs`.
        old: the configuration that the model has had.
        new: the configuration that was fitted.
        choice: what it holds.
    """
    assert calibration.old_costs is not None
    before = allocation_of(calibration.old_costs, old)
    old_loss, new_loss = _by_layer(calibration.old_costs, before), _by_layer(calibration.costs, choice)
    budget, weight = (
        np.not_equal(getattr(before, name), getattr(choice, name)) for name in ("key_budget", "min_weight")
    )
    changed = budget.repeat(calibration.costs.group, 1) | weight  # [L, H]
    layers = tuple(
        MovedLayer(
            layer,
            old_loss[layer],
            new_loss[layer],
            layer in old.dense_layers,
            layer in new.dense_layers,
            int(changed[layer].sum()),
            changed.shape[1],
        )
        for layer in np.flatnonzero((calibration.costs.admissible > 0).numpy()).tolist()
    )
    return Refit(before, allocation_of(calibration.costs, old), choice, layers)


def _by_layer(costs: Costs, choice: Allocation) -> list[float]:
    """Predicted loss of each layer in nats per token."""
    losses: list[float] = by_head(costs, choice)[1].sum(1).tolist()
    return losses
