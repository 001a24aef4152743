"""The field's patterns beside each other: one model, one density, the same tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.errors import RunError
from hf_sparse_attn.evaluation import choosers
from hf_sparse_attn.evaluation.dense_attention import SPARSE, dense_side
from hf_sparse_attn.evaluation.divergence import compare_predictions, joined, summarize
from hf_sparse_attn.evaluation.leak_test import find_leaks, places
from hf_sparse_attn.evaluation.perplexity import paired_difference
from hf_sparse_attn.evaluation.tasks.asking import ask, paired
from hf_sparse_attn.evaluation.tasks.paired import summarize as summarize_tasks
from hf_sparse_attn.evaluation.tasks.prompts import Prompt
from hf_sparse_attn.integration import choosing, configured, record
from hf_sparse_attn.logits import Head, hidden_states_and_head
from hf_sparse_attn.ops import Chooser, document_attention
from hf_sparse_attn.pattern_fields import looks_ahead
from hf_sparse_attn.patterns import layer_pattern
from hf_sparse_attn.recording import DensityRecorder
from hf_sparse_attn.statistics import AttentionStatistics
from hf_sparse_attn.tracing import input_device

_LEAST_STRIDE = 64
_LEAK_TOKENS, _LEAK_PLACES = 1024, 4
Fields = Callable[[int], dict[str, Any]]
BLOCK_VOTES = "block-votes"  # no preset: those of minference-like beside a window and leading keys
# No patterns: what they read beside the window and the leading keys of ssa is chosen in another way.
CHOOSERS: dict[str, Chooser] = {
    "ssa-votes": choosers.voted,
    "quest-like": choosers.quest,
    "oracle": choosers.oracle,
}
_PRESETS = {BLOCK_VOTES: "minference-like"} | dict.fromkeys(CHOOSERS, "ssa")  # under another name
# Of each pattern, the number that sets its density, as fields, and the least and the most that it may be.
_BUDGET: tuple[Fields, int, None] = (lambda n: {"key_budget": n, "min_weight": 0.0, "dense_below": 0}, 0, None)
KNOBS: dict[str, tuple[Fields, int, int | None]] = {
    "longformer": (lambda n: {"window_size": n}, 1, None),
    "bigbird": (lambda n: {"num_random_blocks": n}, 0, 200),
    "sparse-transformer": (lambda n: {"stride_width": n, "stride_offset": 128 - n}, 1, 127),
    "sparse-transformer-strided": (lambda n: {"window_size": n + 1, "dilation": n}, _LEAST_STRIDE, None),
    "streaming-llm": (lambda n: {"window_size": n}, 1, None),
    "longlora": (lambda n: {"block_size": n, "by_kv_head": [{}, {"block_offset": n // 2}]}, 2, None),
    "ssa": _BUDGET,
    "minference-like": (lambda n: {"num_voted_blocks": n}, 0, None),
    BLOCK_VOTES: (lambda n: {"num_voted_blocks": n, "window_size": 256, "num_global_tokens": 16}, 0, None),
    **dict.fromkeys(CHOOSERS, _BUDGET),
}


def pattern_at(name: str, density: float, num_tokens: int, num_kv_heads: int) -> SparseAttentionConfig:
    """A pattern with the number of `KNOBS` that brings its density nearest to another one, from below where it can.

    Args:
        name: a preset, `BLOCK_VOTES` or one of `CHOOSERS`.
        density: read over admissible pairs.
        num_tokens: of the documents.
        num_kv_heads: KV heads of a layer, which a pattern by head is dealt to.

    Raises:
        ValueError: the layer has fewer KV heads than the preset needs.
    """
    fields, low, most = KNOBS[name]
    high = num_tokens if most is None else most

    def config(number: int) -> SparseAttentionConfig:
        return SparseAttentionConfig.preset(_PRESETS.get(name, name), **fields(number))

    while low < high:  # the largest number of at most this density
        middle = (low + high + 1) // 2
        if expected_density(config(middle), num_tokens, num_kv_heads, CHOOSERS.get(name)) <= density:
            low = middle
        else:
            high = middle - 1
    return config(low)


@torch.no_grad()
def expected_density(
    config: SparseAttentionConfig, num_tokens: int, num_kv_heads: int, choose: Chooser | None = None
) -> float:
    """Density of one document whose queries and keys are random; data decide it only where `min_weight` is not 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_kv_heads, num_tokens, 2, generator=generator)
    pattern, recorder = layer_pattern(config, 0, num_kv_heads, num_kv_heads, 2, x.device, x.dtype), DensityRecorder()
    document_attention(
        x, x, x, pattern=pattern, query_offset=0, key_offset=0, scaling=1.0, recorder=recorder, choose=choose
    )
    return recorder.density


@torch.no_grad()
def compare_patterns(
    model: PreTrainedModel,
    documents: Sequence[dict[str, Any]],
    prompts: Sequence[Prompt],
    variants: Mapping[str, tuple[SparseAttentionConfig, Chooser | None]],
    *,
    num_rows: int = 64,
    known: Mapping[str, dict[str, Any]] | None = None,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure dense attention and each variant on the same tokens.

    Args:
        model: what `load_sparse_model` returns; it is left with the attention and the config that it had.
        documents: dicts with "name" and "input_ids", all of one length.
        prompts: of RULER-style tasks, or none.
        variants: what is measured, by name, and what chooses keys in place of the buckets.
        num_rows: rows of the first document whose kept mass is measured.
        known: results of variants, and of "dense", that need not be measured again.
        progress: wraps the iteration over the names.

    Returns:
        "dense" and each variant with a JSON-ready dict: "nll" (nats a token, of each document), "perplexity", and
        "seconds" of a forward of the first document (None where dense scores choose the keys). Of a variant also
        "density", "kept_mass" (share of the dense softmax on the keys that rows read), "ratio" (of perplexities),
        "delta_nll" (see `paired_difference`), "kl" and "top1_agreement" (see `divergence.summarize`), "tasks" (see
        `tasks.paired.summarize`; None without prompts), "dense_seconds" (measured beside "seconds"), "leak" (how far
        the logits of the first 1024 tokens move when a later one of them is changed, see `find_leaks`; None where
        forwards repeat too badly to tell) and "is_causal": whether nothing moves, so that its losses mean anything.
    """
    rows = [torch.tensor([document["input_ids"]], device=input_device(model)) for document in documents]
    known = known or {}
    model.set_attn_implementation(SPARSE)
    read_densely = dense_side(model, documents[0]["input_ids"])
    dense: list[tuple[Tensor, Head]] = []
    dense_answers: list[list[dict[str, Any]]] = []
    for name in progress(["dense", *variants]):
        if name in known and name != "dense":
            yield name, known[name]
            continue
        config, choose = variants.get(name, (None, None))
        with ExitStack() as stack:
            if config is not None:
                stack.enter_context(configured(model, config.to_dict()))
            if choose is not None:
                stack.enter_context(choosing(model, choose))
            if config is None:
                stack.enter_context(read_densely(model))
            density, asked_density = DensityRecorder(), DensityRecorder()
            with record(model, density):
                sides = [hidden_states_and_head(model, input_ids=row, use_cache=False) for row in rows]
            with record(model, asked_density):
                answers = [ask(model, prompt) for prompt in prompts]
            dense, dense_answers = dense or sides, dense_answers or answers
            predictions = joined(
                compare_predictions(expected, found, row[0, 1:])
                for expected, found, row in zip(dense, sides, rows, strict=True)
            )
            losses = predictions.sparse.double()
            result: dict[str, Any] = {
                "nll": losses.mean(1).tolist(),
                "perplexity": math.exp(losses.mean().item()),
                "seconds": None if choose is not None else _seconds(model, rows[0]),
            }
            if config is not None:
                leak = _leak(model, rows[0][0, :_LEAK_TOKENS].tolist())
                statistics = AttentionStatistics(num_rows)
                with record(model, statistics):
                    model.base_model(input_ids=rows[0], use_cache=False)
                difference = paired_difference(losses - predictions.dense.double())
                asked = [
                    paired(prompt, expected, found, asked_density)
                    for prompt, expected, found in zip(prompts, dense_answers, answers, strict=True)
                ]
                result |= {
                    "density": density.density,
                    "kept_mass": statistics.kept_mass.mean().item(),
                    "ratio": math.exp(difference["mean"]),
                    "delta_nll": difference,
                    **summarize(predictions),
                    "tasks": summarize_tasks(asked) if asked else None,
                    "leak": leak,
                    "is_causal": not (looks_ahead(config) if leak is None else leak),
                }
                with read_densely(model):
                    result["dense_seconds"] = _seconds(model, rows[0])
        yield name, result


def _leak(model: PreTrainedModel, document: list[int]) -> float | None:
    """How far a later token moves earlier logits; 0.0 where they move no further than those of the same input."""
    try:
        found = find_leaks(model, document, places(len(document), min(_LEAK_PLACES, len(document) // 2)))
    except RunError:
        return None
    return float(found["largest_difference"]) if found["leaks"] else 0.0


def _seconds(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Of one forward without its logits."""
    started = time.perf_counter()
    float(model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1, 0])  # ends on the CPU
    return time.perf_counter() - started


def plot_comparison(results: Mapping[int, Mapping[str, Sequence[dict[str, Any]]]], path: str | Path) -> None:
    """Draw what each pattern costs by its density, a panel for each length; patterns that are not causal are dashed.

    Args:
        results: by length in tokens and pattern, dicts with "density", "ratio" and "is_causal".
        path: the picture to write; its suffix chooses the format.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 5 * len(results), 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for patterns in results.values() for name in patterns))
    colours = matplotlib.color_sequences["tab20"]
    panels = figure.subplots(1, len(results), squeeze=False, sharex=True, sharey=True)[0]
    for panel, (length, patterns) in zip(panels, results.items(), strict=True):
        for name, found in patterns.items():
            points = sorted((result["density"], result["ratio"] - 1) for result in found)
            is_causal = all(result["is_causal"] for result in found)
            panel.plot(
                *zip(*points, strict=True),
                marker="o",
                color=colours[names.index(name) % len(colours)],
                linestyle="-" if is_causal else "--",
                label=name if is_causal else f"{name} (not causal)",
            )
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"{length} tokens")
        panel.set_xlabel("density: pairs of rows and keys that are read")
    lost = [result["ratio"] - 1 for patterns in results.values() for found in patterns.values() for result in found]
    panels[0].set_xlim(left=0)  # all panels share their axes
    panels[0].set_yscale("symlog", linthresh=1e-2)
    panels[0].set_ylim(min(0, *lost) - 1e-3, max(0, *lost) * 1.2 + 1e-3)
    panels[0].set_ylabel("perplexity over that of dense attention, less 1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path)
