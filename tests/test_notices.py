"""What is told once per model: positions that the attention cannot follow, or that the model was not made for."""

import logging

import pytest
import torch
from helpers.batches import packed_documents, padded_batch, tokens
from helpers.families import tiny_model
from helpers.specification import logits
from transformers import DynamicCache, Phi3Config

from hf_sparse_attn import SparseCache, configure
from hf_sparse_attn.notices import tell_once
from hf_sparse_attn.ops import dispatch


@pytest.fixture
def heard(caplog):
    caplog.set_level(logging.WARNING, "hf_sparse_attn")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_sparse_attn")]


def left_padded():
    rows = [tokens(length, seed=length)[0] for length in (40, 33)]
    ids, mask, position_ids = padded_batch(rows, "left", 5)
    return {"input_ids": ids, "attention_mask": mask}, position_ids


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_left_padding_that_position_ids_count(heard):
    model, other = tiny_model(), tiny_model()
    inputs, position_ids = left_padded()
    run(model, **inputs, position_ids=position_ids)
    assert heard() == []
    for _ in range(3):
        run(model, **inputs)
    (message,) = heard()
    assert message.startswith("position_ids count the padding of a left-padded batch")
    run(other, **inputs)
    assert len(heard()) == 2


@pytest.mark.parametrize("fields", [{"dense_below": 100}, {"key_budget": 0}, {"dense_layers": [0, 1]}], ids=str)
def test_left_padding_that_changes_nothing(heard, fields):
    """Nothing is routed, so that nothing depends on what rotary embeddings count."""
    run(tiny_model(**fields), **left_padded()[0])
    assert heard() == []


def test_right_padding(heard):
    ids, mask, _ = padded_batch([tokens(length, seed=length)[0] for length in (40, 33)], "right", 5)
    run(tiny_model(), input_ids=ids, attention_mask=mask)
    assert heard() == []


def test_positions_that_start_anew(heard):
    rows, position_ids = packed_documents()
    ids = torch.cat(rows)[None]
    run(tiny_model(), input_ids=ids, position_ids=position_ids, use_cache=False)  # as Transformers takes for packed
    assert heard() == []
    model = tiny_model()
    for _ in range(2):
        run(model, input_ids=ids, position_ids=position_ids, attention_mask=torch.ones_like(ids))
        run(model, input_ids=ids, position_ids=position_ids, past_key_values=DynamicCache(config=model.config))
    (message,) = heard()
    assert message.startswith("position_ids repeat or start anew")


def test_padding_repeats_positions_and_is_no_news(heard):
    inputs, position_ids = left_padded()
    run(tiny_model(), **inputs, position_ids=position_ids)
    run(tiny_model(), **inputs, position_ids=position_ids.masked_fill(inputs["attention_mask"] == 0, 1))
    assert heard() == []


def test_beyond_the_trained_length(heard):
    model = tiny_model()
    model.config.max_position_embeddings = 40
    logits(model, tokens(40))
    assert heard() == []
    for _ in range(2):
        logits(model, tokens(41))
    (message,) = heard()
    assert message.startswith("positions reach beyond max_position_embeddings=40")


def test_beyond_the_trained_length_while_decoding(heard):
    model = tiny_model()
    model.config.max_position_embeddings = 40
    cache = SparseCache(model.config)
    run(model, input_ids=tokens(40), past_key_values=cache)
    assert heard() == []
    run(model, input_ids=tokens(1), past_key_values=cache)
    assert len(heard()) == 1


def test_packed_rows_reach_no_position_beyond(heard):
    model = tiny_model()
    model.config.max_position_embeddings = 40
    rows, position_ids = packed_documents()
    run(model, input_ids=torch.cat(rows)[None], position_ids=position_ids, use_cache=False)
    assert heard() == []


def test_models_that_drop_caches(heard):
    SparseCache(tiny_model().config)
    assert heard() == []
    config = Phi3Config(num_hidden_layers=2)
    for _ in range(2):
        SparseCache(config)
    (message,) = heard()
    assert "phi3 changes its rotary embeddings beyond 4096 tokens" in message


def test_each_message_once_per_model(heard):
    first, second = tiny_model().config, tiny_model().config
    for config in (first, second, first, second):
        tell_once(config, "one")
    tell_once(first, "two")
    assert heard() == ["one", "one", "two"]
    del first, second
    third = tiny_model().config
    tell_once(third, "one")
    assert len(heard()) == 4


class TestPackagesThatAreMissing:
    @pytest.fixture(autouse=True)
    def nothing_installed(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_installed", lambda package: False)
        dispatch._tell_what_is_missing.cache_clear()
        yield
        dispatch._tell_what_is_missing.cache_clear()

    def test_is_told_once_when_rows_are_sparse(self, heard):
        for length in (40, 50):
            run(tiny_model(dense_below=39), input_ids=tokens(length))
        (message,) = heard()
        assert message.endswith("slower than dense attention up to 16000 tokens and more: pip install numba")

    @pytest.mark.parametrize(
        "fields", [{"dense_below": 40}, {"dense_layers": (0, 1)}, {"implementation": "torch"}], ids=str
    )
    def test_nothing_is_told_without_sparse_rows_or_where_it_was_asked_for(self, heard, fields):
        ids, mask, _ = padded_batch([tokens(length)[0] for length in (40, 33)], "left", 0)
        model = tiny_model()
        configure(model, **fields)
        run(model, input_ids=ids, attention_mask=mask)
        assert not [message for message in heard() if "pip install" in message]
