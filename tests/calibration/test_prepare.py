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


def fitted(**fields):
    told = []
    settings = ConversionSettings(**fields)
    base = prepare._fitted_to_density(settings.base_config(SparseAttentionConfig()), {0: None}, settings, told.append)
    return base.window_size, base.dense_below, told


def test_both_follow_and_are_told():
    window, dense_below, (of_window, of_rows) = fitted(target_density=0.12)
    assert (window, dense_below) == (64, 1024)
    assert of_window == (
        "rows have a window of 64 keys, not of 256: that would take too much of density 0.12 at 8192 tokens"
    )
    assert of_rows.startswith("rows at positions under 1024 read everything, not under 2048")


def test_by_default():
    assert fitted()[:2] == (128, 1024)
    assert fitted(context_length=131072)[:2] == (256, 2048)


@pytest.mark.parametrize(
    "given",
    [
        {"sparse_attention": {"window_size": 256}},
        {"sparse_attention": {"preset": "ssa"}},
        {"max_loss": 0.01},
    ],
)
def test_a_window_that_is_given_stays(given):
    density = {} if "max_loss" in given else {"target_density": 0.12}
    window, _, told = fitted(**density, **given)
    assert window == 256
    assert not any("window" in line for line in told)


def test_dense_rows_that_are_given_stay():
    assert fitted(target_density=0.12, dense_below=2048)[:2] == (64, 2048)
    assert fitted(target_density=0.12, sparse_attention={"dense_below": 300})[:2] == (64, 300)


def test_a_refit_keeps_its_own():
    assert fitted(target_density=0.12, refit=True) == (256, 2048, [])
