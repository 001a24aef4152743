from dataclasses import replace

import pytest
import torch
from helpers.batches import tokens
from helpers.families import NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, move_queries_and_keys, tiny_model
from helpers.small_choices import CONFIG, LENGTH, choose_from_few

from hf_sparse_attn.calibration.budget_allocation import allocation_of
from hf_sparse_attn.calibration.calibrate import calibrate, num_steps
from hf_sparse_attn.calibration.refit import MovedLayer, compare, not_fitted

KEY_BUDGET = 1000


@pytest.fixture(autouse=True)
def small_choices(monkeypatch):
    choose_from_few(monkeypatch)


def documents():
    return [tokens(LENGTH, seed=seed)[0] for seed in range(3)]


def converted(family="llama", density=0.3, **changes):
    """A tiny model, and the configuration and choice that were fitted to it."""
    model = tiny_model(family, dtype=torch.float32)
    calibration = calibrate(model, documents(), CONFIG.replace(**changes))
    return model, *calibration.choose(density, KEY_BUDGET)


def refit(model, old, density=None, **changes):
    """The calibration, the new configuration and choice, and what moved; None keeps the old density."""
    calibration = calibrate(model, documents(), CONFIG.replace(**changes), old=old)
    before = allocation_of(calibration.old_costs, old)
    new, choice = calibration.choose(density or before.density, KEY_BUDGET)
    return calibration, new, choice, compare(calibration, old, new, choice)


@pytest.mark.parametrize(("family", "density"), [("llama", 0.24), ("gemma3", 0.42)])
def test_a_trained_model_loses_less_at_the_same_density(family, density):
    model, old, _ = converted(family, density)
    move_queries_and_keys(model)
    _, new, choice, moved = refit(model, old)
    assert new.calibrated_hash != old.calibrated_hash
    assert moved.new == choice
    assert choice.density <= moved.old.density
    assert choice.loss < 0.97 * moved.old.loss
    assert sum(layer.num_changed for layer in moved.layers) > 0


def test_the_new_hash_finds_better_at_equal_budgets():
    model, old, _ = converted()
    move_queries_and_keys(model)
    calibration, _, _, moved = refit(model, old)
    assert moved.rehashed == allocation_of(calibration.costs, old)
    assert moved.rehashed.key_budget == moved.old.key_budget == old.key_budget
    assert moved.rehashed.loss < moved.old.loss


@pytest.mark.parametrize(("family", "density"), [("llama", 0.3), ("llama", 0.6), ("gemma3", 0.5)])
def test_nothing_moves_in_a_model_that_was_not_trained(family, density):
    model, old, choice = converted(family, density)
    calibration, new, again, moved = refit(model, old)
    assert new == old
    assert again == choice == moved.rehashed == moved.old
    assert torch.equal(calibration.old_costs.loss, calibration.costs.loss)
    assert {layer.num_changed for layer in moved.layers} == {0}
    assert all(layer.old_loss == layer.new_loss and layer.was_dense == layer.is_dense for layer in moved.layers)


def test_a_smallest_weight_of_0_stays():
    """In the conversion, and in a refit of a model that has none."""
    model, old, choice = converted(min_weight=0)
    assert old.min_weight == choice.min_weight == ((0.0,) * NUM_HEADS,) * NUM_LAYERS
    assert not_fitted(old).min_weight == 0
    assert not_fitted(old.replace(min_weight=[[0.0, *[1e-3] * (NUM_HEADS - 1)]] * NUM_LAYERS)).min_weight > 0
    move_queries_and_keys(model)
    calibration = calibrate(model, documents(), not_fitted(old), old=old)
    assert not any(map(any, calibration.choose(0.3, KEY_BUDGET)[1].min_weight))


def test_losses_of_layers_add_up():
    model, old, _ = converted()
    move_queries_and_keys(model)
    _, _, choice, moved = refit(model, old)
    assert [layer.layer for layer in moved.layers] == list(range(NUM_LAYERS))
    assert sum(layer.old_loss for layer in moved.layers) == pytest.approx(moved.old.loss)
    assert sum(layer.new_loss for layer in moved.layers) == pytest.approx(choice.loss)


def test_changed_heads_are_those_whose_weight_or_whose_kv_heads_budget_is_another_one():
    model, _, _ = converted()
    calibration = calibrate(model, documents(), CONFIG)
    fitted = calibration.config.replace(key_budget=((8, 16), (40, 40)), min_weight=((0.0,) * 4, (1e-3,) * 4))
    other = fitted.replace(key_budget=((8, 40), (40, 40)), min_weight=((1e-2, 0.0, 0.0, 1e-2), (1e-3,) * 4))
    calibration = calibrate(model, documents(), CONFIG, old=fitted)
    moved = compare(calibration, fitted, other, allocation_of(calibration.costs, other))
    assert [(layer.num_changed, layer.change) for layer in moved.layers] == [(3, "3 of 4 heads"), (0, "0 of 4 heads")]


def test_local_layers_are_in_no_comparison():
    model, old, _ = converted("gemma3", 0.5)
    assert old.dense_layers == (0,)
    move_queries_and_keys(model)
    calibration, new, _, moved = refit(model, old)
    assert calibration.local_layers == new.dense_layers == (0,)
    assert [layer.layer for layer in moved.layers] == [1]
    assert moved.layers[0].old_loss == pytest.approx(moved.old.loss)


def test_a_layer_that_was_local_and_no_longer_is():
    """The old hash has an empty place for it, and the old choice reads it whole."""
    model, old, _ = converted("gemma3", 0.5)
    calibration, new, _, moved = refit(model, old, 0.6, window_size=4, dense_below=10)
    assert calibration.local_layers == ()
    first = moved.layers[0]
    assert (first.layer, first.was_dense, first.old_loss) == (0, True, 0)
    assert first.is_dense == (0 in new.dense_layers)


def test_dense_layers_may_become_sparse():
    model, old, _ = converted(density=1.0)
    assert old.dense_layers == (0, 1)
    _, new, _, moved = refit(model, old, 0.3)
    assert new.dense_layers == ()
    assert (moved.old.density, moved.old.loss, moved.old.mean_key_budget) == (1, 0, 0)
    assert [layer.change for layer in moved.layers] == ["became sparse"] * 2
    assert all(layer.new_loss > layer.old_loss == 0 for layer in moved.layers)


@pytest.mark.parametrize(
    ("was_dense", "is_dense", "change"),
    [
        (False, False, "2 of 4 heads"),
        (False, True, "became dense"),
        (True, False, "became sparse"),
        (True, True, "stays dense"),
    ],
)
def test_change_in_words(was_dense, is_dense, change):
    assert MovedLayer(3, 0.1, 0.2, was_dense, is_dense, 2, 4).change == change


def test_progress():
    model, old, _ = converted()
    steps = []
    calibrate(model, documents(), CONFIG, steps.append, old=old)
    assert len(steps) == len(set(steps)) == num_steps(3, refit=True)


class TestAllocationOf:
    @pytest.mark.parametrize("density", [0.25, 0.4, 0.7, 1.0])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_what_was_chosen(self, family, density):
        model = tiny_model(family, dtype=torch.float32)
        calibration = calibrate(model, documents()[:1], CONFIG)
        config, choice = calibration.choose(max(density, calibration.costs.least_density), KEY_BUDGET)
        found = allocation_of(calibration.costs, config)
        if choice.dense_layers:  # whose budgets and weights mean nothing
            found, choice = (replace(x, key_budget=(), min_weight=()) for x in (found, choice))
        assert found == choice

    def test_one_number_for_all_and_numbers_that_were_not_measured(self):
        calibration = calibrate(tiny_model(dtype=torch.float32), documents()[:1], CONFIG)
        found = allocation_of(calibration.costs, calibration.config.replace(key_budget=15, min_weight=7e-3))
        assert found.key_budget == ((16,) * NUM_KV_HEADS,) * NUM_LAYERS
        assert found.min_weight == ((1e-2,) * NUM_HEADS,) * NUM_LAYERS
        largest = allocation_of(calibration.costs, calibration.config.replace(key_budget=5000, min_weight=0.0))
        assert largest.mean_key_budget == 40
