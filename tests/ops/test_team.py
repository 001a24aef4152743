"""The threads of PyTorch's OpenMP take the turns of a compiled loop, each of them once."""

import ctypes

import numba
import numpy as np
import pytest
import torch
from helpers.cases import KV_HEADS, inputs, pattern_of
from helpers.index_checks import NUMBA, in_steps

from hf_sparse_attn.ops.numba import decode, team
from hf_sparse_attn.ops.numba.kernels import compiled
from hf_sparse_attn.ops.numba.team import own_team, share

ALONE = (0, 1)


@compiled
def count(turn, counts, step):
    counts[turn] += step


@compiled
def count_all(team, counts, step):
    share(team, len(counts), count, (counts, step))


def sleeper():
    """A call that the compiler cannot look into."""
    usleep = ctypes.CDLL(None).usleep
    usleep.argtypes, usleep.restype = [ctypes.c_uint], ctypes.c_int
    return usleep


wait = None if own_team() == ALONE else sleeper()


@numba.njit
def meet(turn, arrived, met):
    """Arrive, and wait for the other one, but some seconds at most."""
    arrived[turn] = 1
    for _ in range(100_000):
        if arrived[1 - turn]:
            met[turn] = 1
            return
        wait(50)


@numba.njit
def meet_all(team, arrived, met):
    share(team, 2, meet, (arrived, met))


@pytest.fixture(params=[1, 2, 4])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_turns", [0, 1, 3, 5000])
def test_each_turn_is_taken_once(num_threads, num_turns):
    assert own_team()[1] in (1, num_threads)
    for threads in (ALONE, own_team()):
        counts = np.zeros(num_turns, np.int64)
        for _ in range(20):
            count_all(threads, counts, 3)
        assert (counts == 60).all()


@pytest.mark.skipif(own_team() == ALONE, reason="PyTorch has no OpenMP here whose threads could be had")
def test_turns_are_taken_at_the_same_time():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    met = np.zeros(2, np.int64)
    meet_all(own_team(), np.zeros(2, np.int64), met)
    torch.set_num_threads(before)
    assert met.tolist() == [1, 1]


def test_without_openmp_one_thread_takes_all(monkeypatch):
    monkeypatch.setattr(team, "_START", 0)
    assert team.own_team() == ALONE


def test_a_step_does_not_depend_on_the_threads(num_threads, monkeypatch):
    def spy(team, **others):
        teams.append(team)
        attend_heads(team, **others)

    teams, attend_heads = [], decode.attend_heads
    monkeypatch.setattr(decode, "attend_heads", spy)
    pattern, tensors = pattern_of({}), inputs()
    together = in_steps(NUMBA, pattern, tensors)
    assert set(teams) == {own_team()}
    monkeypatch.setattr(decode, "own_team", lambda: ALONE)
    assert torch.equal(in_steps(NUMBA, pattern, tensors), together)


def test_a_turn_that_is_left_out_is_noticed(monkeypatch):
    """A mutant of what shares the heads among the threads."""

    def mutant(team, *, query, budgets, **others):
        attend_heads(team, query=query[:-1], budgets=budgets, **others)

    pattern, tensors = pattern_of({}), inputs()
    expected, attend_heads = in_steps(NUMBA, pattern, tensors), decode.attend_heads
    monkeypatch.setattr(decode, "attend_heads", mutant)
    assert KV_HEADS > 1
    assert not torch.equal(in_steps(NUMBA, pattern, tensors), expected)
