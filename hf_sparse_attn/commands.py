"""The commands as functions: what `hf-sparse-attn` does, from Python, with the same checks and the same results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def load_model(model: str, sparse_attention: dict[str, Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A causal language model with `attn_implementation="sparse"`, converted or not.

    Args:
        model: a Hub id, a directory, or "demo".
        sparse_attention: single fields of `SparseAttentionConfig` in place of the model's own.
        kwargs: go to `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ValueError: for a field that `SparseAttentionConfig` refuses, a damaged checkpoint, or a family of models whose
            attention does not go through Transformers' registry.
        OSError: there is no such model.
        ImportError: "demo" was asked for and its packages are not installed.
    """
    from hf_sparse_attn.cli.loading import load_sparse_model, resolve_model

    return load_sparse_model(resolve_model(model), sparse_attention, **kwargs)


def convert(model: str, output: str | Path, **options: Any) -> dict[str, Any]:
    """Convert a dense checkpoint: fit the hash and what every head reads on sample documents.

    The directory that is written loads with stock `from_pretrained(output, attn_implementation="sparse")`, and as an
    ordinary dense model without this package.

    Args:
        model: a Hub id, a directory, or "demo".
        output: a directory, new or empty.
        options: those of `hf-sparse-attn convert`, with underscores: calibration_dataset, num_calibration_documents,
            context_length, target_density or max_loss, key_budget, sparse_attention (a dict), dense_below,
            num_evaluation_documents, device.

    Returns:
        "output" (a path), "sparse_attention" (the fitted fields), "density" (expected, attended over admissible pairs),
        "predicted_loss" (rise in nats a token; the real one is higher), and "evaluation": what
        `evaluate_perplexity` returns on documents that calibrated nothing, or None.

    Raises:
        ValueError: for an option, a model or a dataset that cannot be, before any long work.
        RuntimeError: what was computed cannot be written; the message says where it is kept.
    """
    from hf_sparse_attn.cli.convert import convert, parse_arguments

    directory, config, _, choice, result = convert(parse_arguments(_words(model=model, output=output, **options)))
    return {
        "output": directory,
        "sparse_attention": config.to_dict(),
        "density": choice.density,
        "predicted_loss": choice.loss,
        "evaluation": result,
    }


def evaluate_perplexity(
    model: str, dataset: str = "demo", context_length: int = 8192, **options: Any
) -> dict[str, Any]:
    """Perplexity of the same weights over the same tokens, dense (SDPA) and sparse.

    Args:
        model: a Hub id, a directory, or "demo".
        dataset: a Hub id[:config[:split[:column]]], a file, a directory, or "demo".
        context_length: tokens read of each document; shorter documents are left out.
        options: the others of `hf-sparse-attn eval-perplexity`, with underscores: split, max_documents,
            sparse_attention (a dict), device, dtype.

    Returns:
        See `hf_sparse_attn.evaluation.perplexity.compare_perplexity`; for a loaded model and tokens at hand, call that.

    Raises:
        ValueError: for an option, a model or a dataset that cannot be, before any long work.
    """
    from hf_sparse_attn.cli.eval_perplexity import evaluate, parse_arguments

    given = _words(model=model, dataset=dataset, context_length=context_length, **options)
    return evaluate(parse_arguments(given))


def plot_pattern(model: str, output: str | Path, **options: Any) -> None:
    """Draw who reads what in a model.

    Args:
        model: a Hub id, a directory, or "demo".
        output: the picture to write.
        options: those of `hf-sparse-attn plot`, with underscores: dataset, split, context_length, layers, heads, bins,
            sparse_attention (a dict), device.

    Raises:
        ValueError: for an option, a model or a dataset that cannot be, before any long work.
    """
    from hf_sparse_attn.cli.plot_pattern import parse_arguments, plot

    plot(parse_arguments(_words(model=model, output=output, **options)))


def _words(**options: Any) -> list[str]:
    """Options as the words of a command line; None leaves one out."""
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        many = isinstance(value, Sequence) and not isinstance(value, str)
        values = value if many else [json.dumps(value) if isinstance(value, Mapping) else value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words
