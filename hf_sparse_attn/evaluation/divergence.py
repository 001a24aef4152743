"""How far the sparse predictions of single tokens are from the dense ones.

The divergence sees what a mean of losses hides: where the sparse attention takes from one word and gives to another, or
fails on few tokens that few words depend on. Logits exist for a few rows at a time, of both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.logits import Head
from hf_sparse_attn.pictures.readable_tokens import readable_tokens

NUM_WORST = 10
_CONTEXT = 40  # tokens before one that is shown
_LONGEST_CHARACTER = 8  # tokens after it, which may hold the rest of its character


@dataclass(frozen=True)
class Predictions:
    """Dense and sparse predictions of the same T tokens; on the CPU.

    Args:
        dense, sparse: [..., T] float32, the negative log-likelihood of each token in nats.
        kl: [..., T] float32, KL(dense || sparse) of the distributions that predict it, in nats.
        agrees: [..., T] bool, whether both give the largest probability to the same token.
    """

    dense: Tensor
    sparse: Tensor
    kl: Tensor
    agrees: Tensor


def joined(documents: Iterable[Predictions]) -> Predictions:
    """Those of documents of one length T: [documents, T] each."""
    found = list(documents)
    return Predictions(*(torch.stack([getattr(each, field.name) for each in found]) for field in fields(Predictions)))


def compare_predictions(dense: tuple[Tensor, Head], sparse: tuple[Tensor, Head], targets: Tensor) -> Predictions:
    """What both sides say of T tokens, from float32 logits.

    Args:
        dense, sparse: what `hidden_states_and_head` returned for a document [1, T + 1].
        targets: [T] int64, its tokens after the first.
    """
    sides = [(hidden[0, -len(targets) - 1 : -1], head) for hidden, head in (dense, sparse)]
    found = []
    # Twice as many logits at once as of one side, and more is computed with them: half as many rows.
    size = max(1, dense[1].chunk_size // 2)
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        logs = [head(hidden[chunk]).float().log_softmax(-1) for hidden, head in sides]
        losses = [-log.gather(-1, targets[chunk, None].to(log.device))[:, 0] for log in logs]
        agrees = logs[0].argmax(-1) == logs[1].to(logs[0].device).argmax(-1)
        found.append([part.cpu() for part in (*losses, divergence(*logs), agrees)])
    return Predictions(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) of rows of log-probabilities [R, V], in nats, [R].

    The sum of q - p - p log(q / p), which is the divergence as p and q each sum to 1. No term is negative, so that a
    divergence far below the rounding of the log-probabilities keeps its digits.
    """
    p, change = expected.exp(), found - expected
    terms = found.exp() - p - (p * change).masked_fill_(p == 0, 0)
    # Near 0 these three cancel each other.
    return torch.where(change.abs() < 0.5, p * (change.expm1() - change), terms).sum(-1)


def summarize(predictions: Predictions) -> dict[str, Any]:
    """JSON-ready: "kl" (nats a token: "mean", "median", "p99" and "p99.9", the percentiles) and "top1_agreement", the
    share of tokens for which both sides expect the same one most."""
    kl = predictions.kl.double().flatten().numpy()
    median, high, highest = np.quantile(kl, [0.5, 0.99, 0.999]).tolist()
    return {
        "kl": {"mean": kl.mean().item(), "median": median, "p99": high, "p99.9": highest},
        "top1_agreement": predictions.agrees.double().mean().item(),
    }


def worst_tokens(
    predictions: Predictions, documents: Sequence[Mapping[str, Any]], tokenizer: Any = None, count: int = NUM_WORST
) -> list[dict[str, Any]]:
    """The tokens whose log-probability falls most from dense to sparse, the worst first.

    Args:
        predictions: [documents, N - 1] each, of the tokens after the first.
        documents: dicts with "name" and "input_ids".
        tokenizer: of Transformers, for the text; None leaves it out.
        count: how many there are at most.

    Returns:
        JSON-ready dicts: "document", "position", "dense_logprob", "sparse_logprob", "kl", and with a tokenizer
        "before" (the text of up to 40 tokens before it) and "token".
    """
    lost = (predictions.sparse - predictions.dense).flatten()
    found = []
    for index in lost.topk(min(count, len(lost))).indices.tolist():
        place = divmod(index, predictions.dense.shape[-1])
        document, position = documents[place[0]], place[1] + 1
        token = {
            "document": document["name"],
            "position": position,
            "dense_logprob": -predictions.dense[place].item(),
            "sparse_logprob": -predictions.sparse[place].item(),
            "kl": predictions.kl[place].item(),
        }
        if tokenizer is not None:
            before, text = _in_context(tokenizer, document["input_ids"], position)
            token |= {"before": before, "token": text}
        found.append(token)
    return found


def _in_context(tokenizer: Any, input_ids: Sequence[int], position: int) -> tuple[str, str]:
    """The text before a token, and its own."""
    start = max(0, position - _CONTEXT)
    shown = readable_tokens(tokenizer, input_ids[start : position + _LONGEST_CHARACTER])
    own = shown[position - start]
    # A later part of a character stands in an earlier token's text.
    text = tokenizer.decode([input_ids[position]]) if own.is_continued else own.text
    return "".join(token.text for token in shown[: position - start]), text
