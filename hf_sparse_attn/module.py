"""`SparseAttention`: the attention as a layer of any PyTorch model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.errors import ArgumentError, argument, check_integer
from hf_sparse_attn.operation import (
    SparseIndex,
    apply_index,
    build_index,
    check_config,
    check_dropout,
    in_mode,
    sparse_attention,
)
from hf_sparse_attn.pattern_fields import check_causal
from hf_sparse_attn.statistics import AttentionStatistics

_SEEDS = 2**62


class SparseAttention(nn.Module):
    """Multi-head attention with projections, whose rows read a window, global keys and routed keys.

    Queries come from `x`, keys and values from `context` or `x` itself. Linear layers `q_proj`, `k_proj`, `v_proj` and
    `o_proj` are named as in Transformers' models. There is no positional encoding: add one to `x`.

    Args:
        hidden_size: width of x, context and the output.
        num_heads: query heads.
        num_key_value_heads: a divisor of num_heads; num_heads if None (MHA), 1 for MQA, between for GQA.
        head_dim: hidden_size / num_heads if None.
        config: which keys each row reads; None: the defaults. Rows at positions under its `dense_below` (2048) read
            everything.
        bias: of all four projections.
        dropout: probability with which each attention weight is dropped while training; at least 0 and under 1.
        is_causal: whether rows see no later keys. False: they read on both sides, and keys of a `context` are those of
            another document, of any length (cross-attention).
        layer_idx: layer whose budget and hash apply; layers of different numbers hash differently.
        mode: "routed" (the config as it is), "all", "local" or "strided"; see `operation.in_mode`.
        device, dtype: of the weights.
        fields: single fields of `SparseAttentionConfig`, in place of those of `config`, or a `preset` of `presets.py`.

    Raises:
        ArgumentError: for a value that an argument cannot have, a ValueError that names it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        *,
        config: SparseAttentionConfig | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        is_causal: bool = True,
        layer_idx: int = 0,
        mode: str = "routed",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_key_value_heads": num_key_value_heads}
        for name, size in sizes.items():
            check_integer(name, size, 1)
        if num_heads % num_key_value_heads:
            raise ArgumentError(
                "num_key_value_heads", f"must divide the {num_heads} query heads, got {num_key_value_heads}"
            )
        if head_dim is None and hidden_size % num_heads:
            raise ArgumentError(
                "num_heads", f"must divide hidden_size, or give head_dim; got {num_heads} and {hidden_size}"
            )
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        check_integer("head_dim", head_dim, 1)
        check_integer("layer_idx", layer_idx, 0)
        check_dropout(dropout)
        if config is not None and not isinstance(config, SparseAttentionConfig):
            raise ArgumentError("config", f"must be a SparseAttentionConfig or None, got {type(config).__name__}")
        with argument("config"):
            config = (config or SparseAttentionConfig()).with_fields(fields)
            config.check_heads(layer_idx, num_heads, num_key_value_heads)
            check_config(config)
            if not is_causal:
                check_causal(config)
        self.hidden_size, self.num_heads, self.num_key_value_heads = hidden_size, num_heads, num_key_value_heads
        self.head_dim, self.dropout, self.is_causal = head_dim, dropout, is_causal
        self.config, self.layer_idx = in_mode(config, mode), layer_idx
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, **like)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, **like)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, **like)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, **like)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        dropout_seed: int | None = None,
        index: SparseIndex | None = None,
        return_index: bool = False,
        need_statistics: bool = False,
    ) -> Any:
        """Attend from `x` to `context`.

        Args:
            x: [batch, Q, hidden_size].
            context: [batch, N, hidden_size], what keys and values are made of; None: x. Under `is_causal` it is a
                document whose last Q tokens are those of x, else another document.
            key_padding_mask, attention_mask: [batch, N] and [batch, Q, N], bool; see `sparse_attention`.
            dropout_seed: says which weights are dropped while training. None: a number from PyTorch's own generator,
                which `torch.manual_seed` sets and `torch.utils.checkpoint` restores for a recompute; with
                `preserve_rng_state=False`, give a number.
            index: keys that were chosen before, here or in another layer, with the masks that they were chosen with.
            return_index: return the chosen keys as well.
            need_statistics: return what was read as well.

        Returns:
            [batch, Q, hidden_size]; with `need_statistics` or `return_index` a tuple of it, `AttentionStatistics` if
            asked for, and a `SparseIndex` if asked for.

        Raises:
            ArgumentError: for tensors of other shapes and masks of another kind.
            ValueError: as `sparse_attention`.
        """
        is_cross = context is not None and not self.is_causal
        context = x if context is None else context
        for name, tensor in (("x", x), ("context", context)):
            if tensor.ndim != 3 or tensor.shape[-1] != self.hidden_size:
                raise ArgumentError(
                    name, f"must be [batch, tokens, {self.hidden_size}], got shape {tuple(tensor.shape)}"
                )
        if index is not None and (key_padding_mask is not None or attention_mask is not None):
            raise ArgumentError("index", "has the masks that it was built with; give none beside it")
        query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        key, value = (
            proj(context).unflatten(-1, (self.num_key_value_heads, self.head_dim)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        chosen: dict[str, Any] = {"config": self.config, "layer_idx": self.layer_idx}
        chosen |= {"is_causal": self.is_causal, "cross_attention": is_cross}
        masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attention_mask": attention_mask}
        statistics = AttentionStatistics() if need_statistics else None
        others: dict[str, Any] = {"recorder": statistics}
        if self.training and self.dropout:
            others["dropout"] = self.dropout
            others["dropout_seed"] = _drawn_seed() if dropout_seed is None else dropout_seed
        if return_index and index is None:
            index = build_index(query, key, **chosen, **masks)
        if index is None:
            output = sparse_attention(query, key, value, **chosen, **masks, **others)
        else:
            output = apply_index(query, key, value, index, **others)
        output = self.o_proj(output.transpose(1, 2).flatten(2))
        extras = [statistics] * need_statistics + [index] * return_index
        return (output, *extras) if extras else output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}, dropout={self.dropout}"


def _drawn_seed() -> int:
    return int(torch.randint(_SEEDS, ()).item())
