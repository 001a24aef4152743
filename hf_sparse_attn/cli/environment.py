"""Where a figure was measured."""

from __future__ import annotations

import platform
from datetime import datetime, timezone

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
