"""The dense side of a comparison: SDPA, or the compiled loops of this package where they are seen to give the same."""

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

DENSE, SPARSE = "sdpa", "sparse"

_CHECKED_TOKENS = 1024
_TOLERANCE = 1e-3  # of the hidden states, relative to their norm: rounding leaves some 1e-6 in float32

logger = logging.getLogger(__name__)


@contextmanager
def by_sdpa(model: PreTrainedModel) -> Iterator[None]:
    """In this block the model, which has sparse attention before and after, has SDPA's."""
    model.set_attn_implementation(DENSE)
    try:
        yield
    finally:
        model.set_attn_implementation(SPARSE)


def fastest(model: PreTrainedModel, tokens: Sequence[int]) -> Callable[[PreTrainedModel], AbstractContextManager[None]]:
    """`reading_everything` for float32 models on CPUs with compiled loops, half of SDPA's time for long text; else
    `by_sdpa`.

    Only where both give the same hidden states of the first 1024 tokens; a warning tells if they do not.

    Args:
        model: with sparse attention; left as it was.
        tokens: of a document that will be compared.
    """
    device = input_device(model)
    if device.type != "cpu" or model.dtype != torch.float32 or not ops.computes_dense_rows("auto", device):
        return by_sdpa
    row = torch.tensor([tokens[:_CHECKED_TOKENS]], device=device)
    expected, found = (_last_hidden_states(model, row, block) for block in (by_sdpa, reading_everything))
    difference = ((found - expected).norm() / expected.norm()).item()
    if difference < _TOLERANCE:
        return reading_everything
    if not expected.isfinite().all():
        return by_sdpa
    logger.warning(
        "rows that read everything differ from SDPA's by %.1e of their norm, which may be a fault of hf_sparse_attn: "
        "please report it. The dense side of the evaluation is SDPA's",
        difference,
    )
    return by_sdpa


@torch.no_grad()
def _last_hidden_states(
    model: PreTrainedModel, row: Tensor, block: Callable[[PreTrainedModel], AbstractContextManager[None]]
) -> Tensor:
    with block(model):
        hidden: Tensor = model.base_model(input_ids=row, use_cache=False)[0]
    return hidden
