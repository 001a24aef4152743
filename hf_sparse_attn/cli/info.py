"""Show what a bug report needs: versions, devices and which implementation "auto" takes.

    hf-sparse-attn info
    hf-sparse-attn info --output info.json
    hf-sparse-attn info --gpu

Paste what it prints into the report. --gpu also checks the Triton kernels on every GPU for some minutes.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_sparse_attn.cli.arguments import OneLineErrors, print_table
from hf_sparse_attn.cli.options import add, command_parser
from hf_sparse_attn.errors import argument
from hf_sparse_attn.output_files import write_json

PACKAGES = (
    "hf_sparse_attn",
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "numba",
    "llvmlite",
    "triton",
    "accelerate",
    "datasets",
    "peft",
)


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    gpu_help = "Check the Triton kernels against PyTorch's operations on each GPU, and time them beside SDPA."
    parser.add_argument("--gpu", action="store_true", help=gpu_help)
    add(parser, "output")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    devices = _gpus() if arguments.gpu else []
    found = describe()
    for title, entries in found.items():  # whole lines, to be copied
        print(f"{title}:", *(f"  {name}: {value}" for name, value in entries.items()), sep="\n")
    checks = [row for device in devices for row in _check(device)]
    if arguments.output:
        write_json(arguments.output, found | ({"gpu": checks} if arguments.gpu else {}))


def _gpus() -> list[Any]:
    """The GPUs on which Triton's kernels run."""
    import torch

    from hf_sparse_attn.ops.dispatch import check_implementation

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with argument("gpu"):
        if not devices:
            raise ValueError("PyTorch sees no GPU here, so there is nothing to check")
        for device in devices:
            check_implementation("triton", device)
    return devices


def _check(device: Any) -> list[dict[str, Any]]:
    """Check one GPU and show what was found."""
    from hf_sparse_attn.benchmarking.gpu_check import check_gpu

    rows = check_gpu(device, lambda line: print(line, file=sys.stderr))
    print_table(
        f"Triton's kernels on {_name(device)}: rows of forward, backward and decoding that are off; ms (SDPA's)",
        ["dtype", "heads", "tokens", "rows off, %", "forward", "with backward", "problem"],
        [_cells(row) for row in rows],
    )
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    heads = f"{row['num_heads']}/{row['num_key_value_heads']} x {row['head_dim']}"
    off = " / ".join(f"{share:.2%}"[:-1] for share in row.get("off", {}).values())
    times = [_times(row, prefix) for prefix in ("", "both_")]
    return [row["dtype"], heads, str(row["seq_len"]), off, *times, row["problem"] or "none"]


def _times(row: dict[str, Any], prefix: str) -> str:
    if f"{prefix}sparse_ms" not in row:
        return ""
    return f"{row[f'{prefix}sparse_ms']:.2f} ({row[f'{prefix}dense_ms']:.2f})"


def describe() -> dict[str, dict[str, Any]]:
    """ "system", "packages", "devices" and "compiled code", each a dict that is JSON-ready."""
    import torch

    from hf_sparse_attn.ops.dispatch import explain

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads of torch": torch.get_num_threads(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {_name(device): explain(device) for device in devices},
        "compiled code": _folders(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _name(device: Any) -> str:
    import torch

    return "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def _folders() -> dict[str, str]:
    """Where compiled code is kept, in the order in which the places are tried."""
    try:
        from hf_sparse_attn.ops.numba.compiled_files import folders
    except Exception as error:  # of many types, where a compiled library does not load
        return {"numba": f"not available ({error})"}
    return {f"numba, choice {i}": str(folder) for i, folder in enumerate(folders(), start=1)}
