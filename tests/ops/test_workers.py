import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_sparse_attn.ops.common import threads as workers
from hf_sparse_attn.ops.common.threads import in_order


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_results_come_in_order(num_workers):
    def work(i):
        time.sleep(0.001 * (7 * i % 5))
        return i

    assert list(in_order(work, iter(range(40)), num_workers)) == list(range(40))


def test_the_caller_works_too():
    threads = set()
    barrier = threading.Barrier(2)

    def work(i):
        threads.add(threading.current_thread())
        if i < 2:  # both at once
            barrier.wait(10)

    # The first two items go to the other thread; the caller takes the third.
    for _ in in_order(lambda i: work({0: 0, 2: 1}.get(i, 9)), range(6), 2):
        pass
    assert threading.current_thread() in threads
    assert len(threads) == 2


@pytest.mark.parametrize("wrong", range(8))
def test_an_error_in_any_thread_ends_it(wrong):
    finished = []

    def work(i):
        time.sleep(0.002)
        if i == wrong:
            raise ValueError(f"item {i}")
        finished.append(i)

    with pytest.raises(ValueError, match=f"item {wrong}"):
        list(in_order(work, range(8), 2))
    count = len(finished)
    time.sleep(0.02)
    assert len(finished) == count  # nobody works on
    assert torch.get_num_threads() == 2


def test_stopping_early():
    results = in_order(lambda i: i, range(100), 2)
    assert next(results) == 0
    results.close()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("grad", [False, True])
def test_modes_of_the_caller(grad):
    leaf = torch.ones(1, requires_grad=True)
    with torch.set_grad_enabled(grad):
        results = list(in_order(lambda i: (leaf * i).requires_grad, range(8), 2))
    assert results == [grad] * 8


def in_new_threads(function, number=1):
    """What a function returns in threads that have not used PyTorch before."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(function())) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("first", [False, True], ids=["threads at work before", "first threads"])
def test_threads_that_begin_meanwhile_have_their_number(first):
    if first:
        workers._pool.cache_clear()
    seen = []
    for _ in in_order(lambda i: seen.append((threading.current_thread(), torch.get_num_threads())), range(60), 2):
        assert in_new_threads(torch.get_num_threads) == [2]
    assert {number for _, number in seen} == {1}
    assert len({thread for thread, _ in seen}) == 2
    assert torch.get_num_threads() == 2
    assert in_new_threads(torch.get_num_threads) == [2]


def test_threads_that_begin_while_another_computes():
    done = threading.Event()

    def compute():
        while not done.is_set():
            list(in_order(lambda i: torch.ones(2**16).sum(), range(40), 2))
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(compute)
        assert in_new_threads(torch.get_num_threads, 60) == [2] * 60
        done.set()
        assert computing.result() == 2
    assert torch.get_num_threads() == 2


def test_computations_that_overlap_keep_their_numbers():
    both, first_ended = threading.Barrier(2), threading.Event()

    def compute(ends_first):
        results = in_order(lambda i: i, range(8), 2)
        next(results)
        both.wait(10)
        if not ends_first:
            first_ended.wait(10)
        list(results)
        first_ended.set()
        return torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(compute, [True, False])) == [2, 2]
    assert torch.get_num_threads() == 2
    assert in_new_threads(torch.get_num_threads) == [2]


def test_products_use_one_thread_too():
    """MKL has a number of its own."""
    (info,) = set(in_order(lambda i: torch.__config__.parallel_info(), range(20), 2))
    numbers = [line.split(":")[1].strip() for line in info.splitlines() if "get_max_threads" in line]
    assert set(numbers) <= {"1"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork():
    list(in_order(int, range(9), 2))  # there is a thread
    process = os.fork()
    if not process:
        os._exit(0 if list(in_order(lambda i: i * i, range(9), 2)) == [i * i for i in range(9)] else 1)
    assert os.waitpid(process, 0)[1] == 0


AT_THE_END = """
import atexit
import threading
from concurrent.futures import ThreadPoolExecutor
import torch
from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.attention import Inputs
from hf_sparse_attn.custom_op import compiled_attention
from hf_sparse_attn.ops.common.threads import in_order
from hf_sparse_attn.tensor_parallel import HeadSplit

fields = SparseAttentionConfig(dense_below=0, window_size=4, key_budget=2, implementation="torch").text
leaf = torch.randn(1, 2, 20, 4, requires_grad=True)
ended = []

def compute(when):
    output = compiled_attention(Inputs(leaf, leaf, leaf), fields, 0, HeadSplit(0, 1), None, 1.0, None)
    (gradient,) = torch.autograd.grad(output.sin().sum(), leaf)
    print(when, list(in_order(lambda i: i * i, range(5), 2)), f"{gradient.sum():.5f}", flush=True)

def no_thread_begins():
    try:
        ThreadPoolExecutor(1).submit(int)
    except RuntimeError:
        return True

def outlive():
    while not no_thread_begins():
        pass
    compute("thread")

torch.set_num_threads(2)
compute("main")
threading.Thread(target=outlive).start()
atexit.register(compute, "atexit")
"""


def test_when_the_interpreter_shuts_down():
    command = [sys.executable, "-c", AT_THE_END]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    lines = [line.split(" ", 1) for line in finished.stdout.splitlines()]
    assert [when for when, _ in lines] == ["main", "thread", "atexit"]
    assert len({result for _, result in lines}) == 1
    assert "[0, 1, 4, 9, 16]" in lines[0][1]
    assert not finished.stderr
