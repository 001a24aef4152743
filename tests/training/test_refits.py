"""Refits while a model trains, and the keys that training, evaluation and generation read."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.batches import tokens
from helpers.families import move_queries_and_keys, tiny_model
from helpers.small_choices import CONFIG, LENGTH, choose_from_few

from hf_sparse_attn import SparseAttentionConfig, SparseCache
from hf_sparse_attn.calibration.calibrate import calibrate, minimum_tokens
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.integration import record
from hf_sparse_attn.training import FinetuneArguments, FinetuneTrainer, make_trainer, refits, train
from hf_sparse_attn.training.refits import check_refits, hash_recall


@pytest.fixture(autouse=True)
def small_choices(monkeypatch):
    choose_from_few(monkeypatch)


def converted():
    model = tiny_model(dtype=torch.float32)
    calibration = calibrate(model, [tokens(LENGTH, seed=seed)[0] for seed in range(2)], CONFIG)
    model.config.sparse_attention = calibration.choose(0.3, 1000)[0].to_dict()
    return model


def trainer_of(output, model=None, **changes):
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokens(LENGTH, seed=seed)[0].tolist() for seed in range(3))]
    defaults = {"max_steps": 4, "learning_rate": 0.01, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    arguments = FinetuneArguments(output_dir=str(output), **defaults | changes)
    if model is None:
        model = converted()
        move_queries_and_keys(model)
    return make_trainer(model, None, rows, arguments)


def fields_in(folder):
    return json.loads((folder / "config.json").read_text())["sparse_attention"]


def test_refits_are_made_told_and_saved(tmp_path):
    trainer = trainer_of(tmp_path, refit_every=2, save_steps=2)
    old = dict(trainer.model.config.sparse_attention)
    results = train(trainer)
    entries = [entry for entry in trainer.state.log_history if "refit_recall" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        loss = entry["refit_predicted_loss"]
        assert entry["refit_is_taken"] == (loss["after"] < loss["before"])
        assert 0 < entry["refit_recall"]["before"] <= 1
    assert entries[0]["refit_is_taken"]
    assert {"hash_recall_before", "hash_recall_after"} <= set(results)
    fields = [fields_in(tmp_path / folder) for folder in ("checkpoint-2", "checkpoint-4", ".")]
    assert fields[0]["calibrated_hash"] != old["calibrated_hash"]
    assert fields[1] == fields[2]
    assert fields[0]["dense_below"] == old["dense_below"]


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["full", "lora"])
def test_a_resumed_training_reads_the_keys_of_an_uninterrupted_one(tmp_path, changes):
    """The checkpoint comes with the hash that was fitted before it, not with the one that the model began with."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = trainer_of(whole, refit_every=2, save_steps=1, save_total_limit=9, **changes)
    train(expected)
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    again = trainer_of(resumed, resume_from_checkpoint=str(resumed / "checkpoint-3"), refit_every=2, **changes)
    train(again)
    assert again.model.config.sparse_attention == expected.model.config.sparse_attention
    for name, weight in again.model.state_dict().items():
        torch.testing.assert_close(weight, expected.model.state_dict()[name], rtol=0, atol=1e-6)


def test_a_resumed_training_without_refits_keeps_what_was_fitted(tmp_path):
    trainer = trainer_of(tmp_path / "out", refit_every=2, save_steps=2)
    train(trainer)
    resume = str(tmp_path / "out" / "checkpoint-2")
    again = trainer_of(tmp_path / "again", resume_from_checkpoint=resume, max_steps=3)
    train(again)
    assert again.model.config.sparse_attention == fields_in(tmp_path / "out" / "checkpoint-2")


def test_a_refit_that_would_not_help_is_not_taken(tmp_path, monkeypatch):
    """Here the model's own choice is the best one already."""
    model = converted()
    old = model.config.sparse_attention
    monkeypatch.setattr(FinetuneTrainer, "training_step", lambda trainer, *args: torch.zeros(()))
    trainer = trainer_of(tmp_path, model, refit_every=1, max_steps=1, learning_rate=0.0)
    monkeypatch.setattr("hf_sparse_attn.training.refits.refit", worse())
    train(trainer)
    assert model.config.sparse_attention == old
    assert not trainer.state.log_history[0]["refit_is_taken"]


def worse():
    original = refits.refit

    def refit(model, documents, old):
        new, moved = original(model, documents, old)
        return new.replace(key_budget=1), dataclasses.replace(moved, new=dataclasses.replace(moved.new, loss=1e9))

    return refit


class Keys:
    """Collects the keys of every sparse row by layer, head and position."""

    def __init__(self):
        self.rows = {}

    def add(self, pattern, head, position, num_attended, num_scored, read):
        attended, keys = read()
        for row, some, which in zip(position.tolist(), attended, keys, strict=True):
            if row >= CONFIG.dense_below:
                self.rows[pattern.layer_idx, head, row] = frozenset(which[some].tolist())

    def add_dense(self, pattern, heads, start, stop):
        pass


@pytest.mark.parametrize("implementation", ["auto", "torch", "reference"])
def test_training_evaluation_and_generation_read_the_same_keys(tmp_path, implementation):
    trainer = trainer_of(tmp_path, refit_every=2)
    train(trainer)
    model, ids = trainer.model, tokens(LENGTH, seed=7)
    model.config.sparse_attention = model.config.sparse_attention | {"implementation": implementation}
    found = {}
    with record(model, keys := Keys()):
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found["training"] = keys.rows
    with record(model, keys := Keys()), torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
    found["evaluation"] = keys.rows
    with record(model, keys := Keys()), torch.no_grad():
        cache = SparseCache(model.config)
        for start, stop in [(0, 150), *((i, i + 1) for i in range(150, LENGTH))]:
            model(input_ids=ids[:, start:stop], past_key_values=cache)
    found["generation"] = keys.rows
    assert len(found["training"]) == 2 * 4 * (LENGTH - CONFIG.dense_below)
    assert found["evaluation"] == found["training"]
    assert found["generation"] == found["training"]


def test_recall_falls_where_queries_and_keys_move():
    model = converted()
    documents = [tokens(LENGTH, seed=9)[0]]
    config = SparseAttentionConfig.from_dict(model.config.sparse_attention)
    before = hash_recall(model.train(), documents, config.replace(key_budget=0))
    assert before[1] < before[0] < 1
    assert model.training
    move_queries_and_keys(model)
    assert hash_recall(model, documents)[0] != before[0]
    model.config.sparse_attention = {"dense_below": LENGTH}
    assert hash_recall(model, documents) is None


def test_refused(tmp_path):
    with pytest.raises(ArgumentError, match="refit_every: the model was not converted"):
        trainer_of(tmp_path, tiny_model(dtype=torch.float32), refit_every=2)
    config = SparseAttentionConfig.from_dict(converted().config.sparse_attention)
    with pytest.raises(ArgumentError, match=f"refit_every: needs rows of at least {minimum_tokens(config)}.*got 40"):
        check_refits(config, 40)
    with pytest.raises(ValueError, match=r"refit_every must be .*at least 1, got 0"):
        trainer_of(tmp_path, refit_every=0)


def test_weights_in_parts_are_not_refitted(tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneTrainer, "is_sharded", True)
    with pytest.raises(ArgumentError, match="refit_every: needs whole weights"):
        trainer_of(tmp_path, refit_every=2)
    assert trainer_of(tmp_path).hash_recall() is None
