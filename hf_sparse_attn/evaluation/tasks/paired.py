"""What paired answers say: of each task and length, which of them say nothing, and which one loses most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_sparse_attn.evaluation.needle import NUM_RESAMPLES, binomial_interval, mean_answers

SIDES = ("dense", "sparse")


def summarize(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the answers to prompts say.

    Args:
        prompts: what `ask_both` returned.

    Returns:
        "density" (attended over admissible pairs), "cells" by context length and task in the order in which they come
        (see `summarize_cell`), "too_hard": names of the cells in which the dense model is not better than chance, which
        say nothing about sparse attention, and "worst": the cell among the others that loses most by accuracy, or None.
        The worst cell also has "simultaneous_ci95", which holds for all cells at once (Bonferroni): the worst of many
        is chosen by its very figure.
    """
    by_cell: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for prompt in prompts:
        by_cell.setdefault((prompt["context_length"], prompt["task"]), []).append(prompt)
    cells: list[dict[str, Any]] = [
        {"task": task, "context_length": length} | summarize_cell(by_cell[length, task])
        for length, task in sorted(by_cell, key=lambda cell: cell[0])
    ]
    telling = [cell for cell in cells if cell["is_above_chance"]]
    worst = min(telling, key=lambda cell: cell["difference"]["accuracy"], default=None)
    if worst is not None:
        members = by_cell[worst["context_length"], worst["task"]]
        simultaneous = paired_difference(members, level=1 - 0.05 / len(telling))["interval"]
        worst = {**worst, "simultaneous_ci95": simultaneous, "of": len(telling)}
    return {
        "density": _density(prompts),
        "cells": cells,
        "too_hard": [_name(cell) for cell in cells if not cell["is_above_chance"]],
        "worst": worst,
    }


def summarize_cell(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prompts of one task and length.

    Returns:
        "prompts", "samples" (questions), "chance", "density", "dense" and "sparse" ("accuracy", "generation_accuracy",
        "margin"), "dense_ci95" (of the dense accuracy), "is_above_chance" (its lower end is above chance),
        "only_dense" and "only_sparse" (questions that one side alone gets right), and "difference", sparse minus dense:
        "accuracy", its "ci95", "generation_accuracy", "margin", its "margin_ci95", "p_value" (McNemar's exact test with
        questions as independent) and "p_value_by_prompt" (the same with all questions of a prompt changing sides
        together, exact too).
    """
    questions = [question for prompt in prompts for question in prompt["questions"]]
    sides = {side: mean_answers([question[side] for question in questions]) for side in SIDES}
    right = [[question["dense"]["right"] for question in prompt["questions"]] for prompt in prompts]
    exact = binomial_interval(sum(map(sum, right)), len(questions), level=0.95)
    interval = _wider(exact, _resampled(right, 0.95))
    chance = sum(question["chance"] for question in questions) / len(questions)
    difference = paired_difference(prompts)
    margins = [[q["sparse"]["margin"] - q["dense"]["margin"] for q in prompt["questions"]] for prompt in prompts]
    changes = {name: sides["sparse"][name] - sides["dense"][name] for name in sides["dense"]}
    return {
        "prompts": len(prompts),
        "samples": len(questions),
        "chance": chance,
        "density": _density(prompts),
        **sides,
        "dense_ci95": interval,
        "is_above_chance": interval[0] > chance,
        "only_dense": difference["only_dense"],
        "only_sparse": difference["only_sparse"],
        "difference": changes
        | {
            "ci95": difference["interval"],
            "margin_ci95": _resampled(margins, 0.95),
            "p_value": difference["p_value"],
            "p_value_by_prompt": difference["p_value_by_prompt"],
            "method": f"the wider of an exact interval over {len(questions)} questions and a bootstrap over "
            f"{len(prompts)} prompts",
        },
    }


def paired_difference(prompts: Sequence[Mapping[str, Any]], level: float = 0.95) -> dict[str, Any]:
    """Of the share of right answers, sparse minus dense.

    The "interval" is the wider of two at both ends. One joins exact intervals (Clopper-Pearson) of the shares of
    questions that one side alone gets right, as if questions were independent: where the sides never differ it says how
    large a difference could have been missed. The other is a bootstrap over prompts: their questions are not
    independent. Also "only_dense", "only_sparse", "p_value" and "p_value_by_prompt", see `summarize_cell`.
    """
    changes = [[q["sparse"]["right"] - q["dense"]["right"] for q in prompt["questions"]] for prompt in prompts]
    flat = [change for prompt in changes for change in prompt]
    lost, gained = flat.count(-1), flat.count(1)
    half = 1 - (1 - level) / 2
    lost_low, lost_high = binomial_interval(lost, len(flat), half)
    gained_low, gained_high = binomial_interval(gained, len(flat), half)
    return {
        "interval": _wider((gained_low - lost_high, gained_high - lost_low), _resampled(changes, level)),
        "only_dense": lost,
        "only_sparse": gained,
        "p_value": sign_flip_test([change for change in flat if change]),
        "p_value_by_prompt": sign_flip_test([sum(prompt) for prompt in changes]),
    }


def sign_flip_test(changes: Sequence[int]) -> float:
    """Probability of a sum at least as far from 0 if each change had either sign by chance, exactly.

    With changes of 1 and -1 this is McNemar's exact test; one number a prompt is its form for grouped questions.
    """
    sizes = [abs(change) for change in changes if change]
    ways = np.ones(1)  # of sums from -total to total
    for size in sizes:
        step = np.zeros(2 * size + 1)
        step[[0, -1]] = 0.5
        ways = np.convolve(ways, step)
    total = sum(sizes)
    far = np.abs(np.arange(-total, total + 1)) >= abs(sum(changes))
    return min(1.0, float(ways[far].sum()))


def _resampled(groups: Sequence[Sequence[float]], level: float) -> list[float]:
    """Interval of the mean over all members of groups, by a bootstrap that draws whole groups, with a fixed seed."""
    sums = np.array([math.fsum(group) for group in groups])
    sizes = np.array([len(group) for group in groups])
    drawn = np.random.default_rng(0).multinomial(len(groups), [1 / len(groups)] * len(groups), size=NUM_RESAMPLES)
    low, high = np.quantile((drawn @ sums) / (drawn @ sizes), [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def _wider(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [min(first[0], second[0]), max(first[1], second[1])]


def _density(prompts: Sequence[Mapping[str, Any]]) -> float:
    return sum(prompt["attended"] for prompt in prompts) / max(1, sum(prompt["admissible"] for prompt in prompts))


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['task']} {cell['context_length']}"
