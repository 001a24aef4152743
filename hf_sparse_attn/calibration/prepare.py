"""Everything that is checked, read and loaded before a calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_sparse_attn.benchmarking.speed import layer_inputs, measure_dense_below
from hf_sparse_attn.calibration import budget_allocation, calibrate
from hf_sparse_attn.calibration.budget_allocation import (
    FIXED,
    fitting_dense_below,
    fitting_window_size,
    least_density,
)
from hf_sparse_attn.calibration.calibrate import minimum_tokens
from hf_sparse_attn.calibration.place_weights import place_weights
from hf_sparse_attn.calibration.remote_code import name_remote_code, names_remote_code
from hf_sparse_attn.calibration.settings import AUTO, ConversionSettings
from hf_sparse_attn.config import SparseAttentionConfig, sliding_windows, text_config
from hf_sparse_attn.data import load_documents, long_documents
from hf_sparse_attn.errors import ArgumentError, argument
from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint
from hf_sparse_attn.memory import ModelSize
from hf_sparse_attn.output_files import (
    check_space,
)
from hf_sparse_attn.tracing import input_device

if TYPE_CHECKING:
    from datasets import Dataset

# Most of a document that dense_below is measured on: near the length that is looked for, which is far longer on a GPU.
_MEASURED_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class Ready:
    """What a calibration needs.

    Args:
        model: loaded.
        tokenizer: its own.
        documents, held_out: dicts with "name" and "input_ids"; the former calibrate, the latter evaluate.
        rows: token ids of the former.
        base: what is not fitted.
        old: in a refit, the model's own configuration.
        fingerprint: of all that a calibration depends on.
    """

    model: Any
    tokenizer: Any
    documents: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    rows: list[torch.Tensor]
    base: SparseAttentionConfig
    old: SparseAttentionConfig | None
    fingerprint: str


def prepare(
    model: str, settings: ConversionSettings, output: Path | None, folder: Path | None, tell: Callable[[str], None]
) -> Ready:
    """Check everything and load the model; offloaded weights that the checkpoint's files do not hold as they are used
    go to `folder`."""
    device, dtype = parse_device(settings.device), parse_dtype(settings.dtype)
    with argument("calibration_dataset"):
        texts = [load_documents(dataset, "train") for dataset in settings.datasets]
    path, config, tokenizer, own = read_checkpoint(model)
    old = _converted(model, own) if settings.refit else None
    base = settings.base_config(old)
    windows = sliding_windows(config)
    base = _fitted_to_density(base, windows, settings, tell)
    _check_context_length(settings.context_length, base)
    documents = _calibration_documents(settings, texts, tokenizer)
    _check_density(settings, base, windows)
    held_out = _evaluation_documents(settings, documents, tokenizer)
    with argument("model", model):
        size = ModelSize.of(config, dtype)
        placed = place_weights(size, base, settings.context_length, device, folder, tell)
    loaded = load_model(model, path, device=device, num_tokens=settings.context_length, dtype=dtype, **placed)
    if settings.remote_code or names_remote_code(loaded.config):
        name_remote_code(loaded)
    if output is not None:
        with argument("model", model):
            loaded.generation_config.validate(strict=True)  # one that is not valid cannot be saved
        with argument("output"):
            check_space(output, loaded.get_memory_footprint())
    if settings.dense_below == AUTO:
        base = _with_measured_dense_below(loaded, documents[0]["input_ids"], base, settings, tell)
    rows = [torch.tensor(document["input_ids"]) for document in documents]
    fingerprint = _fingerprint(path, config, settings, base, rows)
    return Ready(loaded, tokenizer, documents, held_out, rows, base, old, fingerprint)


def _converted(model: str, own: dict[str, Any]) -> SparseAttentionConfig:
    """A converted model's own configuration."""
    config = SparseAttentionConfig.from_dict(own)
    if config.hash != "calibrated":
        told = "it was not converted, so that there is nothing to refit: its hash is not calibrated; leave out {refit}"
        raise ArgumentError("model", told, model, others=("refit",))
    return config


def _fitted_to_density(
    base: SparseAttentionConfig,
    windows: Mapping[int, int | None],
    settings: ConversionSettings,
    tell: Callable[[str], None],
) -> SparseAttentionConfig:
    """With the window and the dense rows that leave most of the density to keys which rows choose."""
    density, num_tokens = settings.density, settings.context_length
    of_it = f"that would take too much of density {density:g} at {num_tokens} tokens"
    if settings.follows_from_density("window_size"):
        fitting = fitting_window_size(base, num_tokens, density)
        if fitting != base.window_size:
            tell(f"rows have a window of {fitting} keys, not of {base.window_size}: {of_it}")
        base = base.replace(window_size=fitting)
    if settings.follows_from_density("dense_below"):
        fitting = fitting_dense_below(base, windows, num_tokens, density)
        if fitting != base.dense_below:
            tell(f"rows at positions under {fitting} read everything, not under {base.dense_below}: {of_it}")
        base = base.replace(dense_below=fitting)
    return base


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
    """The configuration with `measure_dense_below` of what the middle layer gets, on its device and in its dtype."""
    layer, device = text_config(model.config).num_hidden_layers // 2, input_device(model)
    num_tokens = _MEASURED_TOKENS.get(device.type, _MEASURED_TOKENS["cpu"])
    query, key, value = layer_inputs(model, torch.tensor([input_ids[:num_tokens]], device=device), layer)
    inputs = query.to(model.dtype), key.to(model.dtype), value.to(model.dtype)
    measured = measure_dense_below(base.replace(key_budget=settings.most_candidates), inputs, layer)
    tell(f"sparse attention starts to win at {measured} tokens on {device}, in {model.dtype}")
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
