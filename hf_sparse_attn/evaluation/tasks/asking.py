"""The same weights with dense and with sparse attention on the same prompts."""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedModel

from hf_sparse_attn.evaluation.dense_attention import DENSE, SPARSE, Block, dense_side
from hf_sparse_attn.evaluation.needle import answer_likelihoods, read_context
from hf_sparse_attn.evaluation.tasks.prompts import Prompt
from hf_sparse_attn.integration import record
from hf_sparse_attn.recording import DensityRecorder


def ask(model: PreTrainedModel, prompt: Prompt) -> list[dict[str, Any]]:
    """Ask every question of a prompt, with one prefill for all of them and the attention that the model has.

    Returns:
        For each question "margin" (log-likelihood of the likeliest right answer minus that of the likeliest wrong one,
        nats), "right" (it is positive) and "generated" (greedy decoding starts with a right answer's tokens).

    Raises:
        ValueError: a likelihood is not finite.
    """
    cache = read_context(model, prompt.input_ids)
    found = []
    for question, tokens, answers in zip(prompt.questions, prompt.question_ids, prompt.answer_ids, strict=True):
        likelihoods, greedy = answer_likelihoods(model, cache, tokens, answers)
        if not likelihoods.isfinite().all():
            attention = model.config._attn_implementation
            raise ValueError(f"a likelihood of task {prompt.task} is not finite with {attention} attention")
        num_right = len(question.right)
        margin = (likelihoods[:num_right].max() - likelihoods[num_right:].max()).item()
        found.append({"margin": margin, "right": margin > 0, "generated": any(greedy[:num_right])})
    return found


def ask_both(
    model: PreTrainedModel,
    prompt: Prompt,
    sparse_first: bool = False,
    dense_attention: Block | None = None,
) -> dict[str, Any]:
    """Ask dense and sparse.

    Args:
        model: what `load_sparse_model` returns; it is left with sparse attention.
        sparse_first: whoever goes first pays for cold caches, so let them take turns.
        dense_attention: a block in which the model's attention is dense; None: that of `dense_side`.

    Returns:
        What `paired` returns, with "dense_seconds" and "sparse_seconds".
    """
    answers, seconds, density = {}, {}, DensityRecorder()
    model.set_attn_implementation(SPARSE)
    dense = dense_attention or dense_side(model, prompt.input_ids)
    for side in (SPARSE, DENSE) if sparse_first else (DENSE, SPARSE):
        with record(model, density) if side == SPARSE else dense(model):
            started = time.perf_counter()
            answers[side] = ask(model, prompt)
            seconds[side] = time.perf_counter() - started
    result = paired(prompt, answers[DENSE], answers[SPARSE], density)
    return result | {"dense_seconds": seconds[DENSE], "sparse_seconds": seconds[SPARSE]}


def paired(
    prompt: Prompt, dense: list[dict[str, Any]], sparse: list[dict[str, Any]], density: DensityRecorder
) -> dict[str, Any]:
    """What `ask` returned with both, in one.

    Returns:
        A JSON-ready dict: "task", "context_length", the "attended" and "admissible" pairs of the sparse side, and
        "questions", each with its "answer" (the first right one), "depth" (of its fact, or None), "chance" and what
        `ask` returned as "dense" and "sparse".
    """
    return {
        "task": prompt.task,
        "context_length": prompt.context_length,
        "attended": density.attended,
        "admissible": density.admissible,
        "questions": [
            {"answer": question.right[0].strip(), "depth": depth, "chance": question.chance}
            | {"dense": expected, "sparse": found}
            for question, depth, expected, found in zip(prompt.questions, prompt.depths, dense, sparse, strict=True)
        ],
    }
