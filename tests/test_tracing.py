"""Tensors without values, transforms that cannot work, weights that are elsewhere."""

import copy

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model
from helpers.specification import logits
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from transformers import AutoModelForCausalLM

from hf_sparse_attn import SparseAttentionConfig, SparseCache, check_model, sparse_attention
from hf_sparse_attn.evaluation.perplexity import compare_perplexity
from hf_sparse_attn.integration import configure
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.tracing import input_device

IMPLEMENTATIONS = ("numba", "torch", "reference")


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_meta_tensors_give_shapes(family):
    """With a mask, without which Transformers itself reads position_ids."""
    model = tiny_model(family).to("meta")
    ids = torch.zeros(2, 30, dtype=torch.long, device="meta")
    assert logits(model, ids, attention_mask=torch.ones_like(ids)).shape == (2, 30, 64)


def test_meta_tensors_go_through_a_cache():
    model = tiny_model().to("meta")
    cache = SparseCache(model.config)
    for length in (30, 1):
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        assert model(ids, past_key_values=cache).logits.shape == (1, length, 64)


def test_fake_tensors_give_shapes(tiny_llama_config):
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_llama_config), attn_implementation="sparse")
        ids = torch.zeros(2, 30, dtype=torch.long)
        assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 30, 256)
        assert model(ids, past_key_values=SparseCache(model.config)).logits.shape == (2, 30, 256)
        model(ids).logits.sum().backward()
        assert model.model.layers[0].self_attn.k_proj.weight.grad.shape == (16, 32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jit_trace_is_refused(implementation):
    model = tiny_model()
    configure(model, implementation=implementation)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with pytest.raises(ValueError, match=r"does not support torch.jit.trace.*torch.export"):
        torch.jit.trace(Logits(), tokens(30), check_trace=False)
    x = torch.randn(1, 2, 30, 8)
    config = SparseAttentionConfig(implementation=implementation)
    with pytest.raises(ValueError, match=r"torch.export"):
        torch.jit.trace(lambda q: sparse_attention(q, q, q, config=config), x, check_trace=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dense_below", [0, 100])
def test_torch_func_is_refused(implementation, dense_below):
    model = tiny_model(dense_below=dense_below)
    configure(model, implementation=implementation)
    weights = dict(model.named_parameters())

    def loss(weights):
        return functional_call(model, weights, (tokens(30),)).logits.sum()

    x = torch.randn(3, 1, 2, 30, 8)
    config = SparseAttentionConfig(implementation=implementation, dense_below=dense_below)
    attend = lambda q: sparse_attention(q, q, q, config=config)  # noqa: E731
    for transformed in (
        lambda: grad(loss)(weights),
        lambda: vmap(lambda ids: model(ids).logits)(tokens(30, 3)[:, None]),
        lambda: vmap(attend)(x),
        lambda: jvp(attend, (x[0],), (x[0],)),
    ):
        with pytest.raises(ValueError, match=r"does not support torch.func transforms"):
            transformed()


@pytest.mark.parametrize("fields", [{}, {"key_budget": [4, 9, 2, 7, 5, 3], "dense_layers": [3]}, {"dense_below": 99}])
def test_layers_compiled_one_by_one_share_graphs(fields):
    """SDPA makes one graph; the layer's index, where rows are sparse, becomes a variable of the second."""
    model = tiny_model(**fields)
    layers = [tiny_model(**fields).model.layers[0] for _ in range(6)]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx, layer.self_attn.config = i, model.config
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = 6
    ids = tokens(40)
    expected = logits(model, ids)
    counter = CompileCounter()
    torch._dynamo.reset()
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(logits(model, ids), expected)
    assert counter.frame_count == (1 if fields.get("dense_below") else 2)


class TestWeightsOnDisk:
    @pytest.fixture
    def model(self, tiny_model_path, tmp_path):
        options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
        dense = AutoModelForCausalLM.from_pretrained(tiny_model_path, **options)
        if not hasattr(dense.get_input_embeddings(), "_hf_hook"):
            pytest.skip("this release of Transformers leaves such weights on the meta device")
        return load_sparse_model(str(tiny_model_path), **options)

    def test_check_model(self, model):
        assert input_device(model) == torch.device("cpu")
        check_model(model)

    def test_perplexity(self, model, tiny_model_path):
        documents = [{"name": "a", "input_ids": list(range(60))}]
        found = compare_perplexity(model, documents)
        expected = compare_perplexity(load_sparse_model(str(tiny_model_path)).eval(), documents)
        assert found["sparse"]["nll"] == pytest.approx(expected["sparse"]["nll"], rel=1e-5)
