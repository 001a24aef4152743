"""What a conversion finds out before it calibrates."""

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.calibration import prepare
from hf_sparse_attn.calibration.settings import ConversionSettings


@pytest.mark.parametrize("num_tokens", [30, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_below_is_measured_as_the_model_runs(num_tokens, dtype, monkeypatch):
    """In its dtype, over as many tokens as its device is measured on."""
    measured, told = [], []

    def measure(config, inputs, layer_idx):
        measured.extend((x.dtype, x.shape[2]) for x in inputs)
        return 48

    monkeypatch.setattr(prepare, "measure_dense_below", measure)
    monkeypatch.setattr(prepare, "_MEASURED_TOKENS", {"cpu": num_tokens, "cuda": 35})
    settings = ConversionSettings(context_length=2048, dense_below="auto")
    model = tiny_model(dtype=dtype)
    base = SparseAttentionConfig(window_size=16, num_global_tokens=2)
    ids = tokens(40, seed=0)[0].tolist()
    config = prepare._with_measured_dense_below(model, ids, base, settings, told.append)
    assert config == base.replace(dense_below=48)
    assert measured == [(dtype, num_tokens)] * 3
    assert told == [f"sparse attention starts to win at 48 tokens on cpu, in {dtype}"]
