"""The dense side of a comparison is dense, whichever way it is computed, and is SDPA's where in doubt."""

import logging

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model
from helpers.specification import logits

from hf_sparse_attn.evaluation import dense_attention
from hf_sparse_attn.evaluation.dense_attention import by_sdpa, fastest
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
    for block in (by_sdpa, reading_everything):
        if block is by_sdpa and family in ("gemma2", "gpt_oss"):  # SDPA knows no softcap and no sinks
            continue
        with block(model):
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(model, IDS), sparse, rtol=0, atol=0)
    assert not torch.allclose(sparse, expected, atol=1e-3)


def test_tiles_where_they_are_seen_to_agree(compiled_loops):
    assert fastest(tiny_model(dtype=torch.float32), IDS[0].tolist()) is reading_everything


def test_sdpa_for_another_dtype(compiled_loops):
    assert fastest(tiny_model(dtype=torch.float64), IDS[0].tolist()) is by_sdpa


def test_sdpa_without_compiled_loops(monkeypatch):
    monkeypatch.setattr(dense_attention.ops, "computes_dense_rows", lambda name, device: False)
    assert fastest(tiny_model(dtype=torch.float32), IDS[0].tolist()) is by_sdpa


def test_a_difference_is_told(compiled_loops, monkeypatch, caplog):
    monkeypatch.setattr(dense_attention, "reading_everything", lambda model: torch.enable_grad())  # sparse all the same
    with caplog.at_level(logging.WARNING):
        assert fastest(tiny_model(dtype=torch.float32), IDS[0].tolist()) is by_sdpa
    assert "please report it" in caplog.text


def test_a_broken_model_is_not_told_of(compiled_loops, caplog):
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert fastest(model, IDS[0].tolist()) is by_sdpa
    assert not caplog.text


def test_a_comparison_comes_to_the_same(compiled_loops):
    model = tiny_model(dtype=torch.float32)
    documents = [{"name": "some", "input_ids": IDS[0].tolist()}]
    one, two = (compare_perplexity(model, documents, dense_attention=block) for block in (by_sdpa, reading_everything))
    assert one["dense"]["nll"] == pytest.approx(two["dense"]["nll"], abs=1e-5)
    assert one["sparse"]["nll"] == two["sparse"]["nll"] != pytest.approx(one["dense"]["nll"], abs=1e-5)
    assert one["sparse"]["density"] == two["sparse"]["density"] < 1
