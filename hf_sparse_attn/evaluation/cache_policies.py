"""Perplexity and needle retrieval through caches that stay small, beside dense and sparse attention to all keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_sparse_attn.cache import SparseCache, layer_bytes
from hf_sparse_attn.cache.policies import (
    AdaptiveBudget,
    Composition,
    HeavyHitters,
    KeyNorm,
    Policy,
    Recency,
    Recent,
    Sinks,
    UniformBudget,
)
from hf_sparse_attn.config import layer_shape, text_config
from hf_sparse_attn.evaluation.dense_attention import DENSE, SPARSE, dense_side
from hf_sparse_attn.evaluation.haystack import Context
from hf_sparse_attn.evaluation.needle import mean_answers, retrieve
from hf_sparse_attn.evaluation.perplexity import paired_difference
from hf_sparse_attn.logits import token_losses
from hf_sparse_attn.tracing import input_device

PEAK_OVER_BUDGET = 1.08  # the most that a cache may hold at any time, over what it is to keep


@dataclass(frozen=True)
class NamedPolicy:
    """A policy for any number of tokens.

    Args:
        source: where it was proposed.
        make: the policy for so many tokens of each KV head.
        budget: the kind of its budget.
    """

    source: str
    make: Callable[[int], Policy]
    budget: type[UniformBudget] = UniformBudget


def _recent_heavy(tokens: int) -> Policy:
    return Recent(max(1, tokens // 8)) + HeavyHitters()


POLICIES = {
    "streaming_llm": NamedPolicy("arXiv 2309.17453", lambda tokens: Sinks(4) + Recency()),
    "heavy": NamedPolicy("arXiv 2306.14048, without recent tokens", lambda tokens: HeavyHitters()),
    "h2o": NamedPolicy("arXiv 2306.14048", lambda tokens: Recent(max(1, tokens // 2)) + HeavyHitters()),
    "key_norm": NamedPolicy("arXiv 2406.11430", lambda tokens: KeyNorm()),
    "recent_key_norm": NamedPolicy(
        "arXiv 2406.11430, with recent tokens", lambda tokens: Recent(max(1, tokens // 2)) + KeyNorm()
    ),
    "recent_heavy": NamedPolicy("arXiv 2306.14048, with an eighth of recent tokens", _recent_heavy),
    "recent_heavy_adaptive": NamedPolicy("the same, with arXiv 2407.11550", _recent_heavy, AdaptiveBudget),
}


def budget_tokens(config: Any, dtype: torch.dtype, share: float, context_length: int, chunk_size: int) -> int:
    """Tokens of a budget that is a share of a context.

    Beside what is kept there are the tokens of one chunk, and for each key a position and a weight. All of it together
    stays within `PEAK_OVER_BUDGET` of the share.

    Args:
        config: the model's.
        dtype: of its keys.

    Raises:
        ValueError: nothing could be kept.
    """
    shapes = [layer_shape(config, layer) for layer in range(text_config(config).num_hidden_layers)]
    head_dim = max(shape[2] for shape in shapes if shape is not None)
    key_bytes = 2 * head_dim * dtype.itemsize
    most = int(PEAK_OVER_BUDGET * share * context_length * key_bytes / (key_bytes + 8)) - chunk_size
    tokens = min(int(share * context_length), most)
    if tokens < 1:
        raise ValueError(
            f"{share:g} of {context_length} tokens has no room for chunks of {chunk_size}; take smaller chunks"
        )
    return tokens


def check_budgets(
    config: Any, dtype: torch.dtype, names: Sequence[str], share: float, lengths: Sequence[int], chunk_size: int
) -> dict[int, int]:
    """The tokens of the budget for each context length, once it is sure that every policy can do with them.

    Raises:
        ValueError: as `budget_tokens` and `SparseCache`.
    """
    tokens = {length: budget_tokens(config, dtype, share, length, chunk_size) for length in lengths}
    for name in names:
        for count in tokens.values():
            UniformBudget.of(count, Composition.of(POLICIES[name].make(count)))
    return tokens


def make_cache(model: PreTrainedModel, name: str, tokens: int, chunk_size: int) -> DynamicCache:
    """A new cache: that of a policy by its name, or one of all keys for "dense" and "sparse".

    Raises:
        ValueError: as `SparseCache`.
    """
    if name == DENSE:
        return DynamicCache(config=model.config)
    if name == SPARSE:
        return SparseCache(model.config)
    named = POLICIES[name]
    budget = named.budget(tokens, slack=chunk_size)
    return SparseCache(model.config, policy=named.make(tokens), budget=budget)


@torch.no_grad()
def cached_nll(model: PreTrainedModel, input_ids: Tensor, cache: DynamicCache, chunk_size: int) -> Tensor:
    """Negative log-likelihood of every token after the first, the document given in chunks through a cache.

    Args:
        input_ids: [1, N] int64.

    Returns:
        [N - 1] float64 on the CPU; entry i is that of token i + 1.
    """
    losses = []
    for start in range(0, input_ids.shape[1], chunk_size):
        chunk, targets = input_ids[:, start : start + chunk_size], input_ids[0, start + 1 : start + chunk_size + 1]
        losses.append(token_losses(model, chunk, targets, past_key_values=cache, use_cache=True))
    return torch.cat(losses).double()


def compare_policies(
    model: PreTrainedModel,
    documents: Sequence[dict[str, Any]],
    contexts: Sequence[Context],
    names: Sequence[str],
    share: float,
    chunk_size: int,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Evaluate the same weights with dense attention, with sparse attention and with policies at one budget.

    Args:
        model: what `load_sparse_model` returns; it is left with sparse attention.
        documents: dicts with "name" and "input_ids", all of one length N >= 2.
        contexts: what `make_contexts` returns; may be empty.
        names: of `POLICIES`.
        share: of each context's tokens that the policies keep; see `budget_tokens`.
        chunk_size: tokens of a call.
        progress: wraps the iteration over documents and contexts, to show how far it is.

    Returns:
        A JSON-ready dict with "context_length", "chunk_size", "share", "full_bytes" (what a document's keys and values
        take) and "rows": dense and sparse with all keys, then the policies. Each row has "name", "policy", "source",
        "tokens" (kept by each KV head), "perplexity", "nll", "ratio_to_dense", "ratio_to_sparse" (of perplexities),
        "delta_nll" (to dense, see `paired_difference`), "peak_bytes", "peak_share" (over what all keys of the same
        length take, the largest of all documents and contexts), "seconds", and, where there are contexts, "needle":
        "samples", "accuracy", "generation_accuracy", "margin" (see `compare_retrieval`), "seconds" and the same by
        "cells" of context length and depth.

    Raises:
        ValueError: a budget is impossible, or a likelihood is not finite.
    """
    context_length = len(documents[0]["input_ids"])
    lengths = [context_length, *(context.context_length for context in contexts)]
    tokens = check_budgets(model.config, model.dtype, names, share, lengths, chunk_size)
    sides = [DENSE, SPARSE, *names]
    nll: dict[str, list[Tensor]] = {name: [] for name in sides}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    peaks: dict[str, list[tuple[int, int]]] = {name: [] for name in sides}  # bytes held, length
    seconds = {name: [0.0, 0.0] for name in sides}
    model.set_attn_implementation(SPARSE)
    dense = dense_side(model, documents[0]["input_ids"])
    for item, name in progress([(item, name) for item in (*documents, *contexts) for name in sides]):
        is_context = isinstance(item, Context)
        length = item.context_length if is_context else context_length
        cache = make_cache(model, name, tokens[length], chunk_size)
        started = time.perf_counter()
        with dense(model) if name == DENSE else nullcontext():
            if is_context:
                found = retrieve(model, item, cache, chunk_size)
                answers[name] += [
                    {"context_length": item.context_length, "depth": needle.depth, **answer}
                    for needle, answer in zip(item.needles, found, strict=True)
                ]
            else:
                ids = torch.tensor([item["input_ids"]], device=input_device(model))
                losses = cached_nll(model, ids, cache, chunk_size)
                if not losses.isfinite().all():
                    raise ValueError(f"the loss of document {item['name']!r} is not finite with {name}")
                nll[name].append(losses)
        seconds[name][is_context] += time.perf_counter() - started
        peaks[name].append((_peak_bytes(cache), length))

    per_token = peaks[DENSE][0][0] / context_length
    losses_of = {name: torch.stack(found) for name, found in nll.items()}  # [documents, N - 1]
    rows = []
    for name in sides:
        named = POLICIES.get(name)
        mean = losses_of[name].mean()
        row = {
            "name": name,
            "policy": "all keys" if named is None else repr(named.make(tokens[context_length])),
            "budget": None if named is None else named.budget.__name__,
            "source": None if named is None else named.source,
            "tokens": context_length if named is None else tokens[context_length],
            "perplexity": mean.exp().item(),
            "nll": mean.item(),
            "ratio_to_dense": (mean - losses_of[DENSE].mean()).exp().item(),
            "ratio_to_sparse": (mean - losses_of[SPARSE].mean()).exp().item(),
            "delta_nll": paired_difference(losses_of[name] - losses_of[DENSE]),
            "peak_bytes": max(held for held, length in peaks[name] if length == context_length),
            "peak_share": max(held / (length * per_token) for held, length in peaks[name]),
            "seconds": seconds[name][False],
        }
        if contexts:
            row["needle"] = _needle_summary(answers[name]) | {
                "seconds": seconds[name][True],
                "cells": _cells(answers[name]),
            }
        rows.append(row)
    return {
        "context_length": context_length,
        "chunk_size": chunk_size,
        "share": share,
        "documents": [document["name"] for document in documents],
        "full_bytes": peaks[DENSE][0][0],
        "rows": rows,
    }


def _peak_bytes(cache: DynamicCache) -> int:
    return cache.peak_nbytes if isinstance(cache, SparseCache) else sum(map(layer_bytes, cache.layers))


def _needle_summary(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"samples": len(answers), **mean_answers(answers)}


def _cells(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    places = sorted({(answer["context_length"], answer["depth"]) for answer in answers})
    return [
        {"context_length": length, "depth": depth}
        | _needle_summary([a for a in answers if (a["context_length"], a["depth"]) == (length, depth)])
        for length, depth in places
    ]
