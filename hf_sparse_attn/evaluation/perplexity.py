"""Perplexity of one model over the same tokens, dense and sparse, and how far their predictions are apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_sparse_attn.data import IGNORED_LABEL
from hf_sparse_attn.evaluation.dense_attention import DENSE, SPARSE, Block, dense_side
from hf_sparse_attn.evaluation.divergence import Predictions, compare_predictions, joined, summarize, worst_tokens
from hf_sparse_attn.integration import record
from hf_sparse_attn.logits import hidden_states_and_head, token_losses
from hf_sparse_attn.recording import DensityRecorder
from hf_sparse_attn.tracing import input_device

NUM_SPANS = 8
BLOCK_LENGTH = 256
NUM_RESAMPLES = 10_000


@torch.no_grad()
def token_nll(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token after the first, in nats, computed from float32 logits.

    Args:
        input_ids: [1, N] int64.

    Returns:
        [N - 1] float32 on the CPU; entry i is that of token i + 1.
    """
    return token_losses(model, input_ids, input_ids[0, 1:], use_cache=False)


def row_losses(model: PreTrainedModel, row: Mapping[str, Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every token after a row's first, in nats, and its place in its own document.

    Args:
        row: "input_ids" and "labels", N ints each, and "position_ids" where it holds several documents, as
            `hf_sparse_attn.data.packed` returns them.

    Returns:
        [N - 1] float32 and [N - 1] int64 on the CPU; the place of a token that is not a target is -1.
    """
    device = input_device(model)
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    positions = torch.tensor(row["position_ids"]) if "position_ids" in row else torch.arange(len(ids))
    losses = token_losses(
        model, ids[None].to(device), ids[1:], position_ids=positions[None].to(device), use_cache=False
    )
    return losses, torch.where(labels[1:] == IGNORED_LABEL, -1, positions[1:])


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel, rows: Iterable[Mapping[str, Sequence[int]]], num_buckets: int = NUM_SPANS
) -> list[dict[str, float]]:
    """The loss of rows by the place of the predicted tokens in their own documents.

    Args:
        model: evaluated as it stands, with the attention it has.
        rows: as for `row_losses`, all of one length N.
        num_buckets: equal spans of the places 0 to N - 1; those without a token are left out.

    Returns:
        One dict a span: "start", "end" (exclusive), "tokens" and "nll" in nats a token.
    """
    losses, places = (torch.cat(parts) for parts in zip(*(row_losses(model, row) for row in rows), strict=True))
    length = len(next(iter(rows))["input_ids"])
    spans = []
    for start, end in pairwise(np.linspace(0, length, min(num_buckets, length) + 1).astype(int).tolist()):
        chosen = losses[(places >= start) & (places < end)]
        if len(chosen):
            spans.append({"start": start, "end": end, "tokens": len(chosen), "nll": chosen.double().mean().item()})
    return spans


@torch.no_grad()
def compare_perplexity(
    model: PreTrainedModel,
    documents: Sequence[dict[str, Any]],
    *,
    tokenizer: Any = None,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    dense_attention: Block | None = None,
) -> dict[str, Any]:
    """Evaluate the same weights with dense and sparse attention over the same documents.

    Args:
        model: what `load_sparse_model` returns; it is left with sparse attention.
        documents: dicts with "name" and "input_ids", all of one length N >= 2.
        tokenizer: shows the worst tokens in their text; None leaves the text out.
        progress: wraps the iteration over the forwards (two a document), to show how far it is.
        dense_attention: a block in which the model's attention is dense; None: that of `dense_side`.

    Returns:
        A JSON-ready dict: "context_length" (N), "tokens" (predicted ones, N - 1 a document), "dense" and "sparse"
        ("perplexity", "nll" in nats a token, "seconds" of all forwards without the logits, which take both sides as
        long; of the sparse side "density" and "scored_density": attended and scored over admissible pairs; counting is
        part of the sparse seconds), "perplexity_ratio" (sparse over dense), "delta_nll" (sparse minus dense per token,
        see `paired_difference`), "kl" (dense to sparse) and "top1_agreement" (see `divergence.summarize`),
        "by_position" (equal spans of positions), "documents", the name of the "worst_document", and the
        "worst_tokens" (see `divergence.worst_tokens`).

    Raises:
        ValueError: a loss is not finite.
    """
    rows = [torch.tensor([document["input_ids"]], device=input_device(model)) for document in documents]

    model.set_attn_implementation(SPARSE)
    read_densely = dense_attention or dense_side(model, documents[0]["input_ids"])
    pairs: list[Predictions] = []
    found: dict[str, Any] = {}
    seconds = {DENSE: 0.0, SPARSE: 0.0}
    density = DensityRecorder()
    # Whoever goes first on a document pays for cold caches: they take turns.
    turns = [(DENSE, SPARSE), (SPARSE, DENSE)]
    for index, implementation in progress([(i, turn) for i in range(len(rows)) for turn in turns[i % 2]]):
        with record(model, density) if implementation == SPARSE else read_densely(model):
            started = time.perf_counter()
            found[implementation] = hidden_states_and_head(model, input_ids=rows[index], use_cache=False)
            found[implementation][0][0, -1, 0].item()  # wait for the device, so that the time is all of it
            seconds[implementation] += time.perf_counter() - started
        if len(found) == 2:
            pair = compare_predictions(found.pop(DENSE), found.pop(SPARSE), rows[index][0, 1:])
            for name, losses in ((DENSE, pair.dense), (SPARSE, pair.sparse)):
                if not losses.isfinite().all():
                    document = documents[index]["name"]
                    raise ValueError(f"the loss of document {document!r} is not finite with {name} attention")
            pairs.append(pair)

    predictions = joined(pairs)
    dense, sparse, kl = predictions.dense.double(), predictions.sparse.double(), predictions.kl.double()
    by_document = [
        {
            "name": document["name"],
            "tokens": dense.shape[1],
            "dense_nll": dense[index].mean().item(),
            "sparse_nll": sparse[index].mean().item(),
            "perplexity_ratio": _ratio(dense[index], sparse[index]),
            "kl": kl[index].mean().item(),
        }
        for index, document in enumerate(documents)
    ]
    return {
        "context_length": rows[0].shape[1],
        "tokens": dense.numel(),
        "dense": _summary(dense, seconds[DENSE]),
        "sparse": _summary(sparse, seconds[SPARSE])
        | {"density": density.density, "scored_density": density.scored_density},
        "perplexity_ratio": _ratio(dense, sparse),
        "delta_nll": paired_difference(sparse - dense),
        **summarize(predictions),
        "by_position": _by_position(dense, sparse, kl),
        "documents": by_document,
        "worst_document": max(by_document, key=lambda document: document["perplexity_ratio"])["name"],
        "worst_tokens": worst_tokens(predictions, documents, tokenizer),
    }


def paired_difference(difference: torch.Tensor) -> dict[str, Any]:
    """Mean of a per-token difference and its 95% confidence interval, by a bootstrap over documents and passages.

    Documents are drawn with replacement, and in each of them blocks of 256 successive tokens (shorter in short
    documents), because neighbouring tokens are correlated; 10 000 times with a fixed seed (the two-stage bootstrap of
    Davison and Hinkley 1997, section 3.8). Two or three documents say little about others, whatever the interval: look
    at each.

    Args:
        difference: [documents, tokens].

    Returns:
        {"mean": float, "ci95": [low, high], "method": what was drawn}
    """
    num_documents, num_tokens = difference.shape
    length = max(1, min(BLOCK_LENGTH, num_tokens // 8))
    blocks = difference.split(length, dim=1)
    sums = torch.stack([block.sum(dim=1) for block in blocks], 1).numpy()  # [documents, blocks]
    sizes = np.array([block.shape[1] for block in blocks])
    generator = np.random.default_rng(0)
    documents = generator.integers(num_documents, size=(NUM_RESAMPLES, num_documents))
    total, tokens = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for drawn in documents.T:
        passages = generator.integers(len(blocks), size=(NUM_RESAMPLES, len(blocks)))
        total += sums[drawn[:, None], passages].sum(axis=1)
        tokens += sizes[passages].sum(axis=1)
    low, high = np.quantile(total / tokens, [0.025, 0.975])
    return {
        "mean": difference.mean().item(),
        "ci95": [float(low), float(high)],
        "method": f"bootstrap over {num_documents} documents and, in each, {len(blocks)} blocks of {length} tokens",
    }


def _summary(nll: torch.Tensor, seconds: float) -> dict[str, float]:
    mean = nll.mean().item()
    return {"perplexity": math.exp(mean), "nll": mean, "seconds": seconds}


def _ratio(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    return math.exp((sparse - dense).mean().item())


def _by_position(dense: torch.Tensor, sparse: torch.Tensor, kl: torch.Tensor) -> list[dict[str, float]]:
    """Equal spans [start, end) of the positions of predicted tokens."""
    num_tokens = dense.shape[1]
    bounds = np.linspace(0, num_tokens, min(NUM_SPANS, num_tokens) + 1).astype(int).tolist()
    return [
        {
            "start": start + 1,
            "end": end + 1,
            "dense_nll": dense[:, start:end].mean().item(),
            "sparse_nll": sparse[:, start:end].mean().item(),
            "ratio": _ratio(dense[:, start:end], sparse[:, start:end]),
            "kl": kl[:, start:end].mean().item(),
        }
        for start, end in pairwise(bounds)
    ]
