"""Time and memory of the attention alone, dense (SDPA) against sparse, alternating in one run."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops import find_keys, sparse_attention
from hf_sparse_attn.recording import DensityRecorder

PASSES = ("forward", "forward_backward")


def compare_speed(
    seq_len: int,
    *,
    config: SparseAttentionConfig,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    passes: str = "forward",
    repeats: int = 5,
) -> dict[str, Any]:
    """Medians over alternating runs on random inputs, batch 1.

    Args:
        seq_len: tokens.
        config: the sparse attention's configuration; layer 0's budgets apply.
        passes: "forward" or "forward_backward".
        repeats: timed runs of each side, after one that is not counted.

    Returns:
        One row of the benchmark: "pass", "seq_len", "dense_ms", "sparse_ms", "routing_ms" (hashing the keys and finding
        every row's keys, alone; part of the sparse forward), "speedup", "density", "scored_density", and
        "dense_peak_bytes" and "sparse_peak_bytes": the most memory held above what was held before, inputs excluded.
    """
    query, key, value = make_inputs(seq_len, num_heads, num_kv_heads, head_dim, dtype, device)
    backward = passes == "forward_backward"
    for tensor in (query, key, value):
        tensor.requires_grad_(backward)
    gradient = torch.randn_like(query)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def sparse() -> Tensor:
        return sparse_attention(query, key, value, config=config)

    def run(attention: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(backward):
            output = attention()
            if backward:
                torch.autograd.grad(output, (query, key, value), gradient)

    recorder = DensityRecorder()
    with torch.no_grad():
        sparse_attention(query, key, value, config=config, recorder=recorder)
    sides = {"dense": dense, "sparse": sparse}
    peaks = {side: peak_bytes(partial(run, attention), device) for side, attention in sides.items()}
    timed = {side: partial(run, attention) for side, attention in sides.items()}
    timed["routing"] = partial(find_keys, query[0].detach(), key[0].detach(), config)
    seconds: dict[str, list[float]] = {part: [] for part in timed}
    for _ in range(repeats):
        for part, work in timed.items():
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            seconds[part].append(time.perf_counter() - started)
    dense_ms, sparse_ms, routing_ms = (1e3 * statistics.median(seconds[part]) for part in timed)
    return {
        "pass": passes,
        "seq_len": seq_len,
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "routing_ms": routing_ms,
        "speedup": dense_ms / sparse_ms,
        "density": recorder.density,
        "scored_density": recorder.scored_density,
        "dense_peak_bytes": peaks["dense"],
        "sparse_peak_bytes": peaks["sparse"],
    }


def measure_dense_below(
    config: SparseAttentionConfig,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    seq_len: int = 4096,
) -> int:
    """The position from which on a sparse row is cheaper than a dense one, on this machine.

    A dense row at position p takes time proportional to p, a sparse one the same everywhere; both are taken from the
    second half of `seq_len` tokens, so that the budgets are full.
    """
    always_sparse = config.replace(dense_below=0)
    times = {"dense": [], "sparse": []}  # type: dict[str, list[float]]
    half = seq_len // 2
    inputs = {n: make_inputs(n, num_heads, num_kv_heads, head_dim, torch.float32, device) for n in (half, seq_len)}
    with torch.no_grad():
        for _ in range(4):  # the first round warms up
            for side, results in times.items():
                spent = {}
                for n, (query, key, value) in inputs.items():
                    synchronize(device)
                    started = time.perf_counter()
                    if side == "dense":
                        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                    else:
                        sparse_attention(query, key, value, config=always_sparse)
                    synchronize(device)
                    spent[n] = time.perf_counter() - started
                results.append(spent[seq_len] - spent[half])
    dense_row = statistics.median(times["dense"][1:]) / half / (0.75 * seq_len)  # seconds per row and position
    sparse_row = statistics.median(times["sparse"][1:]) / half
    return max(0, round(sparse_row / dense_row / config.page_size) * config.page_size)


def make_inputs(
    seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal query [1, num_heads, N, head_dim], key and value [1, num_kv_heads, N, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, seq_len, head_dim, generator=generator).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return query, key, value


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock sees finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most memory held during `run` above what was held before it.

    On a GPU the allocator's own count; on a CPU the process's resident set, sampled every millisecond.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    run()  # lets libraries take their working memory
    gc.collect()
    before = highest = _resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, _resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    run()
    done.set()
    sampler.join()
    return highest - before


def _resident_bytes() -> int:
    try:
        import psutil

        return int(psutil.Process().memory_info().rss)
    except ImportError:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096
