"""Fields that only earlier releases had, played by names that no release had."""

import json
import logging
import shutil

import pytest
import torch
from helpers.batches import tokens
from transformers import AutoModelForCausalLM

from hf_sparse_attn import SparseAttentionConfig, configure, retired_fields


@pytest.fixture(autouse=True)
def retired(monkeypatch):
    monkeypatch.setitem(retired_fields.RENAMED, "local_window", "window_size")
    monkeypatch.setitem(retired_fields.REMOVED, "num_tables", 1)
    retired_fields._warn.cache_clear()


@pytest.fixture
def heard(caplog):
    caplog.set_level(logging.WARNING, "hf_sparse_attn")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_sparse_attn")]


def test_an_old_checkpoint_loads_with_one_warning(tiny_model_path, tmp_path, heard):
    old = shutil.copytree(tiny_model_path, tmp_path / "old")
    written = json.loads((old / "config.json").read_text())
    written["sparse_attention"]["local_window"] = written["sparse_attention"].pop("window_size")
    (old / "config.json").write_text(json.dumps(written))
    today, loaded, again = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse") for path in (tiny_model_path, old, old)
    )
    with torch.no_grad():
        expected, *logits = (model(tokens(60)).logits for model in (today, loaded, loaded, again))
    assert all(torch.equal(expected, other) for other in logits)
    assert heard() == [
        "sparse_attention: local_window is now called window_size; a later release will not know the old name"
    ]
    configure(loaded, num_global_tokens=1)
    loaded.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())["sparse_attention"]
    assert (saved["window_size"], saved["num_global_tokens"]) == (8, 1)
    assert "local_window" not in saved


def test_old_names_wherever_fields_are_given(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="sparse")
    assert configure(model, local_window=5).window_size == 5
    assert SparseAttentionConfig.preset("longformer", local_window=9).window_size == 9
    by_layer = SparseAttentionConfig(by_layer=[{"local_window": 3}, {"window_size": 4}])
    assert [by_layer.of_layer(layer).window_size for layer in (0, 1)] == [3, 4]


def test_a_removed_field(heard):
    for _ in range(2):
        assert SparseAttentionConfig.from_dict({"num_tables": 1, "seed": 3}) == SparseAttentionConfig(seed=3)
    assert heard() == ["sparse_attention: num_tables was removed and did nothing here; leave it out"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"local_window": 4, "window_size": 4}, "local_window is the old name of window_size"),
        ({"num_tables": 2}, "num_tables was removed: only 1, which did nothing, is read; got 2"),
        ({"local_window": 0}, "window_size must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SparseAttentionConfig.from_dict(fields)


def test_todays_fields_are_not_retired():
    names = SparseAttentionConfig().to_dict().keys() | {"calibrated_hash"}
    assert not names & (retired_fields.RENAMED.keys() | retired_fields.REMOVED.keys())
    assert {new for old, new in retired_fields.RENAMED.items()} <= names
