"""The dense side of a comparison is dense, whichever way it is computed, and is SDPA's where in doubt."""

import logging

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model
from helpers.specification import logits

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.benchmarking.decoding import compare_generation
from hf_sparse_attn.benchmarking.speed import compare_model_speed
from hf_sparse_attn.evaluation import dense_attention
from hf_sparse_attn.evaluation.cache_policies import compare_policies
from hf_sparse_attn.evaluation.dense_attention import by_transformers, dense_implementation, dense_side
from hf_sparse_attn.evaluation.pattern_comparison import compare_patterns
from hf_sparse_attn.evaluation.perplexity import compare_perplexity
from hf_sparse_attn.integration import reading_everything

IDS = tokens(60)


@pytest.fixture
def compiled_loops(monkeypatch):
    monkeypatch.setattr(dense_attention.ops, "computes_dense_rows", lambda name, device: True)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2", "gemma3", "gpt_oss", "qwen3"])
def test_both_are_dense_and_leave_the_model_as_it_was(family):
    model = tiny_model(family, dtype=torch.float32)
    model.set_attn_implementation("eager")
    expected = logits(model, IDS)
    model.set_attn_implementation("sparse")
    sparse = logits(model, IDS)
    for block in (by_transformers, reading_everything):
        with block(model):
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(model, IDS), sparse, rtol=0, atol=0)
    assert not torch.allclose(sparse, expected, atol=1e-3)


def test_tiles_where_they_are_seen_to_agree(compiled_loops):
    assert dense_side(tiny_model(dtype=torch.float32), IDS[0].tolist(), fast=True) is reading_everything


def test_sdpa_for_another_dtype(compiled_loops):
    assert dense_side(tiny_model(dtype=torch.float64), IDS[0].tolist(), fast=True) is by_transformers


def test_sdpa_without_compiled_loops(monkeypatch):
    monkeypatch.setattr(dense_attention.ops, "computes_dense_rows", lambda name, device: False)
    assert dense_side(tiny_model(dtype=torch.float32), IDS[0].tolist(), fast=True) is by_transformers


def test_sdpa_where_nobody_asks_for_speed(compiled_loops):
    assert dense_side(tiny_model(dtype=torch.float32), IDS[0].tolist()) is by_transformers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_models_without_sdpa(family, dtype):
    """Their eager attention takes memory of the square of the length, and is asked for the first tokens alone."""
    model = tiny_model(family, dtype=dtype)
    assert dense_implementation(model) == "eager"
    assert dense_side(model, IDS[0].tolist()) is reading_everything
    assert model.config._attn_implementation == "sparse"


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_comparisons_of_models_without_sdpa(family):
    model = tiny_model(family, dtype=torch.float32)
    documents = [{"name": "some", "input_ids": IDS[0].tolist()}]
    found = compare_perplexity(model, documents)
    patterns = dict(compare_patterns(model, documents, [], {"any": (SparseAttentionConfig(), None)}, num_rows=4))
    policies = compare_policies(model, documents, [], ["h2o"], 0.5, 20)["rows"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(IDS, labels=IDS).loss.item()
    assert found["dense"]["nll"] == pytest.approx(expected, abs=1e-4)
    assert found["sparse"]["nll"] != pytest.approx(expected, abs=1e-4)
    assert policies[0]["nll"] == pytest.approx(expected, abs=1e-4)
    assert patterns["dense"]["nll"] == [pytest.approx(expected, abs=1e-4)]
    assert patterns["any"]["ratio"] == pytest.approx(1, abs=1e-5)  # nothing is sparse at this length


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_times_of_models_without_sdpa(family):
    model = tiny_model(family, dtype=torch.float32)
    assert compare_model_speed(model, IDS, repeats=1)["dense_ms"] > 0
    assert compare_generation(model, IDS, repeats=1)["dense_ms"] > 0
    assert model.config._attn_implementation == "sparse"


def test_a_difference_is_told(compiled_loops, monkeypatch, caplog):
    monkeypatch.setattr(dense_attention, "reading_everything", lambda model: torch.enable_grad())  # sparse all the same
    with caplog.at_level(logging.WARNING):
        assert dense_side(tiny_model(dtype=torch.float32), IDS[0].tolist(), fast=True) is by_transformers
    assert "please report it" in caplog.text


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_to_eager_is_told(monkeypatch, caplog, family, dtype):
    monkeypatch.setattr(dense_attention, "reading_everything", lambda model: torch.enable_grad())
    with caplog.at_level(logging.WARNING):
        assert dense_side(tiny_model(family, dtype=dtype), IDS[0].tolist()) is by_transformers
    assert "from those of eager attention" in caplog.text


def test_a_broken_model_is_not_told_of(compiled_loops, caplog):
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert dense_side(model, IDS[0].tolist(), fast=True) is by_transformers
    assert not caplog.text


def test_a_comparison_comes_to_the_same(compiled_loops):
    model = tiny_model(dtype=torch.float32)
    documents = [{"name": "some", "input_ids": IDS[0].tolist()}]
    one, two = (
        compare_perplexity(model, documents, dense_attention=block) for block in (by_transformers, reading_everything)
    )
    assert one["dense"]["nll"] == pytest.approx(two["dense"]["nll"], abs=1e-5)
    assert one["sparse"]["nll"] == two["sparse"]["nll"] != pytest.approx(one["dense"]["nll"], abs=1e-5)
    assert one["sparse"]["density"] == two["sparse"]["density"] < 1
