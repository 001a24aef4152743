"""Needle retrieval: facts hidden in long text, asked for afterwards, dense and sparse on the same prompts."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_sparse_attn.cache import SparseCache, SparseLayer
from hf_sparse_attn.evaluation.dense_attention import DENSE, SPARSE, dense_side
from hf_sparse_attn.evaluation.haystack import SEVERAL, SINGLE, Context
from hf_sparse_attn.integration import record
from hf_sparse_attn.logits import hidden_states_and_head
from hf_sparse_attn.recording import DensityRecorder
from hf_sparse_attn.tracing import input_device

TASK_TITLES = {SINGLE: "one fact", SEVERAL: "several facts"}
NUM_RESAMPLES = 10_000
# Layers of which a shallow copy can go on by itself: they replace their tensors, or write after their own tokens.
_SHARED = (DynamicLayer, DynamicSlidingWindowLayer, SparseLayer)


def compare_retrieval(
    model: PreTrainedModel, contexts: Sequence[Context], progress: Callable[[list[Any]], Iterable[Any]] = iter
) -> dict[str, Any]:
    """Ask the same weights for every needle of every context with dense and with sparse attention.

    Args:
        model: what `load_sparse_model` returns; it is left with sparse attention.
        contexts: what `make_contexts` returns.
        progress: wraps the iteration over the prefills (two a context), to show how far it is.

    Returns:
        A JSON-ready dict. "dense" and "sparse": "accuracy" (the right answer is likelier than every alternative),
        "generation_accuracy" (greedy decoding starts with its tokens), "margin" (mean log-likelihood of the right
        answer minus that of the likeliest wrong one, nats), "seconds", and the sparse "density" (attended over
        admissible pairs). "samples", "only_dense" and "only_sparse": questions in all, and those that one side alone
        gets right. "difference": sparse minus dense, see `paired_difference`. "tasks" and "cells" hold the same by
        task, and by task, context length and depth; "contexts" holds every single answer.

    Raises:
        ValueError: a likelihood is not finite.
    """
    answers: dict[str, dict[int, list[dict[str, Any]]]] = {DENSE: {}, SPARSE: {}}
    seconds: dict[str, dict[int, float]] = {DENSE: {}, SPARSE: {}}
    density = DensityRecorder()
    model.set_attn_implementation(SPARSE)
    dense = dense_side(model, contexts[0].input_ids)
    # Whoever goes first on a context pays for cold caches: they take turns.
    turns = [(DENSE, SPARSE), (SPARSE, DENSE)]
    for index, side in progress([(i, side) for i in range(len(contexts)) for side in turns[i % 2]]):
        with record(model, density) if side == SPARSE else dense(model):
            started = time.perf_counter()
            answers[side][index] = retrieve(model, contexts[index])
            seconds[side][index] = time.perf_counter() - started

    asked = [
        {"task": context.task, "context_length": context.context_length, "depth": needle.depth}
        | {"dense": expected, "sparse": found}
        for index, context in enumerate(contexts)
        for needle, expected, found in zip(context.needles, answers[DENSE][index], answers[SPARSE][index], strict=True)
    ]
    result = _summary(asked) | {"difference": paired_difference(asked)}
    result["dense"]["seconds"] = sum(seconds[DENSE].values())
    result["sparse"] |= {"seconds": sum(seconds[SPARSE].values()), "density": density.density}
    result["tasks"] = _grouped(asked, "task")
    result["cells"] = _grouped(asked, "task", "context_length", "depth")
    result["contexts"] = [
        {
            "task": context.task,
            "context_length": context.context_length,
            "document": context.document,
            "dense_seconds": seconds[DENSE][index],
            "sparse_seconds": seconds[SPARSE][index],
            "needles": [
                {"depth": needle.depth, "start": needle.start, "key": needle.key, "answer": needle.answer}
                | {"dense": dense, "sparse": sparse}
                for needle, dense, sparse in zip(
                    context.needles, answers[DENSE][index], answers[SPARSE][index], strict=True
                )
            ],
        }
        for index, context in enumerate(contexts)
    ]
    return result


@torch.no_grad()
def retrieve(
    model: PreTrainedModel, context: Context, cache: DynamicCache | None = None, chunk_size: int | None = None
) -> list[dict[str, Any]]:
    """Ask for every needle of a context, with one prefill for all of them.

    Args:
        cache: an empty one to be filled with the context; None: a new `SparseCache`.
        chunk_size: tokens of the context in one forward; None: all of them.

    Returns:
        Per needle "margin" (log-likelihood of the right answer minus that of the likeliest wrong one, nats), "right"
        (it is positive) and "generated" (greedy decoding starts with the right answer's tokens).

    Raises:
        ValueError: a likelihood is not finite.
    """
    cache = read_context(model, context.input_ids, cache, chunk_size)
    found = []
    for needle in context.needles:
        likelihoods, greedy = answer_likelihoods(model, cache, needle.question, needle.alternatives)
        if not likelihoods.isfinite().all():
            raise ValueError(
                f"a likelihood in document {context.document!r} is not finite with "
                f"{model.config._attn_implementation} attention"
            )
        margin = (likelihoods[0] - likelihoods[1:].max()).item()
        found.append({"margin": margin, "right": margin > 0, "generated": greedy[0]})
    return found


@torch.no_grad()
def read_context(
    model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache | None = None, chunk_size: int | None = None
) -> DynamicCache:
    """A cache (a new `SparseCache`, or the empty one given) filled with tokens, all or `chunk_size` in one forward."""
    cache = SparseCache(model.config) if cache is None else cache
    input_ids = torch.tensor([tokens], device=input_device(model))
    for chunk in input_ids.split(chunk_size or input_ids.shape[1], dim=1):
        hidden_states_and_head(model, input_ids=chunk, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def answer_likelihoods(
    model: PreTrainedModel, cache: DynamicCache, question: Sequence[int], alternatives: Sequence[Sequence[int]]
) -> tuple[Tensor, list[bool]]:
    """Log-likelihood in nats of each alternative [A] float64 after the cached tokens and a question.

    Args:
        cache: left as it is.
        alternatives: token ids, all of one length.

    Returns:
        The log-likelihoods, and of each alternative whether greedy decoding starts with its tokens.
    """
    cache = _copied(cache)  # the next question needs it unchanged
    answers = torch.tensor(alternatives)  # [A, T]
    (first,) = _log_probabilities(model, question, cache, rows=1)  # [V]
    likelihoods = first[answers[:, 0]]
    # Greedy decoding gives these tokens exactly if each is the likeliest after the ones before it.
    greedy = first.argmax() == answers[:, 0]
    if answers.shape[1] > 1:
        for index, tokens in enumerate(answers):
            following = _log_probabilities(model, tokens[:-1].tolist(), _copied(cache))  # [T - 1, V]
            likelihoods[index] += following.gather(1, tokens[1:, None]).sum()
            greedy[index] &= (following.argmax(-1) == tokens[1:]).all()
    return likelihoods, greedy.tolist()


def _copied(cache: DynamicCache) -> DynamicCache:
    """A cache to go on with, until the next one is copied; tensors are shared where what the copy adds hurts none."""
    if any(type(layer) not in _SHARED for layer in cache.layers):
        return copy.deepcopy(cache)
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _log_probabilities(model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache, rows: int = 0) -> Tensor:
    """Of the token after each of the last `rows` of `tokens` (0: all, [R, V] float64), which follow the cached ones."""
    input_ids = torch.tensor([tokens], device=input_device(model))
    hidden, head = hidden_states_and_head(model, input_ids=input_ids, past_key_values=cache, use_cache=True)
    return head(hidden[0, -rows:]).cpu().double().log_softmax(-1)


def paired_difference(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sparse minus dense over the same questions.

    Returns:
        {"accuracy": its mean, "ci95": [low, high] of it, "p_value": that of the exact sign test (McNemar's), "method",
        "margin": the mean difference of the margins, "margin_ci95": its interval by bootstrap over the questions}.
        The interval of the accuracy joins exact 97.5% intervals (Clopper-Pearson) of the two shares of questions that
        one side alone gets right. It is honest about small samples: where the sides never differ, it says how large a
        difference could have been missed.
    """
    counts = _summary(asked)
    total, lost, gained = counts["samples"], counts["only_dense"], counts["only_sparse"]
    lost_low, lost_high = binomial_interval(lost, total)
    gained_low, gained_high = binomial_interval(gained, total)
    tail = sum(math.comb(lost + gained, wins) for wins in range(min(lost, gained) + 1))
    margins = np.array([entry["sparse"]["margin"] - entry["dense"]["margin"] for entry in asked])
    drawn = np.random.default_rng(0).integers(total, size=(NUM_RESAMPLES, total))
    low, high = np.quantile(margins[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "accuracy": (gained - lost) / total,
        "ci95": [gained_low - lost_high, gained_high - lost_low],
        "p_value": min(1.0, 2 * tail / 2 ** (lost + gained)),
        "method": f"exact, over {total} questions taken as independent",
        "margin": float(margins.mean()),
        "margin_ci95": [float(low), float(high)],
    }


def binomial_interval(successes: int, trials: int, level: float = 0.975) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a share: the shares that an equal-tailed test at 1 - level keeps."""

    def at_most(count: int, share: float) -> float:
        ways = ways_of[: count + 1]
        chosen = np.arange(len(ways))
        return float(np.exp(ways + chosen * math.log(share) + (trials - chosen) * math.log1p(-share)).sum())

    def log_factorial(number: int) -> float:
        return math.lgamma(number + 1)

    ways_of = np.array(
        [log_factorial(trials) - log_factorial(k) - log_factorial(trials - k) for k in range(trials + 1)]
    )

    def largest(count: int, probability: float) -> float:
        """The largest share under which at most `count` successes still have this probability."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(count, middle) > probability else (low, middle)
        return low

    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else largest(successes - 1, 1 - tail)
    high = 1.0 if successes == trials else largest(successes, tail)
    return low, high


def plot_retrieval(cells: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Heat maps of the accuracy over depth (downwards) and context length: dense, sparse and sparse minus dense.

    Args:
        cells: those of `compare_retrieval`; one row of panels per task.
        path: the picture to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    # The object interface: it needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks, lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("task", "context_length", "depth"))
    sides = {
        "dense": lambda cell: cell["dense"]["accuracy"],
        "sparse": lambda cell: cell["sparse"]["accuracy"],
        "sparse - dense": lambda cell: cell["sparse"]["accuracy"] - cell["dense"]["accuracy"],
    }
    width, height = 1.5 + 0.7 * len(lengths), 0.6 + 0.4 * len(depths)
    figure = Figure(figsize=(3 * width + 1, len(tasks) * height + 0.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(sides), squeeze=False, sharex=True, sharey=True)
    for task, row in zip(tasks, panels, strict=True):
        for (title, share), panel in zip(sides.items(), row, strict=True):
            grid = np.full((len(depths), len(lengths)), np.nan)
            for cell in cells:
                if cell["task"] == task:
                    where = depths.index(cell["depth"]), lengths.index(cell["context_length"])
                    grid[where] = share(cell)
                    panel.text(*where[::-1], f"{grid[where]:.2f}", ha="center", va="center", fontsize=8)
            signed = title == "sparse - dense"
            # Ranges beyond the figures' own leave out the dark ends of the colours, where black text is hard to read.
            limits = (-1.5, 1.5) if signed else (0, 1.5)
            panel.imshow(grid, vmin=limits[0], vmax=limits[1], cmap="RdBu" if signed else "Greens", aspect="auto")
            panel.set_title(f"{TASK_TITLES[task]}: {title}", fontsize=9)
            panel.set_xticks(range(len(lengths)), map(str, lengths))
            panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    figure.supxlabel("context length, tokens")
    figure.supylabel("depth")
    figure.savefig(path)


def _grouped(asked: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in asked:
        groups.setdefault(tuple(entry[name] for name in names), []).append(entry)
    return [dict(zip(names, key, strict=True)) | _summary(groups[key]) for key in sorted(groups)]


def mean_answers(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """ "accuracy", "generation_accuracy" and "margin" (see `compare_retrieval`) of what `retrieve` returned."""
    measures = {"accuracy": "right", "generation_accuracy": "generated", "margin": "margin"}
    return {name: sum(answer[part] for answer in answers) / len(answers) for name, part in measures.items()}


def _summary(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "samples": len(asked),
        **{side: mean_answers([entry[side] for entry in asked]) for side in ("dense", "sparse")},
        "only_dense": sum(entry["dense"]["right"] and not entry["sparse"]["right"] for entry in asked),
        "only_sparse": sum(entry["sparse"]["right"] and not entry["dense"]["right"] for entry in asked),
    }
