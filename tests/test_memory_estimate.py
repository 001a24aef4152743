"""Estimates of memory from a config alone."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.families import FAMILIES, tiny_model
from helpers.paths import SCRIPTS

from hf_sparse_attn import SparseAttentionConfig, memory
from hf_sparse_attn.benchmarking.random_models import SHAPES, shape_config
from hf_sparse_attn.memory import ModelSize, available_memory, conversion_memory

DENSE_BELOW = SparseAttentionConfig(dense_below=60)


def estimate(config, dtype="auto", num_tokens=8192, **kwargs):
    return conversion_memory(ModelSize.of(config, dtype), SparseAttentionConfig(), num_tokens, 2048, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_own(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert ModelSize.of(model.config, torch.bfloat16).weights()[0] == weights


def test_llama_3_8b():
    needs = estimate(shape_config("llama-3-8b"), torch.bfloat16)
    assert needs.weights == 2 * 8_030_261_248
    assert needs.in_use == 2 * 128256 * 4096  # the head; a layer has fewer
    assert needs.kept == 32 * 8192 * 2 * 8 * 128 * 2
    assert 18e9 < needs.peak < 21e9
    assert needs.offloaded_peak < 6e9


@pytest.mark.parametrize("shape", SHAPES)
def test_more_takes_more(shape):
    config = shape_config(shape)
    needs = estimate(config, torch.bfloat16)
    assert needs.peak < estimate(config, torch.float32).peak
    assert needs.peak < estimate(config, torch.bfloat16, 4 * 8192).peak
    assert estimate(config, torch.bfloat16, on_cpu=False).peak <= needs.peak


def test_dtype_is_the_configs_own_unless_it_is_given():
    config = shape_config("gemma-3-270m")
    assert ModelSize.of(config).dtype == torch.float32
    config.dtype = torch.bfloat16
    assert ModelSize.of(config).dtype == torch.bfloat16
    assert ModelSize.of(config, torch.float16).dtype == torch.float16


def test_local_layers_keep_nothing():
    config = tiny_model("gemma3").config  # one layer has a window of 14
    size = conversion_memory(ModelSize.of(config), DENSE_BELOW, 200, 2048).kept
    assert size == ModelSize.of(config).keys_and_values(200, 1)


def test_available_memory(monkeypatch):
    cpu = torch.device("cpu")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory(cpu) <= total
    monkeypatch.setattr(memory, "_MEMINFO", memory._MEMINFO.with_name("absent"))
    assert 0 < available_memory(cpu) <= total
    assert available_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    "work", ["gradients", *(pytest.param(work, marks=pytest.mark.nightly) for work in ("perplexity", "calibration"))]
)
def test_estimate_is_near_the_measured_peak(work):
    """Of a small model, whose peak is half libraries."""
    options = ["--vocab-sizes", "16384", "--context-length", "2304", "--work", work]
    command = [sys.executable, str(SCRIPTS / "measure_memory.py"), *options]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    *_, peak, _, estimated, _ = finished.stdout.splitlines()[-1].split("|")
    assert 0.85 * float(peak) < float(estimated) < 1.4 * float(peak)
