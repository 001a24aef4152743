"""Convert a dense checkpoint: fit the hash and what every head reads, and write a directory that loads anywhere."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_sparse_attn import visualization
from hf_sparse_attn.benchmarking.speed import layer_inputs, measure_dense_below
from hf_sparse_attn.calibration import budget_allocation, calibrate, model_card
from hf_sparse_attn.calibration.budget_allocation import (
    FIXED,
    KEY_BUDGET,
    Allocation,
    by_head,
    fitting_dense_below,
    least_density,
)
from hf_sparse_attn.calibration.calibrate import Calibration, choose_by_loss, minimum_tokens
from hf_sparse_attn.calibration.kept_results import KeptResults, kept_results
from hf_sparse_attn.calibration.place_weights import place_weights
from hf_sparse_attn.calibration.refit import FITTED, Refit, aims_of, compare, not_fitted
from hf_sparse_attn.config import SparseAttentionConfig, sliding_windows, text_config
from hf_sparse_attn.data import load_documents, long_documents
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.errors import ArgumentError, RunError, argument, check_integer, check_positive, one_line
from hf_sparse_attn.evaluation import perplexity
from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint
from hf_sparse_attn.memory import ModelSize
from hf_sparse_attn.offloading import check_accelerate, offload_folder, save_pretrained
from hf_sparse_attn.output_files import (
    check_output_directory,
    check_space,
    kept_on_failure,
    put_in_place,
    removed_on_failure,
    unfinished_directory,
)
from hf_sparse_attn.pattern_fields import check_causal
from hf_sparse_attn.progress import Progress, counted, silent
from hf_sparse_attn.tracing import input_device

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

TARGET_DENSITY = 0.19
LEAST_LOSS = 1e-6  # nats per token: less is noise
AUTO = "auto"  # dense_below is measured
_MEASURED_TOKENS = 4096  # most of a document that dense_below is measured on


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
        sparse_attention: fields of `SparseAttentionConfig`, other than those that the conversion fits.
        dense_below: rows at earlier positions read everything; "auto" measures from which length on sparse attention is
            faster on this machine. None takes it from `sparse_attention`; where that does not say it, it is the default
            one, or smaller if such rows would take over a third of `target_density`.
        num_evaluation_documents: for the model card's figures, of the datasets in turns; 0 leaves them out.
        device: such as "cpu" or "cuda"; None takes the GPU if there is one.
        dtype: what is computed in and written; "auto" for the checkpoint's own.
        offload: weights for which the device has no room stay in the CPU's memory, and what has no room there on the
            disk; needs accelerate.
        refit: for a converted model whose weights were trained since: fields that are not given are the model's own,
            but for those that are fitted. `dense_layers` counts as fitted, as nobody can tell those that were chosen
            from those that were asked for: it is empty unless `sparse_attention` has it.

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
            if name in self.sparse_attention:
                others = ("target_density", "max_loss", "key_budget")
                told = f"{name} is what the conversion fits; use {', '.join(f'{{{other}}}' for other in others)}"
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

    @property
    def fits_dense_below(self) -> bool:
        """Whether `dense_below` follows from the density."""
        given = self.refit or self.dense_below is not None or "dense_below" in self.sparse_attention
        return not given and self.max_loss is None

    def base_config(self, old: SparseAttentionConfig | None = None) -> SparseAttentionConfig:
        """What is not fitted; `dense_below="auto"` is still to be measured.

        Args:
            old: in a refit, the model's own configuration, which says what is not given.
        """
        own = SparseAttentionConfig() if old is None else not_fitted(old)
        base = own.with_fields(self.sparse_attention)
        check_causal(base)
        return base.replace(dense_below=self.dense_below) if isinstance(self.dense_below, int) else base


@dataclass(frozen=True)
class Conversion:
    """What a conversion gave.

    Args:
        output: the directory that was written.
        config: the fitted configuration.
        trade: the choices at other densities.
        choice: the choice that `config` holds.
        evaluation: what `compare_perplexity` returned for documents that calibrated nothing, or None.
        local_layers: those whose own small window is read whole.
        refit: what a refit moved; None for a first conversion.
    """

    output: Path
    config: SparseAttentionConfig
    trade: list[Allocation]
    choice: Allocation
    evaluation: dict[str, Any] | None
    local_layers: tuple[int, ...] = ()
    refit: Refit | None = None

    @property
    def loss_factor(self) -> float | None:
        """How many times the predicted rise of the loss was measured, where both say something."""
        measured = self.evaluation["delta_nll"]["mean"] if self.evaluation else 0.0
        return measured / self.choice.loss if min(measured, self.choice.loss) > LEAST_LOSS else None


def convert(
    model: str,
    output: str | Path,
    settings: ConversionSettings | None = None,
    *,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda line: None,
    kept_as: str = "what was fitted, for sparse_attention,",
) -> Conversion:
    """Convert a checkpoint; the weights stay as they are, unless `dtype` rounds them.

    The directory appears whole or not at all. If it cannot be finished, what was measured and fitted stays beside it,
    where notes of the error tell; the same conversion goes on from there, also with another aim.

    Args:
        model: a Hub id, a directory, or "demo".
        output: a directory, new or empty.
        settings: None for the defaults.
        progress: told how far the phases "calibrating" and "evaluating" are.
        tell: called with lines about what was measured on the way.
        kept_as: how the note calls what was fitted.

    Raises:
        ArgumentError: for an argument or a setting that cannot be, before any long work.
        RunError: what was computed cannot be written, or no hash can be fitted to what the model computes.
    """
    import matplotlib  # noqa: F401  whether it is there must be known before the work

    settings = settings or ConversionSettings()
    with argument("output"):
        output = check_output_directory(output)
    with offload_folder(output) if settings.offload else nullcontext() as folder:
        return _convert(model, output, settings, folder, progress, tell, kept_as)


def _convert(
    model: str,
    output: Path,
    settings: ConversionSettings,
    folder: Path | None,
    progress: Progress,
    tell: Callable[[str], None],
    kept_as: str,
) -> Conversion:
    """As `convert`; offloaded weights that the checkpoint's files do not hold as they are used go to `folder`."""
    device, dtype = parse_device(settings.device), parse_dtype(settings.dtype)
    with argument("calibration_dataset"):
        texts = [load_documents(dataset, "train") for dataset in settings.datasets]
    path, config, tokenizer, own = read_checkpoint(model)
    old = _converted(model, own) if settings.refit else None
    base = settings.base_config(old)
    windows = sliding_windows(config)
    if settings.fits_dense_below:
        base = _with_fitting_dense_below(base, windows, settings, tell)
    _check_context_length(settings.context_length, base)
    documents = _calibration_documents(settings, texts, tokenizer)
    _check_density(settings, base, windows)
    held_out = _evaluation_documents(settings, documents, tokenizer)
    with argument("model", model):
        size = ModelSize.of(config, dtype)
        placed = place_weights(size, base, settings.context_length, device, folder, tell)
    loaded = load_model(model, path, device=device, num_tokens=settings.context_length, dtype=dtype, **placed)
    with argument("model", model):
        loaded.generation_config.validate(strict=True)  # one that is not valid cannot be saved
    with argument("output"):
        check_space(output, loaded.get_memory_footprint())
    if settings.dense_below == AUTO:
        base = _with_measured_dense_below(loaded, documents[0]["input_ids"], base, settings, tell)
    rows = [torch.tensor(document["input_ids"]) for document in documents]
    measured = output.with_name(f".{output.name}.calibration-{_fingerprint(path, config, settings, base, rows)}")
    fitted_file = output.with_name(f"{output.name}-{os.getpid()}.sparse_attention.json")
    unfinished = unfinished_directory(output)
    with kept_results(measured, calibrate.KEPT) as kept, kept_on_failure(fitted_file, kept_as) as keep:
        calibration = _calibrate(loaded, rows, base, progress, kept, old)
        if old is not None:
            settings = _as_before(settings, calibration, old)
        reachable = max(settings.density, calibration.costs.least_density)
        keep(calibration.choose(reachable, settings.most_candidates)[0].to_dict())
        fitted, choice = _choose(loaded, calibration, rows[-1], settings, tell)
        keep(fitted.to_dict())
        trade = calibration.trade(settings.most_candidates)
        moved = None if old is None else compare(calibration, old, fitted, choice)
        text_config(loaded.config).sparse_attention = fitted.to_dict()
        evaluation = _evaluate(loaded, held_out, tokenizer, progress)
        conversion = Conversion(output, fitted, trade, choice, evaluation, calibration.local_layers, moved)
        with removed_on_failure(unfinished):
            save_pretrained(loaded, unfinished)
            tokenizer.save_pretrained(unfinished)
            visualization.plot_trade(trade, choice, unfinished / "trade.png")
            visualization.plot_choice(*by_head(calibration.costs, choice), unfinished / "heads.png")
            model_card.write_model_card(
                unfinished / "README.md",
                source=model,
                conversion=conversion,
                calibration=[document["name"] for document in documents],
                environment=describe_environment(device),
            )
    put_in_place(unfinished, output)
    return conversion


def _converted(model: str, own: dict[str, Any]) -> SparseAttentionConfig:
    """A converted model's own configuration."""
    config = SparseAttentionConfig.from_dict(own)
    if config.hash != "calibrated":
        told = "it was not converted, so that there is nothing to refit: its hash is not calibrated; leave out {refit}"
        raise ArgumentError("model", told, model, others=("refit",))
    return config


def _as_before(
    settings: ConversionSettings, calibration: Calibration, old: SparseAttentionConfig
) -> ConversionSettings:
    """The settings of a refit, with what the old choice takes in place of aims that are not given."""
    density, key_budget = aims_of(calibration, old)
    if settings.key_budget is None:
        settings = replace(settings, key_budget=key_budget)
    return replace(settings, target_density=density) if settings.keeps_density else settings


def _with_fitting_dense_below(
    base: SparseAttentionConfig,
    windows: Mapping[int, int | None],
    settings: ConversionSettings,
    tell: Callable[[str], None],
) -> SparseAttentionConfig:
    fitting = fitting_dense_below(base, windows, settings.context_length, settings.density)
    if fitting == base.dense_below:
        return base
    tell(
        f"rows at positions under {fitting} read everything, not under {base.dense_below}: that would take too much of "
        f"density {settings.density:g} at {settings.context_length} tokens"
    )
    return base.replace(dense_below=fitting)


def _check_context_length(context_length: int, config: SparseAttentionConfig) -> None:
    if context_length < minimum_tokens(config):
        least = minimum_tokens(config)
        raise ArgumentError("context_length", f"must be at least {least}, so that some rows are sparse")


def _check_density(
    settings: ConversionSettings, base: SparseAttentionConfig, windows: Mapping[int, int | None]
) -> None:
    if not windows:  # loading the model shows whether it calls its attention
        return
    with argument("model"):
        least = least_density(base, windows, settings.context_length)
    if settings.max_loss is None and not settings.keeps_density and settings.density < least:
        raise ArgumentError(
            "target_density",
            f"must be at least {least:.4f} at {settings.context_length} tokens: {FIXED} take that; see "
            "{sparse_attention}",
            others=("sparse_attention",),
        )


def _in_turns(num_documents: int, num_datasets: int) -> list[int]:
    """How many documents each dataset gives, the first ones more."""
    return [len(range(i, num_documents, num_datasets)) for i in range(num_datasets)]


def _calibration_documents(settings: ConversionSettings, texts: list[Dataset], tokenizer: Any) -> list[dict[str, Any]]:
    wanted = _in_turns(settings.num_calibration_documents, len(texts))
    with argument("calibration_dataset"):
        found = [
            long_documents(of_dataset, tokenizer, settings.context_length, max_documents=number)
            for of_dataset, number in zip(texts, wanted, strict=True)
        ]
    # One of each dataset after the other: the last document fits no hash and should not be of a kind of its own.
    return [document for turn in zip_longest(*found) for document in turn if document is not None]


def _evaluation_documents(
    settings: ConversionSettings, calibration: list[dict[str, Any]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Documents of the validation split, or later ones of a dataset without splits; none that calibrated anything."""
    used = {document["name"] for document in calibration}
    held_out: list[dict[str, Any]] = []
    for dataset, number in zip(
        settings.datasets, _in_turns(settings.num_evaluation_documents, len(settings.datasets)), strict=True
    ):
        if not number:
            continue
        try:
            texts = load_documents(dataset, "validation")
            found = long_documents(texts, tokenizer, settings.context_length, max_documents=number + len(used))
        except ValueError:
            continue
        held_out += [document for document in found if document["name"] not in used][:number]
    return held_out


def _with_measured_dense_below(
    model: Any,
    input_ids: list[int],
    base: SparseAttentionConfig,
    settings: ConversionSettings,
    tell: Callable[[str], None],
) -> SparseAttentionConfig:
    """The configuration with `measure_dense_below` of what the middle layer gets."""
    layer = text_config(model.config).num_hidden_layers // 2
    ids = torch.tensor([input_ids[:_MEASURED_TOKENS]], device=input_device(model))
    inputs = layer_inputs(model, ids, layer)
    measured = measure_dense_below(base.replace(key_budget=settings.most_candidates), inputs, layer)
    tell(f"sparse attention starts to win at {measured} tokens here")
    config = base.replace(dense_below=measured)
    _check_context_length(settings.context_length, config)
    return config


def _fingerprint(
    path: str, config: Any, settings: ConversionSettings, base: SparseAttentionConfig, rows: list[torch.Tensor]
) -> str:
    """Of all that a calibration depends on: the checkpoint, the documents, what is not fitted, how it is measured."""
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    parts = (
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        config.to_json_string(use_diff=False),
        getattr(config, "_commit_hash", None),
        settings.dtype,
        base.to_dict(),
        [row.tolist() for row in rows],
        settings.refit,
        (calibrate.VERSION, calibrate.GRADIENT_TOKENS, budget_allocation.BUDGETS, budget_allocation.MIN_WEIGHTS),
    )
    return hashlib.sha256(json.dumps([path, *parts]).encode()).hexdigest()[:16]


def _calibrate(
    model: Any,
    rows: list[torch.Tensor],
    base: SparseAttentionConfig,
    progress: Progress,
    kept: KeptResults,
    old: SparseAttentionConfig | None,
) -> Calibration:
    total = calibrate.num_steps(len(rows), refit=old is not None)
    begun = 0

    def begin(step: str) -> None:
        nonlocal begun
        progress("calibrating", begun, total, step)  # the steps before this one are done
        begun += 1

    with argument("calibration_dataset"):
        try:
            calibration = calibrate.calibrate(model, rows, base, begin, kept, old)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise RunError(f"what the model computes on these documents cannot be calibrated on: {error}") from error
    progress("calibrating", total, total, "")
    return calibration


def _choose(
    model: Any,
    calibration: Calibration,
    row: torch.Tensor,
    settings: ConversionSettings,
    tell: Callable[[str], None],
) -> tuple[SparseAttentionConfig, Allocation]:
    if settings.max_loss is None:
        with argument("target_density"):
            return calibration.choose(settings.density, settings.most_candidates)
    with argument("max_loss"):
        return choose_by_loss(model, calibration, row, settings.max_loss, settings.most_candidates, progress=tell)


def _evaluate(model: Any, documents: list[dict[str, Any]], tokenizer: Any, progress: Progress) -> dict[str, Any] | None:
    """The model card's figures, if there are documents for them and the losses are finite."""
    if not documents:
        return None
    try:
        return perplexity.compare_perplexity(
            model, documents, tokenizer=tokenizer, progress=counted(progress, "evaluating")
        )
    except ValueError as error:
        logger.warning("not evaluated: %s", one_line(error))
        return None
