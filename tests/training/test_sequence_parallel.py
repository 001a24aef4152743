"""Sequence parallelism by Ulysses: all tokens, a part of the heads. DeepSpeed's own where it is installed."""

import importlib.util

import pytest
import torch
from helpers import ulysses
from helpers.distributed_worker import TwoProcesses
from helpers.operation import calibrated_hash_text

from hf_sparse_attn import split_heads

PER_HEAD = {"key_budget": [[5, 3], [4, 0]], "min_weight": [[0.0, 0.05, 0.1, 0.02], 0.03]}
CALIBRATED = {"hash": "calibrated", "calibrated_hash": calibrated_hash_text(), **PER_HEAD}
CASES = [("llama", {}), ("llama", CALIBRATED), ("mistral-sliding", {}), ("gemma3", CALIBRATED), ("gpt_oss", PER_HEAD)]
EXACT = {"rtol": 1e-6, "atol": 1e-7}  # some norms compute in float32
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
WAYS = ["a stand-in", "split_heads", pytest.param("deepspeed", marks=needs_deepspeed)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    processes = TwoProcesses(tmp_path_factory)
    yield processes
    processes.stop()


@pytest.mark.parametrize("told", WAYS)
class TestUlysses:
    def test_one_process(self, told, two_processes):
        two_processes.run(ulysses.check_equal, told, CASES, 256, torch.float64, EXACT)

    @pytest.mark.nightly
    def test_one_process_long(self, told, two_processes):
        cases = [(family, {**fields, "window_size": 128}) for family, fields in CASES[:3]]
        two_processes.run(ulysses.check_equal, told, cases, 4096, torch.float32, {"rtol": 1e-5, "atol": 1e-5})

    def test_part_of_a_group_is_refused(self, told, two_processes):
        message = r"2 of 4 query heads and 1 KV heads, which serve 4 .* num_key_value_heads=1"
        two_processes.run(ulysses.check_refused, told, 4, 1, message)


def test_compiled(two_processes):
    two_processes.run(ulysses.check_equal, "a stand-in", CASES[:2], 256, torch.float64, EXACT, True)


def test_refused_where_nobody_says_which_part(two_processes):
    two_processes.run(ulysses.check_refused, "nobody", 4, 2, r"2 of 4 query heads came, and nothing says which")


def test_layers_that_differ_in_their_heads(two_processes):
    two_processes.run(ulysses.check_others_go_on)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_impossible_part(rank, size):
    with pytest.raises(ValueError, match=f"rank must be at least 0 and under size={size}, got {rank}"):
        split_heads(torch.nn.Linear(1, 1), rank, size)
