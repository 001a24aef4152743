"""Time and memory of the attention alone or of a whole model, dense (SDPA) against sparse, alternating in one run."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.integration import observe, record_density
from hf_sparse_attn.ops import find_keys, sparse_attention
from hf_sparse_attn.recording import DensityRecorder
from hf_sparse_attn.routing import LayerPattern

ATTENTION_PASSES = ("forward", "forward_backward")
MODEL_PASSES = ("prefill", "training_step")


def compare_speed(
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    config: SparseAttentionConfig,
    layer_idx: int = 0,
    passes: str = "forward",
    repeats: int = 5,
) -> dict[str, Any]:
    """Time and memory of one attention, batch 1: medians over alternating runs.

    Args:
        inputs: query [1, num_heads, N, head_dim], key and value [1, num_key_value_heads, N, head_dim].
        config: the sparse attention's configuration.
        layer_idx: layer whose budgets and hash apply.
        passes: "forward" or "forward_backward".
        repeats: timed runs of each side, after one that is not counted.

    Returns:
        One row of the benchmark: "pass", "seq_len", "dense_ms", "sparse_ms", "routing_ms" (hashing the keys and finding
        every row's keys, alone; part of the sparse forward), "floor_ms" (the products that the sparse side forms, at
        the rate that SDPA reaches in this run), "speedup", "density", "scored_density", and "dense_peak_bytes" and
        "sparse_peak_bytes": the most memory held above what was held before, inputs excluded.
    """
    backward = passes == "forward_backward"
    query, key, value = (x.detach().requires_grad_(backward) for x in inputs)
    gradient = torch.randn_like(query)

    def run(attention: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(backward):
            output = attention()
            if backward:
                torch.autograd.grad(output, (query, key, value), gradient)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def sparse() -> Tensor:
        return sparse_attention(query, key, value, config=config, layer_idx=layer_idx)

    recorder = DensityRecorder()
    with torch.no_grad():
        sparse_attention(query, key, value, config=config, layer_idx=layer_idx, recorder=recorder)
    routing = partial(find_keys, query[0].detach(), key[0].detach(), config, layer_idx)
    timed = {"dense": partial(run, dense), "sparse": partial(run, sparse), "routing": routing}
    row = _compared(timed, query.device, repeats)
    share = (recorder.scored_density + recorder.density) / 2  # products with keys, and with values
    return {
        "pass": passes,
        "seq_len": query.shape[2],
        **row,
        "floor_ms": row["dense_ms"] * share,
        "density": recorder.density,
        "scored_density": recorder.scored_density,
    }


def compare_model_speed(
    model: PreTrainedModel, input_ids: Tensor, passes: str = "prefill", repeats: int = 3
) -> dict[str, Any]:
    """Time and memory of a whole model, dense and sparse: medians over alternating runs.

    Args:
        model: with attn_implementation="sparse"; left so, without gradients.
        input_ids: [1, N] int64.
        passes: "prefill" (all layers, the last token's logits) or "training_step" (loss of all tokens, gradients of all
            weights; no optimizer).
        repeats: timed runs of each side, after one that is not counted.

    Returns:
        As `compare_speed`, without routing and floor.
    """

    def run(implementation: str) -> None:
        model.set_attn_implementation(implementation)
        if passes == "prefill":
            with torch.no_grad():
                model(input_ids=input_ids, logits_to_keep=1)
        else:
            model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
            model.zero_grad()

    try:
        with record_density(model) as recorder, torch.no_grad():
            model(input_ids=input_ids, logits_to_keep=1)
        timed = {"dense": partial(run, "sdpa"), "sparse": partial(run, "sparse")}
        row = _compared(timed, input_ids.device, repeats)
    finally:
        model.set_attn_implementation("sparse")
    densities = {"density": recorder.density, "scored_density": recorder.scored_density}
    return {"pass": passes, "seq_len": input_ids.shape[1], **row, **densities}


def _compared(timed: Mapping[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, float]:
    """Medians in ms, the speedup of sparse over dense, and the peaks of both, after a run of each that is not timed."""
    peaks = {side: peak_bytes(timed[side], device) for side in ("dense", "sparse")}
    seconds: dict[str, list[float]] = {part: [] for part in timed}
    for _ in range(repeats):
        for part, work in timed.items():
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            seconds[part].append(time.perf_counter() - started)
    medians = {f"{part}_ms": 1e3 * statistics.median(seconds[part]) for part in timed}
    return {
        **medians,
        "speedup": medians["dense_ms"] / medians["sparse_ms"],
        "dense_peak_bytes": peaks["dense"],
        "sparse_peak_bytes": peaks["sparse"],
    }


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, input_ids: Tensor, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches the attention of one layer, in float32, when the sparse model reads a text.

    Args:
        model: with attn_implementation="sparse".
        input_ids: [1, N] int64.
        layer_idx: which layer; those behind it are not computed.

    Returns:
        query [1, num_heads, N, head_dim], key and value [1, num_key_value_heads, N, head_dim].
    """

    class Done(Exception):  # noqa: N818  # no error
        pass

    found: list[Tensor] = []

    def observer(
        pattern: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
    ) -> None:
        if pattern.layer_idx == layer_idx:
            found.extend(x.float().contiguous() for x in (query, key, value))
            raise Done

    with suppress(Done), observe(model, observer):
        model.base_model(input_ids=input_ids, use_cache=False)
    if not found:
        raise ValueError(f"layer {layer_idx} of the model has no attention")
    return found[0], found[1], found[2]


def fitted_exponent(seq_lens: Sequence[int], milliseconds: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms: 2 for quadratic, 1 for linear time."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (seq_lens, milliseconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


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
