"""Models of other shapes are made of a model's own weights: what should stay the same function does."""

import copy
import json

import pytest
import torch
from helpers.paths import script_module
from transformers import AutoModelForCausalLM, LlamaForCausalLM

measure_other_shapes = script_module("measure_other_shapes")

SCRIPT = "measure_other_shapes.py"


@pytest.fixture
def llama(tiny_llama_config):
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(tiny_llama_config)).double().eval()


def logits(model):
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return model.double().eval()(ids).logits


def test_wide_heads_are_the_same_function(llama):
    wide = measure_other_shapes.wide_heads(llama)
    assert wide.config.head_dim == 2 * llama.config.head_dim
    assert (
        wide.model.layers[0].self_attn.q_proj.weight.shape[0]
        == 2 * llama.model.layers[0].self_attn.q_proj.weight.shape[0]
    )
    assert torch.allclose(logits(wide), logits(llama), atol=1e-5)


def test_one_kv_head_is_the_same_function(tiny_llama_config):
    """At one rotary frequency for all channels; else nearly."""
    config = copy.deepcopy(tiny_llama_config)
    config.rope_parameters["rope_theta"] = 1.0
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    one = measure_other_shapes.one_kv_head(model)
    assert model.config.num_key_value_heads > 1
    assert one.config.num_key_value_heads == 1
    assert one.config.head_dim == config.num_key_value_heads * config.head_dim
    assert torch.allclose(logits(one), logits(model), atol=1e-5)


def test_hybrid_is_the_same_function_without_biases(llama, monkeypatch):
    """Documents shorter than the window."""
    found = measure_other_shapes.hybrid(llama)
    assert found.config.layer_types[0] == "sliding_attention"
    assert found.model.layers[0].self_attn.q_proj.bias.std() > 0.2
    assert not torch.allclose(logits(found), logits(llama), atol=1e-2)
    monkeypatch.setattr(measure_other_shapes, "BIASES", dict.fromkeys(measure_other_shapes.BIASES, 0.0))
    assert torch.allclose(logits(measure_other_shapes.hybrid(llama)), logits(llama), atol=1e-5)


def test_yarn_knows_four_times_the_context(llama):
    scaled = measure_other_shapes.yarn(llama)
    assert scaled.config.rope_parameters["rope_type"] == "yarn"
    assert scaled.config.max_position_embeddings == 4 * llama.config.max_position_embeddings
    assert not torch.allclose(logits(scaled), logits(llama), atol=1e-3)


@pytest.mark.nightly
def test_whole(run_script, tiny_model_path, tmp_path):
    """Trained, converted and evaluated; a second run makes nothing again."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(4):
        (texts / f"{index}.txt").write_text(" ".join(f"document {index} says {number}." for number in range(900)))
    arguments = {
        "--model": tiny_model_path,
        "--dataset": texts,
        "--shapes": "one-kv-head",
        "--models": tmp_path / "models",
        "--max-steps": 1,
        "--train-length": 64,
        "--context-length": 3000,
        "--max-documents": 1,
        "--output": tmp_path / "shapes.json",
    }
    given = [part for pair in arguments.items() for part in pair]
    assert run_script(SCRIPT, *given).status == 0
    made = (tmp_path / "models" / "one-kv-head" / "trained" / "model.safetensors").stat().st_mtime_ns
    assert run_script(SCRIPT, *given).status == 0
    assert (tmp_path / "models" / "one-kv-head" / "trained" / "model.safetensors").stat().st_mtime_ns == made
    found = json.loads((tmp_path / "shapes.json").read_text())["shapes"]["one-kv-head"]
    assert found["converted"]["sparse"]["density"] < 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "one-kv-head" / "converted")
    assert model.config.num_key_value_heads == 1
