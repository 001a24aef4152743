"""Conversions whose weights lie on the disk give what they give without."""

import json

import pytest
import torch
from helpers.families import tiny_model
from safetensors.torch import load_file

from hf_sparse_attn import offloading
from hf_sparse_attn.calibration import budget_allocation as allocation
from hf_sparse_attn.calibration import calibrate, place_weights, prepare
from hf_sparse_attn.calibration import convert as conversion
from hf_sparse_attn.calibration.convert import convert
from hf_sparse_attn.calibration.settings import ConversionSettings
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.loading import load_model
from hf_sparse_attn.logits import token_losses

LENGTH = 200
FAMILIES = ["llama", "gemma3"]


@pytest.fixture(autouse=True)
def small_choices(monkeypatch):
    monkeypatch.setattr(allocation, "BUDGETS", (0, 8, 16, 32))
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-2))


def leave_room_for_embeddings(monkeypatch, dtype):
    """And for nothing else."""
    placement = place_weights.placement
    limit = {"max_memory": {"cpu": 40_000 if dtype == "bfloat16" else 80_000}}
    monkeypatch.setattr(place_weights, "placement", lambda *args: placement(*args) | limit)


def save(family, path, tokenizer):
    model = tiny_model(family, dtype=torch.float32)
    del model.config.sparse_attention
    model.resize_token_embeddings(256)
    if family == "gemma3":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_is_the_same(family, dtype, tiny_tokenizer, text_directory, tmp_path, monkeypatch):
    leave_room_for_embeddings(monkeypatch, dtype)
    path = save(family, tmp_path / "model", tiny_tokenizer)
    offloaded = []

    def watched(model, directory):
        offloaded.append({name for name, parameter in model.named_parameters() if parameter.is_meta})
        offloading.save_pretrained(model, directory)

    monkeypatch.setattr(conversion, "save_pretrained", watched)
    fields = {"window_size": 16, "num_global_tokens": 2, "dense_below": 32 if family == "llama" else 10}
    results, told = {}, []
    for offload in (False, True):
        settings = ConversionSettings(
            calibration_dataset=str(text_directory),
            num_calibration_documents=2,
            context_length=LENGTH,
            target_density=0.5,
            sparse_attention=fields,
            num_evaluation_documents=1,
            device="cpu",
            dtype=dtype,
            offload=offload,
        )
        output = tmp_path / f"converted-{offload}"
        done = convert(str(path), output, settings, tell=told.append)
        weights = {
            name: weight for file in sorted(output.glob("*.safetensors")) for name, weight in load_file(file).items()
        }
        losses = [done.evaluation[kind]["nll"] for kind in ("dense", "sparse")]
        results[offload] = json.loads((output / "config.json").read_text()), weights, losses
    assert offloaded[0] == set()
    assert any("layers.1.mlp" in name for name in offloaded[1])
    assert results[True][0] == results[False][0]
    assert results[True][2] == results[False][2]
    dense, sparse = results[False][1], results[True][1]
    assert dense.keys() == sparse.keys()
    for name, weight in dense.items():
        assert weight.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        assert torch.equal(weight, sparse[name]), name
    assert all(line.startswith("estimated peak memory: ") for line in told)
    assert not list(tmp_path.glob(".*"))  # nothing offloaded is left


@pytest.fixture
def offloaded(tiny_model_path, tmp_path):
    limits = {"device_map": "auto", "max_memory": {"cpu": 80_000}, "offload_folder": str(tmp_path / "offloaded")}
    model = load_model("tiny", str(tiny_model_path), device=torch.device("cpu"), **limits)
    assert offloading.is_offloaded(model)
    return model


def on_disk(model):
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def test_gradients_leave_no_weights_in_memory(offloaded):
    before = on_disk(offloaded)
    offloaded.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    trainable = {name: parameter.requires_grad for name, parameter in offloaded.named_parameters()}
    calibrate._gradient_moments(offloaded, torch.arange(LENGTH), seed=0)
    assert on_disk(offloaded) == before
    assert {name: parameter.requires_grad for name, parameter in offloaded.named_parameters()} == trainable


def test_named_weights_are_those_of_the_checkpoint(offloaded, tiny_model_path):
    stored = load_model("tiny", str(tiny_model_path)).state_dict()
    seen = {}
    for name, weight in offloading.named_weights(offloaded):
        assert torch.equal(weight, stored[name])
        seen[name] = weight.is_meta
    assert seen.keys() == stored.keys()
    assert not any(seen.values())


def test_damaged_weights_on_the_disk_are_found(tiny_model_path, tmp_path):
    model = load_model("tiny", str(tiny_model_path))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "damaged")
    limits = {"device_map": "auto", "max_memory": {"cpu": 80_000}}
    with pytest.raises(ArgumentError, match=r"damaged: model\.layers\.1\.mlp\.down_proj\.weight has numbers"):
        load_model("tiny", str(tmp_path / "damaged"), device=torch.device("cpu"), **limits)


def test_losses_are_the_same(offloaded, tiny_model_path):
    ids = torch.arange(LENGTH)[None]
    model = load_model("tiny", str(tiny_model_path))
    with torch.no_grad():
        one, other = (token_losses(each, ids, ids[0, 1:], use_cache=False) for each in (model, offloaded))
    assert torch.equal(one, other)


def test_accelerate_is_needed(monkeypatch):
    monkeypatch.setattr(offloading, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"offload: needs accelerate; pip install 'hf_sparse_attn\[scripts\]'"):
        ConversionSettings(offload=True)
    ConversionSettings()


@pytest.mark.parametrize(("offload", "advice"), [(False, ": --offload, --dtype"), (True, ": --dtype")])
def test_too_little_memory_is_told_before_the_weights_are_loaded(
    offload, advice, tiny_model_path, text_directory, tmp_path, monkeypatch, caplog
):
    class LoadedError(Exception):
        pass

    def load(*_args, **kwargs):
        assert ("device_map" in kwargs) == offload
        raise LoadedError

    monkeypatch.setattr(place_weights, "available_memory", lambda device: 10**8)
    monkeypatch.setattr(prepare, "load_model", load)
    settings = ConversionSettings(
        calibration_dataset=str(text_directory),
        context_length=LENGTH,
        sparse_attention={"window_size": 16, "dense_below": 32},
        target_density=0.5,
        device="cpu",
        offload=offload,
    )
    told = []
    with pytest.raises(LoadedError):
        convert(str(tiny_model_path), tmp_path / "converted", settings, tell=told.append)
    assert told[0].startswith("estimated peak memory: 1.")
    assert told[0].endswith("; 0.1 GB are free")
    assert f"more than the memory that is free on cpu{advice} bfloat16" in caplog.text
