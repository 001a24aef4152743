"""Which of a layer's heads this process holds, where tensor or sequence parallelism splits them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_sparse_attn.config import layer_shape, text_config
from hf_sparse_attn.side_channels import PART

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class HeadSplit:
    """Part `rank` of `size` equal parts of a layer's heads: query heads with the KV heads that they share.

    by_sequence: a process has its part of the tokens everywhere else, and all of them for these heads alone.
    """

    rank: int = 0
    size: int = 1
    by_sequence: bool = False


def split_heads(model: nn.Module, rank: int, size: int) -> None:
    """Say which heads a sequence parallelism of your own gives to this process, wherever it gives only a part of them.

    Ulysses, as DeepSpeed has it, needs no such word. Another exchange (all tokens of part `rank` of the query heads and
    of their KV heads, around the attention function) does: the weights are whole, so nothing else tells which part it
    is. The attention function must be given the position_ids of all tokens, which show where packed documents start.

    Args:
        model: its attention layers are told; a call with all of a layer's heads is not affected.
        rank, size: part `rank` of `size` equal parts, such as the process's rank in the group and the group's size.

    Raises:
        ValueError: not 0 <= rank < size.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank must be at least 0 and under size={size}, got {rank}")
    for module in model.modules():
        module.__dict__[PART] = rank, size


def head_split(module: nn.Module, num_heads: int, num_kv_heads: int) -> HeadSplit:
    """How tensor or sequence parallelism splits the heads of an attention layer.

    The head counts say whether the heads are split at all (a sharded projection may gather its output again, sequence
    parallelism may rest during evaluation). Which part is this process's is said by the layer's weights, by
    `split_heads` or by DeepSpeed.

    Args:
        module: the attention layer, inside its forward (under FSDP its weights are whole only there).
        num_heads, num_kv_heads: heads of the query and the key that the layer passed on.

    Raises:
        ValueError: for parts that are not equal, or that part query heads from their own KV heads or from others of
            the same group (keys are found once for the whole group), or that nobody tells apart.
    """
    if num_heads == getattr(module.config, "num_attention_heads", num_heads):
        return HeadSplit()
    shape = layer_shape(module.config, int(getattr(module, "layer_idx", None) or 0))
    if shape is None or num_heads == shape[0] or not _several_processes(module):
        return HeadSplit()
    total, total_kv, head_dim = shape
    by_weights = _part(module)
    part = by_weights or module.__dict__.get(PART) or _part_of_deepspeed()
    if part is None:
        if num_heads > total or _projects(module, num_heads * head_dim):  # a model whose layers differ in their heads
            return HeadSplit()
        raise _refused(
            f"{num_heads} of {total} query heads came, and nothing says which; hf_sparse_attn.split_heads(model, rank, "
            "size) does"
        )
    rank, size = part
    if num_heads * size != total:
        raise _refused(f"one of {size} processes got {num_heads} of {total} query heads")
    if num_kv_heads * size == total_kv:
        return HeadSplit(rank, size, by_weights is None)
    served = total // total_kv * num_kv_heads
    raise _refused(
        f"one of {size} processes got {num_heads} of {total} query heads and {num_kv_heads} KV heads, which serve "
        f"{served} of them; the number of processes must divide num_key_value_heads={total_kv}"
    )


def _several_processes(module: nn.Module) -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (distributed and torch.distributed.get_world_size() > 1) or PART in module.__dict__


def _projects(module: nn.Module, features: int) -> bool:
    """Whether the layer's own projection gives so many features, so that none of its query heads is elsewhere."""
    return getattr(getattr(module, "q_proj", None), "out_features", None) == features


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _part_of_deepspeed() -> tuple[int, int] | None:
    """Rank and size of DeepSpeed's group of sequence parallelism; None: it has none.

    Ulysses makes a group of its own, which an engine, once there is one, is given as well.
    """
    ulysses: Any = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if getattr(ulysses, "_SEQUENCE_PARALLEL_GROUP", None) is not None:
        return ulysses.get_sequence_parallel_rank(), ulysses.get_sequence_parallel_world_size()
    groups = sys.modules.get("deepspeed.utils.groups")
    size = 1 if groups is None else groups._get_sequence_parallel_world_size()
    return None if groups is None or size == 1 else (groups._get_sequence_parallel_rank(), size)


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
