"""Which of a model's heads this process holds, where tensor parallelism splits them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_sparse_attn.config import layer_shape, text_config

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class HeadSplit:
    """Part `rank` of `size` equal parts of a layer's heads: query heads with the KV heads that they share."""

    rank: int = 0
    size: int = 1


def head_split(module: nn.Module, num_heads: int, num_kv_heads: int) -> HeadSplit:
    """How tensor parallelism splits the heads of an attention layer.

    The head counts say whether the heads are split at all (a sharded projection may gather its output again), the
    layer's weights say which part is this process's.

    Args:
        module: the attention layer, inside its forward (under FSDP its weights are whole only there).
        num_heads, num_kv_heads: heads of the query and the key that the layer passed on.

    Raises:
        ValueError: for parts that are not equal, or that part query heads from their own KV heads or from others of
            the same group (keys are found once for the whole group).
    """
    total = getattr(module.config, "num_attention_heads", num_heads)
    if num_heads == total or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return HeadSplit()
    part = _part(module)
    if part is None:  # a model whose layers differ in their heads
        return HeadSplit()
    rank, size = part
    if num_heads * size != total:
        raise _refused(f"one of {size} processes got {num_heads} of {total} query heads")
    group = getattr(module, "num_key_value_groups", num_heads // num_kv_heads)
    if num_heads == group * num_kv_heads:
        return HeadSplit(rank, size)
    raise _refused(
        f"one of {size} processes got {num_heads} of {total} query heads and {num_kv_heads} KV heads, which serve "
        f"{group * num_kv_heads} of them"
    )


def _part(module: nn.Module) -> tuple[int, int] | None:
    """Rank and number of the processes that the layer's weights are split over; None: they are not."""
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            for dim, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    return parameter.device_mesh.get_local_rank(dim), parameter.device_mesh.size(dim)
    for child in module.modules():  # Transformers' own plain tensors, before it went over to DTensors
        mesh = child.__dict__.get("_hf_device_mesh")
        if mesh is not None:
            return mesh.get_local_rank(), mesh.size()
    return None


def refuse_parted_kv_heads(config: Any) -> None:
    """Refuse a tensor-parallel plan that cuts through KV heads, which would end in an error of `view`.

    Raises:
        ValueError: if the plan splits the key projection over a number of processes that does not divide its heads.
    """
    distributed: Any = getattr(config, "distributed_config", None)
    tp_size = getattr(distributed, "tp_size", None) or 1
    if tp_size == 1:
        return
    shapes = [layer_shape(config, layer) for layer in range(text_config(config).num_hidden_layers)]
    parted = [shape[1] for shape in shapes if shape is not None and shape[1] % tp_size]
    if not parted:
        return
    changed = distributed.tp_plan if isinstance(distributed.tp_plan, dict) else {}
    plan = {**(config.base_model_tp_plan or {}), **changed}
    styles = {name.rsplit(".", 1)[-1]: style for name, style in plan.items()}
    if any(styles.get(name) == "colwise" for name in _KEY_PROJECTIONS):
        raise _refused(f"tp_size={tp_size} does not divide num_key_value_heads={parted[0]}")


def _refused(what: str) -> ValueError:
    return ValueError(f'attn_implementation="sparse" cannot split heads over processes like this: {what}')
