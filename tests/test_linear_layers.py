"""Faster linear layers: the same results, only where they may be, and only in their block."""

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import tokens
from helpers.families import tiny_model
from torch import nn

from hf_sparse_attn import linear_layers
from hf_sparse_attn.evaluation.perplexity import token_nll
from hf_sparse_attn.linear_layers import coarse_linear_layers, fast_linear_layers

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    found = []
    operation = linear_layers._linear()
    if operation is None:
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(linear_layers, "_linear", lambda: lambda *given: found.append(given) or operation(*given))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(200, 24), (2, 100, 24), (1, 64, 24)])
def test_results_are_those_of_float32(calls, shape, bias):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    with torch.no_grad():
        with fast_linear_layers(layer):
            found = layer(x)
        expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert len(calls) == 1
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gradients", "few rows", "float64", "bfloat16", "afterwards", "gradients inside"])
def test_all_else_stays_as_it_was(calls, case):
    layer, x = nn.Linear(24, 40), torch.randn(200, 24)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    layer, x = layer.to(dtype), x.to(dtype)[: 10 if case == "few rows" else None]
    expected = layer(x)
    with torch.set_grad_enabled(case == "gradients"), fast_linear_layers(layer):
        if case == "afterwards":
            pass
        elif case == "gradients inside":
            with torch.enable_grad():
                found = layer(x)
        else:
            found = layer(x)
    if case == "afterwards":
        with torch.no_grad():
            found = layer(x)
    assert torch.equal(found, expected)
    assert not calls


def test_products_of_a_float32_model_are_coarse_where_the_processor_is_fast_at_it(monkeypatch):
    layer, x = nn.Linear(24, 40), torch.randn(200, 24)
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(linear_layers, "_has_bfloat16", lambda capable=capable: capable)
        with torch.no_grad(), coarse_linear_layers(layer, CPU):
            assert layer(x).dtype == dtype
        assert layer(x).dtype == torch.float32
    monkeypatch.setattr(linear_layers, "_has_bfloat16", lambda: True)
    with torch.no_grad(), coarse_linear_layers(layer.double(), CPU):  # a model of another dtype is left alone
        assert layer(x.double()).dtype == torch.float64


def test_offloaded_weights_are_computed_with_as_any_others(monkeypatch):
    """Between forwards they are on "meta"."""
    monkeypatch.setattr(linear_layers, "_has_bfloat16", lambda: True)
    for device, coarse in ((CPU, True), (torch.device("meta"), False)):
        with torch.no_grad(), coarse_linear_layers(nn.Linear(24, 40, device="meta"), device):
            assert torch.is_autocast_enabled("cpu") == coarse


def test_the_instructions_are_found_by_their_names(monkeypatch):
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert linear_layers._has_bfloat16() == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not linear_layers._has_bfloat16()


def test_other_classes_and_the_layers_own_come_back(calls):
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(24, 24), Other(24, 24))
    with torch.no_grad():
        with fast_linear_layers(model):
            model(torch.randn(200, 24))
            assert isinstance(model[0], nn.Linear)
        with pytest.raises(KeyError), fast_linear_layers(model):
            raise KeyError
    assert [type(layer) for layer in model] == [nn.Linear, Other]
    assert len(calls) == 1


def test_a_compiled_model_is_evaluated(calls):
    model, ids = tiny_model(dtype=torch.float32), tokens(100)
    expected = token_nll(model, ids)
    assert calls
    torch.testing.assert_close(token_nll(torch.compile(model, backend="aot_eager"), ids), expected)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(token_nll(model, ids), expected)
    torch.compiler.reset()
