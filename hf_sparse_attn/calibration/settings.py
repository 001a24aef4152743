"""How a checkpoint is converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_sparse_attn.calibration.budget_allocation import (
    KEY_BUDGET,
)
from hf_sparse_attn.calibration.refit import FITTED, not_fitted
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.errors import ArgumentError, argument, check_integer, check_positive
from hf_sparse_attn.loading import parse_dtype
from hf_sparse_attn.offloading import check_accelerate
from hf_sparse_attn.pattern_fields import check_causal

TARGET_DENSITY = 0.19
AUTO = "auto"  # dense_below is measured


@dataclass(frozen=True)
class ConversionSettings:
    """How a checkpoint is converted.

    Args:
        calibration_dataset: a Hub id[:config[:split[:column]]], a file, a directory, or "demo"; or several of these,
            which give documents in turns.
        num_calibration_documents: at least 1 of each dataset.
        context_length: tokens read of each document; shorter documents are left out.
        target_density: share of the admissible (row, key) pairs that may be read, greater than 0 and at most 1; None
            is TARGET_DENSITY, unless `max_loss` is given; in a refit, what the model's old choice reads.
        max_loss: in place of `target_density`: as little is read as keeps the loss of the last calibration document
            from rising by more, in nats per token; greater than 0.
        key_budget: largest mean, over layers and KV heads, of the candidates of a row; at least 1. None is KEY_BUDGET;
            in a refit, the mean of the model's old choice if that is larger.
        sparse_attention: fields of `SparseAttentionConfig`, other than those that the conversion fits. A `min_weight`
            of 0 stays: all keys that are found are read, which costs a GPU less than to leave light ones out. A
            `window_size` that is not given is the default one, or smaller if it would take over a sixth of
            `target_density`.
        dense_below: rows at earlier positions read everything; "auto" measures from which length on sparse attention is
            faster on this machine. None takes it from `sparse_attention`; where that does not say it, it is the default
            one, or smaller if such rows would take over a sixth of `target_density`.
        num_evaluation_documents: for the model card's figures, of the datasets in turns; 0 leaves them out.
        device: such as "cpu" or "cuda"; None takes the GPU if there is one.
        dtype: what is computed in and written; "auto" for the checkpoint's own.
        offload: weights for which the device has no room stay in the CPU's memory, and what has no room there on the
            disk; needs accelerate.
        refit: for a converted model whose weights were trained since: fields that are not given are the model's own,
            but for those that are fitted. `dense_layers` counts as fitted, as nobody can tell those that were chosen
            from those that were asked for: it is empty unless `sparse_attention` has it.
        remote_code: also write a file by which `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`
            loads the model with sparse attention, or tells what to install. A model that has it keeps it.

    Raises:
        ArgumentError: a value is out of its range; the message names the field.
    """

    calibration_dataset: str | Sequence[str] = "demo"
    num_calibration_documents: int = 3
    context_length: int = 8192
    target_density: float | None = None
    max_loss: float | None = None
    key_budget: int | None = None
    sparse_attention: Mapping[str, Any] = field(default_factory=dict)
    dense_below: int | str | None = None
    num_evaluation_documents: int = 2
    device: str | None = None
    dtype: str = "auto"
    offload: bool = False
    refit: bool = False
    remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("num_calibration_documents", 1),
            ("context_length", 1),
            ("num_evaluation_documents", 0),
        ):
            check_integer(name, getattr(self, name), least)
        if self.key_budget is not None:
            check_integer("key_budget", self.key_budget, 1)
        if self.target_density is not None:
            check_positive("target_density", self.target_density, most=1)
        if self.max_loss is not None:
            check_positive("max_loss", self.max_loss)
            if self.target_density is not None:
                raise ArgumentError("max_loss", "not allowed with {target_density}", others=("target_density",))
        if self.dense_below not in (None, AUTO):
            check_integer("dense_below", self.dense_below, 0)
        for name in FITTED:
            unfitted = name == "min_weight" and self.sparse_attention.get(name) == 0
            if name in self.sparse_attention and not unfitted:
                others = ("target_density", "max_loss", "key_budget")
                told = f"{name} is what the conversion fits; use {', '.join(f'{{{other}}}' for other in others)}"
                told += ", or a min_weight of 0" if name == "min_weight" else ""
                raise ArgumentError("sparse_attention", told, others=others)
        with argument("sparse_attention"):
            self.base_config()
        parse_dtype(self.dtype)
        if self.offload:
            check_accelerate()

        num_datasets = len(self.datasets)
        if not num_datasets:
            raise ArgumentError("calibration_dataset", "names no dataset")
        if self.num_calibration_documents < num_datasets:
            told = f"must be at least {num_datasets}, one of each dataset, got {self.num_calibration_documents}"
            raise ArgumentError("num_calibration_documents", told)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The calibration datasets."""
        given = self.calibration_dataset
        return (given,) if isinstance(given, str) else tuple(given)

    @property
    def density(self) -> float:
        """The share of pairs to aim at where neither `max_loss` nor an old choice says it."""
        return TARGET_DENSITY if self.target_density is None else self.target_density

    @property
    def most_candidates(self) -> int:
        """The largest mean of a row's candidates where no old choice says it."""
        return KEY_BUDGET if self.key_budget is None else self.key_budget

    @property
    def keeps_density(self) -> bool:
        """Whether the old choice says what to aim at."""
        return self.refit and self.target_density is None and self.max_loss is None

    def follows_from_density(self, name: str) -> bool:
        """Whether `name`, which is "dense_below" or "window_size", is not given."""
        given = {*self.sparse_attention} | ({"dense_below"} if self.dense_below is not None else set())
        return not (given & {name, "preset"} or self.refit or self.max_loss is not None)

    def base_config(self, old: SparseAttentionConfig | None = None) -> SparseAttentionConfig:
        """What is not fitted; `dense_below="auto"` is still to be measured.

        Args:
            old: in a refit, the model's own configuration, which says what is not given.
        """
        own = SparseAttentionConfig() if old is None else not_fitted(old)
        base = own.with_fields(self.sparse_attention)
        check_causal(base)
        return base.replace(dense_below=self.dense_below) if isinstance(self.dense_below, int) else base
