"""torch.compile and torch.export see one opaque operation that gives the eager answer, forward and backward.

Which families and caches work is in the matrix; here is what is special about graphs.
"""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.operation import calibrated_hash_text
from helpers.specification import TOLERANCE, logits

from hf_sparse_attn import record_density
from hf_sparse_attn.side_channels import WATCHED

CALIBRATED = {"hash": "calibrated", "calibrated_hash": calibrated_hash_text(), "key_budget": [[0, 3], 4]}

pytestmark = pytest.mark.usefixtures("fresh_graphs")


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def padded():
    rows = [tokens(length, seed=length)[0] for length in (40, 33)]
    ids, mask, position_ids = padded_batch(rows, "left", 3)
    return ids, {"attention_mask": mask, "position_ids": position_ids}


@pytest.mark.parametrize("fields", [{}, CALIBRATED], ids=["random hash", "calibrated hash"])
def test_forward(fields):
    ids, inputs = padded()
    model = tiny_model(**fields)
    torch.testing.assert_close(logits(compiled(model), ids, **inputs), logits(model, ids, **inputs), **TOLERANCE)


def test_configuration_changed_after_compilation():
    model, ids = tiny_model(), tokens(40)
    graph = compiled(model)
    before = logits(graph, ids)
    model.config.sparse_attention = {**model.config.sparse_attention, "window_size": 12}
    after = logits(graph, ids)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, logits(tiny_model(window_size=12), ids), **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"], ids=["", "sinks"])
def test_gradients(family):
    gradients = []
    for prepare in (compiled, lambda model: model):
        model, ids = tiny_model(family).train(), tokens(40, 2)
        prepare(model)(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(gradient.any() for name, gradient in gradients[0].items() if "k_proj.weight" in name or "sinks" in name)
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_gradients_of_padding_alone_are_zero():
    model, ids = tiny_model().train(), tokens(8)
    graph = compiled(model)
    graph(ids, attention_mask=torch.zeros_like(ids), labels=ids, use_cache=False).loss.backward()
    assert not model.model.layers[0].self_attn.k_proj.weight.grad.any()


def test_bidirectional():
    """Padded, too, where the mask tells by its shape that attention is not causal."""
    model, ids = tiny_model(), tokens(40, 2)
    model.config.is_causal = False
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    for others in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(logits(compiled(model), ids, **others), logits(model, ids, **others), **TOLERANCE)


LOADING = """
import sys, torch, hf_sparse_attn
program = torch.export.load(sys.argv[1])
ids = torch.load(sys.argv[2])
torch.save(program.module()(ids, use_cache=False).logits, sys.argv[3])
"""


def test_an_exported_model_stands_alone(tmp_path):
    """Saved, and loaded in another process."""
    model, ids = tiny_model(**CALIBRATED), tokens(40)
    exported = torch.export.export(model, (ids,), {"use_cache": False})
    torch.export.save(exported, tmp_path / "model.pt2")
    torch.save(ids, tmp_path / "ids.pt")
    paths = [tmp_path / name for name in ("model.pt2", "ids.pt", "logits.pt")]
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", LOADING, *paths], check=True, cwd=root)
    torch.testing.assert_close(torch.load(paths[2]), logits(model, ids), **TOLERANCE)


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_it_stays_outside_of_cuda_graphs(name):
    """Inductor's mode "reduce-overhead" asks for this tag; the operations read masks on the host."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.hf_sparse_attn, name).default.tags


class TestRecording:
    """Forwards of a graph are recorded as eager ones are."""

    def test_density(self):
        model, ids = tiny_model(), tokens(40, 2)
        graph = compiled(model)
        with record_density(model) as expected:
            logits(model, ids)
        logits(graph, ids)  # compiled before anybody watches
        for _ in range(2):
            with record_density(model) as found:
                logits(graph, ids)
            assert (found.attended, found.scored, found.admissible) == (
                expected.attended,
                expected.scored,
                expected.admissible,
            )
        with record_density(model) as found:
            pass
        logits(graph, ids)  # and when nobody watches any more
        assert found.admissible == 0

    def test_another_model_is_not_recorded(self):
        model, other = tiny_model(), tiny_model()
        with record_density(model) as found:
            logits(compiled(other), tokens(40))
        assert found.admissible == 0

    def test_a_backward_is_recorded_once(self):
        model, ids = tiny_model().train(), tokens(40)
        with record_density(model) as expected:
            model(ids, labels=ids, use_cache=False)
        with record_density(model) as found:
            compiled(model)(ids, labels=ids, use_cache=False).loss.backward()
        assert found.admissible == expected.admissible > 0

    def test_layers_compiled_one_by_one(self):
        model, ids = tiny_model(), tokens(40)
        with record_density(model) as expected:
            logits(model, ids)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        with record_density(model) as found:
            logits(model, ids)
        assert found.attended == expected.attended > 0

    def test_a_thread_of_its_own_is_not_recorded(self):
        model, ids = tiny_model(), tokens(40)
        graph = compiled(model)
        with record_density(model) as found:
            thread = threading.Thread(target=logits, args=(graph, ids))
            thread.start()
            thread.join()
        assert found.admissible == 0


def test_nothing_stays_on_watched_modules():
    model = tiny_model()
    with record_density(model), record_density(model.model):
        with record_density(model.model.layers[0]):
            pass
        assert all(WATCHED in module.__dict__ for module in model.modules())
    assert not any(WATCHED in module.__dict__ for module in model.modules())
