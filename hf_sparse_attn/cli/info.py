"""Show what a bug report needs: versions, devices and which implementation "auto" takes.

    hf-sparse-attn info
    hf-sparse-attn info --output info.json

Paste what it prints into the report.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_sparse_attn.cli.arguments import OneLineErrors
from hf_sparse_attn.cli.options import add, command_parser
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
    add(parser, "output")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    found = describe()
    if arguments.output:
        write_json(arguments.output, found)
    for title, entries in found.items():  # whole lines, to be copied
        print(f"{title}:", *(f"  {name}: {value}" for name, value in entries.items()), sep="\n")


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
