"""Threads for many small operations on a CPU.

PyTorch splits each operation over its threads and waits for all of them at its end. With operations of a tenth of a
millisecond that costs as much as it saves, and on a machine that is busy with something else every wait can last a
time slice. Here each thread computes whole pieces of work with operations of one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from ctypes import CDLL
from functools import cache, partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

LIBRARIES = CDLL(torch._C.__file__)  # and all that it is linked to
_SETTERS = [getattr(LIBRARIES, name, None) for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")]


def in_order(work: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map(work, items)` computed by `num_workers` threads, this one among them, with a few items per thread under way.

    While it runs, operations of PyTorch in these threads use one thread each; afterwards as many as before. Gradients
    are recorded in `work` if they are where this is called.
    """
    if num_workers <= 1:
        yield from map(work, items)
        return
    grad_enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def isolated(item: Item) -> Result:
        # These modes belong to a thread.
        with torch.inference_mode(inference), torch.set_grad_enabled(grad_enabled):
            return work(item)

    pending: deque[Future[Result]] = deque()
    num_threads = torch.get_num_threads()
    _set_num_threads(1)
    try:
        for item in items:
            if sum(not future.done() for future in pending) < 2 * (num_workers - 1):
                pending.append(_start(partial(isolated, item), num_workers - 1))
            else:
                pending.append(_done(partial(work, item)))
            while pending and (pending[0].done() or len(pending) > 4 * num_workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:  # there are some after an error, and nobody may write to their tensors any more
            future.cancel()
        wait(pending)
        _set_num_threads(num_threads)


def _start(work: Callable[[], Result], num_workers: int) -> Future[Result]:
    """`work` in one of `num_workers` threads, or here if no thread begins any more as the interpreter shuts down."""
    try:
        return _pool(num_workers).submit(work)
    except RuntimeError:
        return _done(work)


def _done(work: Callable[[], Result]) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(work())
    return future


def _set_num_threads(num_threads: int) -> None:
    """`torch.set_num_threads` for this thread alone; that one reaches threads that have not used PyTorch yet, too."""
    torch.get_num_threads()  # a thread's first use sets its number
    for set_number in filter(None, _SETTERS):
        set_number(num_threads)
    if torch.get_num_threads() != num_threads:  # OpenMP is not among these libraries, as on Windows
        torch.set_num_threads(num_threads)


@cache
def _pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, "hf_sparse_attn", _set_num_threads, (1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
