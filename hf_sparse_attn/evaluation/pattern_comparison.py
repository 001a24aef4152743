"""The field's patterns beside each other: one model, one density, the same tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.evaluation.haystack import Context
from hf_sparse_attn.evaluation.needle import retrieve
from hf_sparse_attn.evaluation.perplexity import DENSE, SPARSE, paired_difference, token_nll
from hf_sparse_attn.integration import configured, record
from hf_sparse_attn.operation import sparse_attention
from hf_sparse_attn.pattern_fields import looks_ahead
from hf_sparse_attn.recording import DensityRecorder
from hf_sparse_attn.statistics import AttentionStatistics
from hf_sparse_attn.tracing import input_device

_LEAST_STRIDE = 64
Fields = Callable[[int], dict[str, Any]]
BLOCK_VOTES = "block-votes"  # no preset: those of minference-like beside a window and leading keys
# Of each pattern, the number that sets its density, as fields, and the least and the most that it may be.
KNOBS: dict[str, tuple[Fields, int, int | None]] = {
    "longformer": (lambda n: {"window_size": n}, 1, None),
    "bigbird": (lambda n: {"num_random_blocks": n}, 0, 200),
    "sparse-transformer": (lambda n: {"stride_width": n, "stride_offset": 128 - n}, 1, 127),
    "sparse-transformer-strided": (lambda n: {"window_size": n + 1, "dilation": n}, _LEAST_STRIDE, None),
    "streaming-llm": (lambda n: {"window_size": n}, 1, None),
    "longlora": (lambda n: {"block_size": n, "by_kv_head": [{}, {"block_offset": n // 2}]}, 2, None),
    "ssa": (lambda n: {"key_budget": n, "min_weight": 0.0, "dense_below": 0}, 0, None),
    "minference-like": (lambda n: {"num_voted_blocks": n}, 0, None),
    BLOCK_VOTES: (lambda n: {"num_voted_blocks": n, "window_size": 256, "num_global_tokens": 16}, 0, None),
}


def pattern_at(name: str, density: float, num_tokens: int, num_kv_heads: int) -> SparseAttentionConfig:
    """A pattern with the number of `KNOBS` that brings its density nearest to another one, from below where it can.

    Args:
        name: a preset, or `BLOCK_VOTES`.
        density: read over admissible pairs.
        num_tokens: of the documents.
        num_kv_heads: KV heads of a layer, which a pattern by head is dealt to.

    Raises:
        ValueError: the layer has fewer KV heads than the preset needs.
    """
    fields, low, most = KNOBS[name]
    high = num_tokens if most is None else most

    def config(number: int) -> SparseAttentionConfig:
        return SparseAttentionConfig.preset("minference-like" if name == BLOCK_VOTES else name, **fields(number))

    while low < high:  # the largest number of at most this density
        middle = (low + high + 1) // 2
        if expected_density(config(middle), num_tokens, num_kv_heads) <= density:
            low = middle
        else:
            high = middle - 1
    return config(low)


@torch.no_grad()
def expected_density(config: SparseAttentionConfig, num_tokens: int, num_kv_heads: int) -> float:
    """Density of one document whose queries and keys are random; data decide it only where `min_weight` is not 0."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, num_kv_heads, num_tokens, 2, generator=generator)
    recorder = DensityRecorder()
    sparse_attention(query, query, query, config=config, recorder=recorder)
    return recorder.density


@torch.no_grad()
def compare_patterns(
    model: PreTrainedModel,
    documents: Sequence[dict[str, Any]],
    contexts: Sequence[Context],
    variants: Mapping[str, SparseAttentionConfig],
    *,
    num_rows: int = 64,
    known: Mapping[str, dict[str, Any]] | None = None,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure dense attention and each variant on the same tokens.

    Args:
        model: what `load_sparse_model` returns; it is left with the attention and the config that it had.
        documents: dicts with "name" and "input_ids", all of one length.
        contexts: with facts to be asked for, or none.
        variants: what is measured, by name.
        num_rows: rows of the first document whose kept mass is measured.
        known: results of variants, and of "dense", that need not be measured again.
        progress: wraps the iteration over the names.

    Returns:
        "dense" and each variant with a JSON-ready dict: "nll" (nats a token, of each document), "perplexity",
        "needles" ("right" and "margin" of each fact; see `retrieve`) and "seconds" of a forward of the first document.
        Of a variant also "density", "kept_mass" (share of the dense softmax on the keys that rows read), "ratio" (of
        perplexities), "delta_nll" (see `paired_difference`), "dense_seconds" (measured beside "seconds") and
        "is_causal": whether its losses mean anything.
    """
    rows = [torch.tensor([document["input_ids"]], device=input_device(model)) for document in documents]
    known = known or {}
    dense_losses: Tensor | None = None
    for name in progress(["dense", *variants]):
        if name in known and name != "dense":
            yield name, known[name]
            continue
        config = variants.get(name)
        with nullcontext() if config is None else configured(model, config.to_dict()):
            model.set_attn_implementation(DENSE if config is None else SPARSE)
            density = DensityRecorder()
            with nullcontext() if config is None else record(model, density):
                losses = torch.stack([token_nll(model, row) for row in rows]).double()
            result: dict[str, Any] = {
                "nll": losses.mean(1).tolist(),
                "perplexity": math.exp(losses.mean().item()),
                "needles": [answer for context in contexts for answer in retrieve(model, context)],
                "seconds": _seconds(model, rows[0]),
            }
            if config is not None:
                assert dense_losses is not None
                statistics = AttentionStatistics(num_rows)
                with record(model, statistics):
                    model.base_model(input_ids=rows[0], use_cache=False)
                difference = paired_difference(losses - dense_losses)
                result |= {
                    "density": density.density,
                    "kept_mass": statistics.kept_mass.mean().item(),
                    "ratio": math.exp(difference["mean"]),
                    "delta_nll": difference,
                    "is_causal": not looks_ahead(config),
                }
                model.set_attn_implementation(DENSE)
                result["dense_seconds"] = _seconds(model, rows[0])
        model.set_attn_implementation(SPARSE)
        if config is None:
            dense_losses = losses
        yield name, result


def _seconds(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Of one forward without its logits."""
    started = time.perf_counter()
    float(model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1, 0])  # ends on the CPU
    return time.perf_counter() - started


def plot_comparison(results: Mapping[str, Mapping[str, dict[str, Any]]], path: str | Path) -> None:
    """Draw what each pattern costs by its density; patterns that are not causal are dashed.

    Args:
        results: by pattern and aim a dict with "density", "ratio" and "is_causal".
        path: the picture to write; its suffix chooses the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, aims in results.items():
        found = sorted(aims.values(), key=lambda result: result["density"])
        is_causal = all(result["is_causal"] for result in found)
        axes.plot(
            [result["density"] for result in found],
            [result["ratio"] - 1 for result in found],
            marker="o",
            linestyle="-" if is_causal else "--",
            label=name if is_causal else f"{name} (not causal)",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=1e-2)
    axes.set_xlabel("density: pairs of rows and keys that are read")
    axes.set_ylabel("perplexity over that of dense attention, less 1")
    axes.legend(fontsize="small")
    figure.savefig(path)
