"""What a Hub kernel of this package offers; `scripts/build_hub_kernel.py` makes this module the kernel's `__init__`.

With `attn_implementation="ORG/hf-sparse-attn"` Transformers imports the kernel under a name that no other module has,
finds `flash_attn_forward` beside `supports_flash_attn`, and registers it under the implementation's name, with the mask
function of "sdpa". Importing this registers nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.cache import SparseCache, SparseStaticCache
from hf_sparse_attn.cache.policies import (
    AdaptiveBudget,
    HeavyHitters,
    KeyNorm,
    Recency,
    Recent,
    Sinks,
    UniformBudget,
)
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.global_tokens import mark_global_tokens
from hf_sparse_attn.integration import (
    check_model,
    configure,
    packed_documents,
    record_density,
    sparse_attention_forward,
)
from hf_sparse_attn.masks.mask_4d import admitted_pairs
from hf_sparse_attn.masks.mask_function import signed_positions
from hf_sparse_attn.tensor_parallel import split_heads
from hf_sparse_attn.tracing import is_traced

__all__ = [
    "AdaptiveBudget",
    "HeavyHitters",
    "KeyNorm",
    "Recency",
    "Recent",
    "Sinks",
    "SparseAttentionConfig",
    "SparseCache",
    "SparseStaticCache",
    "UniformBudget",
    "check_model",
    "configure",
    "flash_attn_forward",
    "mark_global_tokens",
    "record_density",
    "split_heads",
    "supports_flash_attn",
]


def supports_flash_attn() -> bool:
    """True: by this name Transformers knows that `flash_attn_forward` is an attention function as it calls them."""
    return True


def flash_attn_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`integration.sparse_attention_forward`, whose mask function takes the place of SDPA's at the first call.

    That call, and calls that are traced before there was one, read the mask that Transformers made for SDPA.

    Args, Returns:
        as `sparse_attention_forward`.

    Raises:
        ValueError: as `sparse_attention_forward`, or for a first call whose mask leaves something out.
    """
    if not is_traced(query):
        _register_mask_function(getattr(module.config, "_attn_implementation", ""))
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        _refuse_what_is_left_out(module, query, key, attention_mask, **kwargs)
    return sparse_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _refuse_what_is_left_out(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor, position_ids: Tensor | None = None, **others: Any
) -> None:
    """Some families make masks for SDPA that do not tell packed documents apart, as this package does."""
    documents = packed_documents(module, position_ids, query, key)
    if documents is None or others.get("cu_seq_lens_q") is not None or others.get("seq_idx") is not None:
        return
    starts = documents[:, 1:] != documents[:, :-1]
    admitted = admitted_pairs(mask)[:, 0]
    itself, before = admitted.diagonal(0, 1, 2)[:, 1:], admitted.diagonal(-1, 1, 2)  # padding does not read itself
    if is_traced(query) or bool((starts & itself & before).any()):
        raise ValueError(
            f"the first call of a Hub kernel in {getattr(module.config, 'model_type', '')} must be neither traced nor "
            "of packed documents, which its mask does not tell apart yet; call the model once on a single document"
        )


def _register_mask_function(implementation: str) -> None:
    """Have Transformers describe masks for `flash_attn_forward` in one small tensor, from the next forward on."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    is_own = ALL_ATTENTION_FUNCTIONS.get(implementation) is flash_attn_forward
    if is_own and ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is not signed_positions:
        AttentionMaskInterface.register(implementation, signed_positions)
