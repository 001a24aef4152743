"""Code that reads memory that nothing was written to is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cases import FEATURES, assert_like_reference, inputs, pattern_of
from helpers.checks import check_padding
from helpers.poison import poison

from hf_sparse_attn.cache import buffers
from hf_sparse_attn.ops.numba import chunks as numba_chunks

LIKE = torch.zeros(2, 3)
MAKERS = {
    "torch.empty": lambda dtype: torch.empty(2, 3, dtype=dtype),
    "torch.empty_like": lambda dtype: torch.empty_like(LIKE, dtype=dtype),
    "torch.empty_strided": lambda dtype: torch.empty_strided((2, 3), (3, 1), dtype=dtype),
    "Tensor.new_empty": lambda dtype: LIKE.new_empty(2, 3, dtype=dtype),
}


def sum_of_what_was_never_written(make, dtype):
    total = make(dtype)
    total[0] = 0
    return total.sum(0)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_floating(self, make, dtype):
        assert sum_of_what_was_never_written(make, dtype).isnan().all()

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
    def test_integers_are_no_index(self, make, dtype):
        assert (make(dtype) == torch.iinfo(dtype).max // 2).all()

    def test_bytes_are_no_number(self, make):
        memory = torch.cat([make(torch.uint8).flatten()] * 4)
        assert memory.view(torch.float32).isnan().all()


def test_numpys_in_the_package():
    assert numba_chunks.np is buffers.np is not np
    assert np.isnan(numba_chunks.np.empty((2, 3), np.float32)).all()
    assert np.isnan(numba_chunks.np.empty_like(np.zeros(3))).all()
    assert (numba_chunks.np.empty(3, np.int32) == 2**30 - 1).all()
    assert numba_chunks.np.zeros is np.zeros


def test_leaves_and_sizes_stay():
    assert torch.empty(3, requires_grad=True).is_leaf
    assert torch.empty(0, 4).shape == (0, 4)
    assert torch.empty(2, device="meta").device.type == "meta"


def padding_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)


def gradients_are_added_to_what_was_there(monkeypatch):
    monkeypatch.setattr(torch, "zeros_like", torch.empty_like)


def compiled_gradients_are_added_to_what_was_there(monkeypatch):
    monkeypatch.setattr(numba_chunks.np, "zeros_like", numba_chunks.np.empty_like)


def check_gradients(implementation="torch"):
    assert_like_reference(*inputs(), pattern_of(FEATURES["everything at once"]), implementations=(implementation,))


def check_compiled_gradients():
    check_gradients("numba")


@pytest.mark.parametrize(
    ("mutate", "check"),
    [
        (padding_is_left_as_it_was, check_padding),
        (gradients_are_added_to_what_was_there, check_gradients),
        (compiled_gradients_are_added_to_what_was_there, check_compiled_gradients),
    ],
    ids=lambda function: function.__name__,
)
def test_broken_variants_pass_with_memory_of_zeros_alone(mutate, check, monkeypatch):
    """Which new memory often is."""
    with monkeypatch.context() as zeros:
        poison(zeros, floating=0.0, integer=0)
        mutate(zeros)
        check()
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


POISONED_KERNELS = """
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
KERNELS = "hf_sparse_attn.ops.numba.kernels"
FILLED = (
    (r"np\\.empty\\((.+?), query\\.dtype\\)", rf"np.full(\\1, {sys.argv[2]}, query.dtype)"),
    (r"np\\.empty\\((.+?), np\\.int32\\)", r"np.full(\\1, 2**30, np.int32)"),
    (r"np\\.empty_like\\((\\w+)\\)", rf"np.full_like(\\1, {sys.argv[2]})"),
)
get_code, total = SourceFileLoader.get_code, 0
def get_filled_code(self, name):
    global total
    if name != KERNELS:
        return get_code(self, name)
    source = self.get_source(name)
    for empty, filled in FILLED:
        source, count = re.subn(empty, filled, source)
        total += count
    assert "np.empty" not in source, "this test does not fill some memory that a kernel takes"
    return compile(source, self.path, "exec")
SourceFileLoader.get_code = get_filled_code
import pytest
ops = Path(sys.argv[1])
names = ("test_ops.py::test_every_feature", "test_index.py::test_steps", "test_index.py::test_softcap_and_sinks")
status = pytest.main(["-q", "-p", "no:cacheprovider", *(f"{ops}/{name}" for name in names)])
assert total > 10, "no kernel was filled"
sys.exit(status)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("value", ["np.nan", "np.inf"])
def test_memory_that_kernels_take_themselves(value, tmp_path, request):
    """Compiled anew with every `np.empty` filled; a score of NaN is never the best one, one of infinity is."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", POISONED_KERNELS, str(Path(__file__).parent), value]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=request.config.rootpath)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout
