"""Convert a dense checkpoint: fit the hash and what every head reads, and write a directory that loads anywhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn import visualization
from hf_sparse_attn.calibration import calibrate, model_card
from hf_sparse_attn.calibration.budget_allocation import (
    Allocation,
    by_head,
)
from hf_sparse_attn.calibration.calibrate import LEAST_LOSS, Calibration, choose_by_loss
from hf_sparse_attn.calibration.kept_results import KeptResults, kept_results
from hf_sparse_attn.calibration.prepare import prepare
from hf_sparse_attn.calibration.refit import Refit, aims_of, compare
from hf_sparse_attn.calibration.remote_code import names_remote_code, write_remote_code
from hf_sparse_attn.calibration.settings import ConversionSettings
from hf_sparse_attn.config import SparseAttentionConfig, text_config
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.errors import RunError, argument, one_line
from hf_sparse_attn.evaluation import perplexity
from hf_sparse_attn.evaluation.dense_attention import dense_side
from hf_sparse_attn.offloading import offload_folder, save_pretrained
from hf_sparse_attn.output_files import (
    check_output_directory,
    kept_on_failure,
    put_in_place,
    removed_on_failure,
    unfinished_directory,
)
from hf_sparse_attn.progress import Progress, counted, silent
from hf_sparse_attn.tracing import input_device

logger = logging.getLogger(__name__)


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


def fit(
    model: str,
    settings: ConversionSettings,
    calibrations: Path,
    *,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> SparseAttentionConfig:
    """What `convert` fits. Nothing is written but what was measured, which other aims find in `calibrations`.

    Args:
        calibrations: a directory, made where it is missing.
        model, settings, progress, tell: as for `convert`.

    Raises:
        ArgumentError, RunError: as `convert`.
    """
    ready = prepare(model, settings, None, None, tell)
    kept = KeptResults(calibrations / ready.fingerprint, calibrate.KEPT)
    calibration = _calibrate(ready.model, ready.rows, ready.base, progress, kept, ready.old)
    if ready.old is not None:
        settings = _as_before(settings, calibration, ready.old)
    return _choose(ready.model, calibration, ready.rows[-1], settings, tell)[0]


def _convert(
    model: str,
    output: Path,
    settings: ConversionSettings,
    folder: Path | None,
    progress: Progress,
    tell: Callable[[str], None],
    kept_as: str,
) -> Conversion:
    """As `convert`; for `folder` see `prepare`."""
    ready = prepare(model, settings, output, folder, tell)
    loaded, rows, old = ready.model, ready.rows, ready.old
    measured = output.with_name(f".{output.name}.calibration-{ready.fingerprint}")
    fitted_file = output.with_name(f"{output.name}-{os.getpid()}.sparse_attention.json")
    unfinished = unfinished_directory(output)
    with kept_results(measured, calibrate.KEPT) as kept, kept_on_failure(fitted_file, kept_as) as keep:
        calibration = _calibrate(loaded, rows, ready.base, progress, kept, old)
        if old is not None:
            settings = _as_before(settings, calibration, old)
        reachable = max(settings.density, calibration.costs.least_density)
        keep(calibration.choose(reachable, settings.most_candidates)[0].to_dict())
        fitted, choice = _choose(loaded, calibration, rows[-1], settings, tell)
        keep(fitted.to_dict())
        trade = calibration.trade(settings.most_candidates)
        moved = None if old is None else compare(calibration, old, fitted, choice)
        text_config(loaded.config).sparse_attention = fitted.to_dict()
        evaluation = _evaluate(loaded, ready.held_out, ready.tokenizer, progress)
        conversion = Conversion(output, fitted, trade, choice, evaluation, calibration.local_layers, moved)
        with removed_on_failure(unfinished):
            save_pretrained(loaded, unfinished)
            ready.tokenizer.save_pretrained(unfinished)
            write_remote_code(unfinished)
            visualization.plot_trade(trade, choice, unfinished / "trade.png")
            visualization.plot_choice(*by_head(calibration.costs, choice), unfinished / "heads.png")
            model_card.write_model_card(
                unfinished / "README.md",
                source=model,
                conversion=conversion,
                calibration=[document["name"] for document in ready.documents],
                environment=describe_environment(input_device(loaded)),
                remote_code=names_remote_code(loaded.config),
            )
    put_in_place(unfinished, output)
    return conversion


def _as_before(
    settings: ConversionSettings, calibration: Calibration, old: SparseAttentionConfig
) -> ConversionSettings:
    """The settings of a refit, with what the old choice takes in place of aims that are not given."""
    density, key_budget = aims_of(calibration, old)
    if settings.key_budget is None:
        settings = replace(settings, key_budget=key_budget)
    return replace(settings, target_density=density) if settings.keeps_density else settings


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
            model,
            documents,
            tokenizer=tokenizer,
            progress=counted(progress, "evaluating"),
            dense_attention=dense_side(model, documents[0]["input_ids"], fast=True),
        )
    except ValueError as error:
        logger.warning("not evaluated: %s", one_line(error))
        return None
