"""Models that are larger than the memory: accelerate brings offloaded weights in for the forward of their module.

Between forwards such weights are parameters on the meta device, which have a shape alone, and every forward makes new
parameters of them.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import CDLL
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.memory import available_memory

_SHARD_SIZE = "500MB"  # of a file of weights: all of a file are in memory while it is written
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


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
    _return_freed_memory()
    room = {"cpu": available_memory(torch.device("cpu")), device.type: available_memory(device)}
    leave = {"cpu": host_work, device.type: work}
    index = {"cpu": "cpu", device.type: "cpu" if device.type == "cpu" else device.index or 0}
    max_memory = {index[kind]: max(0, free - leave[kind]) for kind, free in room.items() if free is not None}
    return {"device_map": "auto", "max_memory": max_memory, "offload_folder": str(folder)}


def _return_freed_memory() -> None:
    """Have what takes more than 1 MB returned to the system when it is freed.

    glibc otherwise keeps blocks of up to 32 MB, and with weights that come and go those grew to several times as much.
    """
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


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
            yield from module.named_parameters(path, recurse=False)


def save_pretrained(model: PreTrainedModel, directory: Path) -> None:
    """Write a model; if weights are offloaded, in several files, so that they are never in memory all at once."""
    if not is_offloaded(model):
        model.save_pretrained(directory)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(directory, max_shard_size=_SHARD_SIZE)
