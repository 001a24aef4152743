"""Where the weights of a model that is converted lie, and whether there is room for the work on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.calibration.calibrate import GRADIENT_TOKENS
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.memory import LIBRARIES, ModelSize, available_memory, conversion_memory
from hf_sparse_attn.offloading import placement

logger = logging.getLogger(__name__)


def place_weights(
    size: ModelSize,
    base: SparseAttentionConfig,
    num_tokens: int,
    device: torch.device,
    folder: Path | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Tell how much memory a conversion takes, and log a warning if that is more than there is.

    Args:
        size: of the model.
        base: what is not fitted.
        num_tokens: of a document.
        device: what computes.
        folder: for offloaded weights; None offloads none.
        tell: called with the line.

    Returns:
        The arguments of `from_pretrained` that say where weights go.
    """
    free = available_memory(device)
    needs = conversion_memory(size, base, num_tokens, GRADIENT_TOKENS, on_cpu=device.type == "cpu")
    needed = needs.peak if folder is None else needs.offloaded_peak
    offloaded = "" if folder is None else f", at least {needed / 1e9:.1f} GB where weights are offloaded"
    there = "" if free is None else f"; {free / 1e9:.1f} GB are free"
    tell(f"estimated peak memory: {needs}{offloaded}{there}")
    if free is not None and needed > free:
        other = "--offload, " if folder is None else ""
        told = f"{other}--dtype bfloat16 or a smaller --context-length takes less"
        logger.warning("the estimate is more than the memory that is free on %s: %s", device, told)
    return {} if folder is None else placement(device, folder, needs.offloaded_peak, LIBRARIES + needs.kept)
