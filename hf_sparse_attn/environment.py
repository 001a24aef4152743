"""Where a figure was measured, and the configuration that a report repeats."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import Any

import torch
import transformers


def describe_environment(device: torch.device) -> dict[str, str | int]:
    """Versions, device and date to record beside every measured figure, JSON-ready."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def written_fields(sparse_attention: dict[str, Any]) -> dict[str, Any]:
    """The fields that a report repeats: all but the calibrated hash itself, which is megabytes of text."""
    return {name: value for name, value in sparse_attention.items() if name != "calibrated_hash"}
