import copy
import threading

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.families import NUM_HEADS, NUM_LAYERS, tiny_model
from helpers.specification import cached_logits, logits

from hf_sparse_attn import record_density
from hf_sparse_attn.integration import observe


@pytest.mark.parametrize(
    ("family", "window", "fields"),
    [
        ("llama", 40, {"dense_below": 100}),
        ("llama", 40, {"dense_layers": [0, 1]}),
        ("mistral-sliding", 14, {"dense_below": 9, "dense_layers": [0, 1]}),
    ],
)
def test_dense_density_is_one(family, window, fields):
    model = tiny_model(family, **fields)
    with record_density(model) as recorder:
        logits(model, tokens(40, 2))
    admissible = sum(min(p + 1, window) for p in range(40)) * 2 * 2 * 4  # batch, layers, heads
    assert (recorder.attended, recorder.admissible, recorder.local) == (admissible, admissible, 0)
    assert recorder.density == 1.0


def test_decode_adds_up_to_one_shot():
    model, ids = tiny_model(num_random_keys=2, dense_below=9), tokens(40)
    with record_density(model) as one_shot:
        logits(model, ids)
    with record_density(model) as decode:
        cached_logits(model, ids, (13, 1))
    assert 0 < decode.attended < decode.admissible
    assert (decode.attended, decode.admissible) == (one_shot.attended, one_shot.admissible)


def test_padding_counts_nothing():
    model = tiny_model()
    rows = [tokens(length, seed=length)[0] for length in (40, 23)]
    ids, mask, position_ids = padded_batch(rows, "left", 5)
    with record_density(model) as together:
        logits(model, ids, attention_mask=mask, position_ids=position_ids)
    with record_density(model) as alone:
        for row in rows:
            logits(model, row[None])
    assert (together.attended, together.admissible) == (alone.attended, alone.admissible)


def test_training_step_counts_once():
    """The backward computes the rows again."""
    model, ids = tiny_model(), tokens(40)
    with record_density(model) as forward:
        logits(model, ids)
    with record_density(model) as step:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert (step.attended, step.admissible) == (forward.attended, forward.admissible)


def test_nothing_is_recorded_outside_the_block():
    model, calls = tiny_model(), []
    with record_density(model) as recorder, observe(model, lambda *arguments: calls.append(arguments)):
        logits(model, tokens(20))
    counted = recorder.attended
    logits(model, tokens(20))
    assert recorder.attended == counted > 0
    assert [call[0].layer_idx for call in calls] == [0, 1]


def test_an_error_ends_the_recording():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="stop"), record_density(model):
        raise RuntimeError("stop")
    assert not any("_sparse_attention_recorder" in module.__dict__ for module in model.modules())


def test_recorders_inside_each_other_count_the_same():
    model, ids = tiny_model(), tokens(40)
    with record_density(model) as outer:
        with record_density(model) as inner:
            logits(model, ids)
        with record_density(model) as inner_again:
            logits(model, ids)
        logits(model, ids)
    logits(model, ids)
    assert 0 < inner.attended == inner_again.attended
    assert (outer.attended, outer.admissible) == (3 * inner.attended, 3 * inner.admissible)


def test_observers_compute_without_autocast():
    seen = []
    model = tiny_model()
    with (
        torch.autocast("cpu", torch.bfloat16),
        observe(model, lambda *_: seen.append(torch.is_autocast_enabled("cpu"))),
    ):
        logits(model.float(), tokens(20))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * NUM_LAYERS


def test_observers_inside_each_other_are_all_told():
    model, told = tiny_model(), []
    with observe(model, lambda *_: told.append("outer")):
        with observe(model, lambda *_: told.append("inner")):
            logits(model, tokens(5))
        logits(model, tokens(5))
    assert told == ["outer", "inner"] * 2 + ["outer"] * 2  # two layers


def test_threads_count_their_own_forwards():
    model, counts = tiny_model(), {}
    barrier = threading.Barrier(3)

    def work(length):
        with record_density(model) as recorder:
            barrier.wait()
            logits(model, tokens(length))
            barrier.wait()
        counts[length] = recorder.admissible

    threads = [threading.Thread(target=work, args=(length,)) for length in (10, 20)]
    for thread in threads:
        thread.start()
    barrier.wait()
    with record_density(model) as own:
        logits(model, tokens(5))
    barrier.wait()
    for thread in threads:
        thread.join()
    pairs = NUM_LAYERS * NUM_HEADS
    assert counts == {length: pairs * length * (length + 1) // 2 for length in (10, 20)}
    assert own.admissible == pairs * 5 * 6 // 2


def test_a_copy_made_meanwhile_is_not_watched():
    model = tiny_model()
    with record_density(model) as recorder:
        logits(copy.deepcopy(model), tokens(5))
    assert recorder.admissible == 0


def test_an_error_inside_takes_the_recorder_away():
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), record_density(model) as recorder:
        raise ZeroDivisionError
    logits(model, tokens(5))
    assert recorder.admissible == 0
