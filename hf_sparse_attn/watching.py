"""Who watches a model's forwards: recorders, observers and choosers, each in one block of one thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple

from torch import nn

from hf_sparse_attn.side_channels import WATCHED


class Watch(NamedTuple):
    """One watcher of a model, which it keeps alive as long as the block lasts."""

    model: nn.Module
    modules: frozenset[int]  # ids of the model's modules
    watcher: Any


Watches = ContextVar[tuple[Watch, ...]]

RECORDERS: Watches = ContextVar("recorders", default=())
OBSERVERS: Watches = ContextVar("observers", default=())
CHOOSERS: Watches = ContextVar("choosers", default=())

_LOCK = Lock()
_BLOCKS: Counter[int] = Counter()  # how many blocks of all threads watch a module, by its id


@contextmanager
def watching(model: nn.Module, kind: Watches, watcher: Any) -> Iterator[None]:
    """`watcher` is one of `watchers` for the model's modules, in this block of this thread."""
    modules = list(model.modules())
    watch = Watch(model, frozenset(map(id, modules)), watcher)
    kind.set((*kind.get(), watch))
    with _LOCK:
        for module in modules:
            _BLOCKS[id(module)] += 1
            module.__dict__[WATCHED] = id(module)
    try:
        yield
    finally:
        kind.set(tuple(other for other in kind.get() if other is not watch))
        with _LOCK:
            for module in modules:
                _BLOCKS[id(module)] -= 1
                if not _BLOCKS[id(module)]:
                    del _BLOCKS[id(module)]
                    module.__dict__.pop(WATCHED, None)


def watchers(module: nn.Module | int, kind: Watches) -> list[Any]:
    """Those of a module, or of one that a graph knows by its id, the innermost block's last."""
    wanted = module if isinstance(module, int) else id(module)
    return [watch.watcher for watch in kind.get() if wanted in watch.modules]
