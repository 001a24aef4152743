"""What a CUDA graph would hold of some work, recorded on any device, and replayed at the same addresses."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.patterns import combine

WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "lift_fresh")  # the last: a number of the host
HOST = ("cpu", "tolist", "numpy", "item")


def place(x):
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """PyTorch's operations and Triton's launches, in order.

    The work is done once while it is recorded; `undo` puts back what it changed of the tensors that it was given.
    """

    def __init__(self):
        super().__init__()
        self.calls = []  # (function, args, kwargs, result)
        self.made = {}  # by address: number of each piece of memory that was made meanwhile
        self.before = {}  # by address: tensors that were given, and copies of their memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device or copies from the host"
        return self.call(func, args, kwargs or {})

    def call(self, func, args, kwargs):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and place(x) not in self.made and place(x) not in self.before:
                whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
                self.before[place(x)] = whole, whole.clone()
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and place(x) not in self.before:
                self.made.setdefault(place(x), len(self.made))
        self.calls.append((func, args, kwargs, result))
        return result

    def launch(self, kernel, grid, *args, **kwargs):
        def run(*args, **kwargs):
            with _disable_current_modes():
                LAUNCH(kernel, grid, *args, **kwargs)

        run.__name__ = f"{kernel.fn.__name__}{grid}"
        with _disable_current_modes():
            self.call(run, args, kwargs)

    def undo(self):
        for whole, copy in self.before.values():
            whole.copy_(copy)

    def replay(self):
        for func, args, kwargs, result in self.calls:
            given = {place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            fresh = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            if any(place(x) in given for x in fresh):
                if not func._schema.is_mutable:
                    continue  # a view
                fresh = []
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for x, y in zip(fresh, again, strict=bool(fresh)):
                x.copy_(y)

    def described(self):
        """Everything but the values of tensors: names, numbers, addresses, shapes."""

        def describe(x):
            if not isinstance(x, torch.Tensor):
                return repr(x)
            memory = self.made.get(place(x), f"at {place(x)}")
            return memory, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype

        return [
            (getattr(func, "__name__", str(func)), tree_map(describe, args), tree_map(describe, kwargs))
            for func, args, kwargs, _ in self.calls
        ]


LAUNCH = triton_launch.launch


@contextmanager
def recording():
    """A tape of what is done in this block, where nothing may wait for the device."""
    tape = Tape()

    def wait(*args, **kwargs):
        raise AssertionError("the host waits for the device")

    with (
        mock.patch.object(triton_launch, "launch", tape.launch),
        mock.patch.object(combine, "_sorted", lambda keys: keys.sort(-1).values),  # NumPy's, where there is no GPU
        mock.patch.multiple(torch.Tensor, **dict.fromkeys(HOST, wait)),
        tape,
    ):
        yield tape


def record(work, device):
    """In place of `decoding_graph.record`."""
    with recording() as tape:
        output = work()
    tape.undo()
    return tape.replay, output
