"""Memory that nothing was written to, filled with values that show where they are read.

`torch.empty` and its like give whatever the memory held, often zeros, or the result of the call before: code that
reads what it has not written may pass by luck. `torch.use_deterministic_algorithms` would fill it too, but tests would
then run other kernels than users do.
"""

import importlib
import math
import pkgutil
import types

import numpy as np
import torch

from hf_sparse_attn.ops import numba

# `with torch.device(...)` looks up once which functions make tensors: the real ones, which the fillings call.
torch.utils._device._device_constructors()

# Compiled code is not told.
COMPILED = {"kernels", "dense_kernels", "backward_kernels", "simd", "team", "tile", "compiled_files"}
NUMPY_USERS = [
    "hf_sparse_attn.cache.buffers",
    *(
        f"{numba.__name__}.{module.name}"
        for module in pkgutil.iter_modules(numba.__path__)
        if module.name not in COMPILED
    ),
]


def poison(monkeypatch, floating=math.nan, integer=None):
    """Fill what Python code gets from torch.empty, Tensor.new_empty and their like, and the package from numpy.empty.

    Args:
        monkeypatch: pytest's; takes it back.
        floating: what floating dtypes are filled with.
        integer: what integers are filled with; half of the largest by default, a bad index that may be added to. Bytes
            are filled with their largest, since several of them make a number that is not one, and booleans with True.
    """

    def value(dtype, info):
        if integer is not None:
            return integer
        return info(dtype).max // (1 if info(dtype).bits == 8 else 2)

    def fill_tensor(tensor):
        with torch.no_grad():
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                tensor.fill_(floating)
            elif tensor.dtype == torch.bool:
                tensor.fill_(integer is None)
            else:
                tensor.fill_(value(tensor.dtype, torch.iinfo))
        return tensor

    def fill_array(array):
        if array.dtype.kind in "fc":
            array.fill(floating)
        elif array.dtype.kind in "iu":
            array.fill(value(array.dtype, np.iinfo))
        return array

    def filled(owner, name, fill):
        original = getattr(owner, name)
        return lambda *args, **kwargs: fill(original(*args, **kwargs))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(owner, name, fill_tensor))
    # In numpy itself, compiled functions would find it while they are compiled.
    module = types.ModuleType(np.__name__)
    module.__getattr__ = lambda name: getattr(np, name)
    for name in ("empty", "empty_like"):
        setattr(module, name, filled(np, name, fill_array))
    for name in NUMPY_USERS:
        monkeypatch.setattr(importlib.import_module(name), "np", module, raising=False)
