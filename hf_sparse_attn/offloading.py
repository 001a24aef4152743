"""Models that are larger than the memory: accelerate brings offloaded weights in for the forward of their module.

Between forwards such weights are parameters on the meta device, which have a shape alone, and every forward makes new
parameters of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.memory import available_memory

SHARD_SIZE = "2GB"  # of a file of weights: all of a file are in memory while it is written


def check_accelerate() -> None:
    """Make sure that weights can be offloaded.

    Raises:
        ArgumentError: for "offload": accelerate is not installed.
    """
    if find_spec("accelerate") is None:
        raise ArgumentError("offload", "needs accelerate; pip install 'hf_sparse_attn[scripts]' brings it")


@contextmanager
def offload_folder(output: Path) -> Iterator[Path]:
    """Where weights go that cannot be read from the checkpoint's files: beside `output`; removed at the end."""
    folder = output.with_name(f".{output.name}.offload")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def placement(device: torch.device, folder: Path, work: int, host_work: int) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which the weights fill the device, then the CPU's memory, then the disk.

    Args:
        device: what computes.
        folder: of `offload_folder`.
        work: bytes to leave free on the device.
        host_work: bytes to leave free in the CPU's memory, if that is not the device.
    """
    room = {"cpu": available_memory(torch.device("cpu")), device.type: available_memory(device)}
    leave = {"cpu": host_work, device.type: work}
    index = {"cpu": "cpu", device.type: "cpu" if device.type == "cpu" else device.index or 0}
    max_memory = {index[kind]: max(0, free - leave[kind]) for kind, free in room.items() if free is not None}
    return {"device_map": "auto", "max_memory": max_memory, "offload_folder": str(folder)}


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of a model's weights are elsewhere between its forwards."""
    return any(parameter.is_meta for parameter in model.parameters())


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters with their values; those that are offloaded exist for one step of the iteration."""
    if not is_offloaded(model):
        yield from model.named_parameters()
        return
    from accelerate.utils import align_module_device

    for path, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(path, recurse=False):
                yield name, parameter
