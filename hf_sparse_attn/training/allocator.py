"""The C library's allocator: memory that a training has freed goes back to the system."""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3  # of mallopt
_THRESHOLD = 2**20


def return_freed_memory() -> bool:
    """Have glibc map each block of at least a megabyte on its own for the rest of the process, and unmap it when freed.

    By default, glibc raises this threshold up to 32 MB by itself. Hidden states that gradient checkpointing keeps then
    lie among blocks that were soon freed, whose memory nobody else can use: a training on a CPU came to hold half as
    much again. Mapping costs some time.

    Returns:
        Whether it was set: not where the user set the variable MALLOC_MMAP_THRESHOLD_, nor with another C library.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
