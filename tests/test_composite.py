"""Vision-language models: what is sparse is their text model, and its config is where everything stands."""

import json

import pytest
import torch
from helpers.batches import tokens
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from hf_sparse_attn import configure, record_density
from hf_sparse_attn.calibration.calibrate import calibrate
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.evaluation.perplexity import compare_perplexity, token_nll
from hf_sparse_attn.integration import configured, merge_sparse_attention, observe_dense
from hf_sparse_attn.loading import load_sparse_model

FIELDS = {
    "window_size": 8,
    "num_global_tokens": 2,
    "key_budget": 12,
    "min_weight": 0.0,
    "dense_below": 0,
    "page_size": 16,
    "num_hash_bits": 4,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    text = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 512,
        "layer_types": ["full_attention"] * 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    ids = {"image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    path = tmp_path_factory.mktemp("composite")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def density(model):
    with torch.no_grad(), record_density(model) as recorder:
        model(input_ids=tokens(200))
    return recorder.density


def test_overrides_reach_the_text_model(path):
    assert density(load_sparse_model(path).eval()) == 1
    assert density(load_sparse_model(path, FIELDS).eval()) < 0.5


def test_configure(path):
    model = load_sparse_model(path).eval()
    configure(model, **FIELDS)
    assert density(model) < 0.5


def test_what_is_set_is_saved_and_loaded_again(path, tmp_path):
    load_sparse_model(path, FIELDS).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "sparse_attention" not in saved
    assert saved["text_config"]["sparse_attention"]["window_size"] == 8
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse").eval()
    assert density(again) == density(load_sparse_model(path, FIELDS).eval())


def test_merging_reads_the_text_models_fields_and_shape(path):
    config = AutoConfig.from_pretrained(path)
    config.text_config.sparse_attention = {"window_size": 9}
    assert merge_sparse_attention(config, {"stride": 7})["window_size"] == 9
    with pytest.raises(ValueError, match="min_weight lists 3 heads"):
        merge_sparse_attention(config, {"min_weight": [[0.0] * 4, [0.0] * 3]})


def test_dense_for_a_while(path):
    model = load_sparse_model(path, FIELDS).eval()
    sparse = density(model)
    with observe_dense(model, lambda *_: None):
        assert density(model) == 1
    assert density(model) == sparse
    with configured(model, {**FIELDS, "key_budget": 0}):
        assert density(model) < sparse
    assert density(model) == sparse


def test_perplexity_and_calibration(path):
    model = load_sparse_model(path, FIELDS).eval()
    ids = tokens(200)
    nll = token_nll(model, ids)
    logits = model(input_ids=ids).logits[0, :-1].detach()
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    config = SparseAttentionConfig(**FIELDS)
    fitted, _ = calibrate(model, [ids[0]], config).choose(0.3, 64)
    assert fitted.hash == "calibrated"
    configure(model, **fitted.to_dict())
    found = compare_perplexity(model, [{"name": "a", "input_ids": ids[0].tolist()}])
    assert found["sparse"]["density"] < 0.35
