"""A Hub kernel of this package, and Transformers' way to one that lies in a directory."""

import re

import pytest
import transformers
from transformers import modeling_flash_attention_utils
from transformers.integrations import hub_kernels

REPO = "tests/hf-sparse-attn"


def offer_kernel(directory, monkeypatch):
    """Let `attn_implementation=REPO` load the kernel that was built in a directory; gives the `kernels` package.

    Each release of Transformers takes few releases of `kernels` and loads from all of them alike, so its check of
    the release is lifted.
    """
    kernels = pytest.importorskip("kernels", reason="a Hub kernel needs `pip install kernels`")
    major, minor = map(int, re.match(r"(\d+)\.(\d+)", transformers.__version__).groups())
    if (major, minor) < (5, 17):
        pytest.skip("Transformers takes attention functions of Hub kernels from 5.17 on")
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={directory}")
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", kernels.get_kernel, raising=False)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)  # each test loads it anew
    return kernels
