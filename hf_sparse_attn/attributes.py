"""Attributes and modes of objects that others made, replaced for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def replaced_attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object; afterwards the object's own is put back, or removed if its class has it alone."""
    absent = object()
    original = vars(target).get(name, absent)
    setattr(target, name, value)
    try:
        yield
    finally:
        if original is absent:
            delattr(target, name)
        else:
            setattr(target, name, original)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without checkpointing of layers; afterwards those parts train again that did before."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
