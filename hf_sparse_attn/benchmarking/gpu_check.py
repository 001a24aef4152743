"""The Triton kernels on a GPU at length: beside PyTorch's operations in many shapes, and their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_sparse_attn.benchmarking.speed import compare_speed, make_inputs
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops.dispatch import find_backend
from hf_sparse_attn.ops.self_check import PARTS, TOLERANCE, Kind, Trial, share_off

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((32, 8, 128), (9, 3, 64), (16, 1, 256), (8, 8, 80))  # query heads, KV heads, head_dim
CHECKED_LENGTHS = (205, 1000, 4097)
TIMED_LENGTHS = (4096, 16384, 65536)
_MOST_ROWS = 0.01  # to which rounding may give another bucket


def check_gpu(device: torch.device, tell: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """Check every dtype and shape, and time the first shape of each dtype.

    Args:
        device: where Triton's kernels run.
        tell: is told what comes next.

    Returns:
        For each attention "device", "dtype", "num_heads", "num_key_value_heads", "head_dim", "seq_len", and "problem"
        (None: all is right). Those that are checked have "off", the share of rows that differ by part; those that are
        timed "sparse_ms" and "dense_ms" (SDPA), and "both_sparse_ms" and "both_dense_ms", of forward and backward.
    """
    rows = []
    for dtype, shape, seq_len, find in _attentions():
        row: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        row |= dict(zip(("num_heads", "num_key_value_heads", "head_dim"), shape, strict=True), seq_len=seq_len)
        tell(f"{row['dtype']}, {shape[0]} heads over {shape[1]} of {shape[2]}, {seq_len} tokens")
        try:
            row |= find(device, dtype, shape, seq_len)
        except Exception as error:  # compilers and drivers raise all kinds of them
            row["problem"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        rows.append(row)
    return rows


def _attentions() -> Iterator[tuple[torch.dtype, tuple[int, int, int], int, Callable[..., dict[str, Any]]]]:
    for dtype in DTYPES:
        for shape in SHAPES:
            yield from ((dtype, shape, seq_len, _check) for seq_len in CHECKED_LENGTHS)
        yield from ((dtype, SHAPES[0], seq_len, _time) for seq_len in TIMED_LENGTHS)


def _check(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seq_len: int) -> dict[str, Any]:
    num_heads, num_kv_heads, head_dim = shape
    config = SparseAttentionConfig(
        window_size=max(seq_len // 16, 8),
        key_budget=max(seq_len // 8, 8),
        num_random_keys=2,
        min_weight=1e-3,
        num_hash_bits=max(min(seq_len.bit_length() - 3, 10), 1),
        dense_below=seq_len // 8,
    )
    kind = Kind(device, dtype, head_dim, num_heads // num_kv_heads)
    trial = Trial(kind, num_kv_heads, seq_len, config, (config.num_hash_bits, 2), head_dim**-0.5)
    off = share_off(find_backend("triton", device), trial)
    wrong = [f"{off[part]:.1%} of the rows of {part}" for part in PARTS if off[part] > _MOST_ROWS]
    problem = f"{', '.join(wrong)} differ by more than {TOLERANCE[dtype]:g}" if wrong else None
    return {"off": off, "problem": problem}


def _time(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seq_len: int) -> dict[str, Any]:
    inputs = make_inputs(seq_len, *shape, dtype, device)
    found: dict[str, Any] = {"problem": None}
    config = SparseAttentionConfig(implementation="triton")
    for name, passes in (("", "forward"), ("both_", "forward_backward")):
        row = compare_speed(inputs, config=config, passes=passes, repeats=3)
        found |= {f"{name}{side}_ms": row[f"{side}_ms"] for side in ("sparse", "dense")}
    return found
