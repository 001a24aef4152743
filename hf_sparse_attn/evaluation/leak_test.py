"""Whether a causal model's logits know of later tokens: one token is changed, and no earlier logit may move.

A model that leaks has a loss that means nothing, and mostly one that looks better than it is. Two copies of a document
are read as one batch, and then again with a token of the second copy changed. The second copy shows what leaks; the
first, whose input is the same both times, what moves without any leak: by operations whose order is not fixed, and by
shapes that depend on what is in a batch, as those of a mixture of experts do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.errors import RunError
from hf_sparse_attn.logits import Head, hidden_states_and_head
from hf_sparse_attn.tracing import input_device

NOISE_FACTOR = 4  # noise of another forward is not more than what was measured of one by more than this


def places(num_tokens: int, count: int) -> list[int]:
    """Positions at equal distances, the last one that of the last token.

    Raises:
        ValueError: there are not that many; the first token has none before it.
    """
    if not 1 <= count <= num_tokens // 2:
        raise ValueError(f"must be from 1 to {num_tokens // 2}, half of the tokens, got {count}")
    return [(i + 1) * num_tokens // count - 1 for i in range(count)]


@torch.no_grad()
def find_leaks(
    model: PreTrainedModel,
    input_ids: Sequence[int],
    positions: Sequence[int] | None = None,
    *,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """Change one token of a document at a time, and compare the logits of all tokens before it.

    Args:
        model: a causal language model, with whatever attention it has.
        input_ids: N token ids, N >= 2.
        positions: of the tokens to change, each from 1 to N - 1; None changes the last one.
        progress: wraps the iteration over the positions, to show how far it is.

    Returns:
        A JSON-ready dict: "leaks" (bool), "largest_difference" of an earlier logit, the "tolerance" that it is held
        against (a few times the largest difference of the same input's logits, which is 0 where forwards repeat to the
        last bit), "earliest_moved" (the position of the first token whose logits moved by more, or None), "changes": of
        each position "position", "token" and "changed_to" (ids), "own_difference" (how far the logits of the changed
        token itself moved), "largest_difference", "moved" (how many tokens) and "earliest_moved", and
        "context_length" (N).

    Raises:
        ValueError: for a position that cannot be, logits that are not finite, and a change that moves nothing at all.
        RunError: the logits of the same input differ so much that a leak could not be seen.
    """
    document = torch.tensor(input_ids, device=input_device(model))
    positions = [len(document) - 1] if positions is None else positions
    for position in positions:
        if not 0 < position < len(document):
            raise ValueError(f"positions must be from 1 to {len(document) - 1}, got {position}")
    generator = torch.Generator().manual_seed(0)
    unchanged, noise = _Read(model, document, document), 0.0
    changes, differences = [], []
    for position in progress(positions):
        changed = document.clone()
        changed[position] = _another(document, position, generator, model)
        reread = _Read(model, document, changed)
        noise = max(noise, unchanged.differences(reread, copy=0, stop=len(document)).max().item())
        *earlier, own = unchanged.differences(reread, copy=1, stop=position + 1).tolist()
        if own == 0:
            raise ValueError(f"another token at position {position} does not even move its own logits")
        differences.append(earlier)
        changes.append(
            {
                "position": position,
                "token": int(document[position]),
                "changed_to": int(changed[position]),
                "own_difference": own,
                "largest_difference": max(earlier),
            }
        )
    if noise > unchanged.most_noise:
        raise RunError(
            f"logits of the same input differ by {noise:.3g} from forward to forward, too much to see a leak; try "
            "float32 or float64, or a CPU"
        )
    tolerance = NOISE_FACTOR * noise
    for change, earlier in zip(changes, differences, strict=True):
        moved = [position for position, difference in enumerate(earlier) if difference > tolerance]
        change |= {"moved": len(moved), "earliest_moved": moved[0] if moved else None}
    found = [change["earliest_moved"] for change in changes if change["moved"]]
    return {
        "leaks": bool(found),
        "largest_difference": max(change["largest_difference"] for change in changes),
        "tolerance": tolerance,
        "earliest_moved": min(found, default=None),
        "changes": changes,
        "context_length": len(document),
    }


class _Read:
    """A forward of two documents [N] as one batch, of which hidden states are kept and logits made a chunk at a time.

    Args:
        model: the causal language model.
        documents: both of one length.
    """

    def __init__(self, model: PreTrainedModel, *documents: Tensor) -> None:
        self.hidden: Tensor
        self.head: Head
        self.hidden, self.head = hidden_states_and_head(model, input_ids=torch.stack(documents), use_cache=False)
        self.most_noise = 0.0  # of logits whose rounding cannot hide a leak
        if not self.hidden.isfinite().all():
            raise ValueError("what the model computes is not finite")

    def differences(self, other: _Read, copy: int, stop: int) -> Tensor:
        """The largest difference of the logits of each token before `stop`, [stop] on the CPU."""
        found = []
        for start in range(0, stop, self.head.chunk_size):
            rows = slice(start, min(start + self.head.chunk_size, stop))
            ours, theirs = self.hidden[copy, rows], other.hidden[copy, rows]
            if torch.equal(ours, theirs):  # then so are the logits
                found.append(torch.zeros(len(ours)))
                continue
            logits, others = self.head(ours), other.head(theirs)
            noise = math.sqrt(torch.finfo(logits.dtype).eps) * logits[logits.isfinite()].abs().max().item()
            self.most_noise = max(self.most_noise, noise)
            difference = (logits - others).abs().masked_fill_(logits == others, 0).amax(-1)
            found.append(difference.nan_to_num(nan=torch.inf).float().cpu())
        return torch.cat(found)


def _another(document: Tensor, position: int, generator: torch.Generator, model: PreTrainedModel) -> int:
    """One of the document's other tokens, none of which stands for an image or the like; or the next id."""
    own = int(document[position])
    others = [token for token in document.unique().tolist() if token != own]
    if not others:
        return (own + 1) % len(next(model.get_input_embeddings().parameters()))
    return int(others[int(torch.randint(len(others), (), generator=generator))])
