import attention_checks as checks
import pytest
from attention_checks import (
    logits,
    padded_batch,
    tiny_model,
    tokens,
)

from hf_sparse_attn import record_density
from hf_sparse_attn.integration import observe


def test_dense_density_is_one():
    model = tiny_model("mistral-sliding", dense_below=100)
    with record_density(model) as recorder:
        logits(model, tokens(40, 2))
    admissible = sum(min(p + 1, 14) for p in range(40)) * 2 * 2 * 4  # batch, layers, heads
    assert (recorder.attended, recorder.admissible, recorder.density) == (admissible, admissible, 1.0)


def test_decode_adds_up_to_one_shot():
    model, ids = tiny_model(num_random_keys=2, dense_below=9), tokens(40)
    with record_density(model) as one_shot:
        logits(model, ids)
    with record_density(model) as decode:
        checks.cached_logits(model, ids, (13, 1))
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
