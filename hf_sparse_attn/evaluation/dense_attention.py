"""The dense side of a comparison: SDPA, or rows that read everything where they are seen to give the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn import ops
from hf_sparse_attn.integration import reading_everything
from hf_sparse_attn.tracing import input_device

DENSE, SPARSE = "dense", "sparse"
Block = Callable[[PreTrainedModel], AbstractContextManager[None]]

_CHECKED_TOKENS = 1024
_TOLERANCE = 1e-3  # of the hidden states, relative to their norm: rounding leaves some 1e-6 in float32
# Of single tokens, the median: rounding leaves some 1e-2 in bfloat16, and sends a few tokens to other experts.
_TOLERANCE_OF_HALVES = 5e-2

logger = logging.getLogger(__name__)


def dense_implementation(model: PreTrainedModel) -> str:
    """The attention that Transformers gives a model by itself: "sdpa", or "eager" where it has no SDPA for it, as for
    those with a softcap or sinks."""
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


@contextmanager
def by_transformers(model: PreTrainedModel) -> Iterator[None]:
    """In this block the model, which has sparse attention before and after, has that of `dense_implementation`."""
    model.set_attn_implementation(dense_implementation(model))
    try:
        yield
    finally:
        model.set_attn_implementation(SPARSE)


def dense_side(model: PreTrainedModel, tokens: Sequence[int], *, fast: bool = False) -> Block:
    """A block in which a model is dense: `by_transformers`, or `reading_everything`.

    The latter is of linear memory where Transformers' is eager, and so taken for models without SDPA; with `fast` also
    for float32 models on CPUs with compiled loops, in half of SDPA's time for long text. Only where both give the same
    hidden states of the first 1024 tokens; a warning tells if they do not.

    Args:
        model: with sparse attention; left as it was.
        tokens: of a document that will be compared.
    """
    device, by_name = input_device(model), dense_implementation(model)
    is_fast = device.type == "cpu" and model.dtype == torch.float32 and ops.computes_dense_rows("auto", device)
    if by_name == "sdpa" and not (fast and is_fast):
        return by_transformers
    row = torch.tensor([tokens[:_CHECKED_TOKENS]], device=device)
    expected, found = (_last_hidden_states(model, row, block) for block in (by_transformers, reading_everything))
    if model.dtype in (torch.float32, torch.float64):
        difference, tolerance = (found - expected).norm() / expected.norm(), _TOLERANCE
    else:
        of_tokens = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        difference, tolerance = of_tokens.median(), _TOLERANCE_OF_HALVES
    if difference < tolerance:
        return reading_everything
    if expected.isfinite().all():
        logger.warning(
            "rows that read everything differ from those of %s attention by %.1e of their norm, which may be a fault "
            "of hf_sparse_attn: please report it. The dense side of the evaluation is that of %s attention",
            *(by_name, difference.item(), by_name),
        )
    return by_transformers


@torch.no_grad()
def _last_hidden_states(model: PreTrainedModel, row: Tensor, block: Block) -> Tensor:
    with block(model):
        hidden: Tensor = model.base_model(input_ids=row, use_cache=False)[0]
    return hidden.float()
