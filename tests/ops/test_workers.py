import threading
import time

import pytest
import torch

from hf_sparse_attn.ops.workers import in_order


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
