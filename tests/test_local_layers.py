"""Layers whose own sliding window is at most `dense_below` are read whole, and count in no density."""

import pytest
import torch
import transformers as hf
from helpers.batches import tokens
from helpers.families import FAMILIES, HEAD_DIM, NUM_HEADS, tiny_model
from helpers.specification import logits

from hf_sparse_attn import SparseCache, record_density
from hf_sparse_attn.config import layer_shape, sliding_windows
from hf_sparse_attn.evaluation.perplexity import compare_perplexity
from hf_sparse_attn.integration import check_model, configured, merge_sparse_attention, observe

LENGTH = 90
LOCAL = {"dense_below": 14}  # the families' window


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss", "qwen2-mixed"])
@pytest.mark.parametrize("implementation", ["torch", "numba"])
def test_local_layers_read_everything_and_the_others_stay_sparse(family, implementation):
    seen = {}

    def observer(pattern, query, key, value, scaling, output):
        seen[pattern.layer_idx] = pattern.dense_rows()

    ids = tokens(LENGTH, 2)
    model = tiny_model(family, **LOCAL)
    model.config.sparse_attention["implementation"] = implementation
    with observe(model, observer):
        ours = logits(model, ids)
    windows = sliding_windows(model.config)
    assert set(windows.values()) == {14, None}
    assert seen == {layer: 14 if window is None else None for layer, window in windows.items()}
    model.config.sparse_attention["implementation"] = "reference"
    torch.testing.assert_close(ours, logits(model, ids), rtol=1e-9, atol=1e-9)


def test_a_model_of_local_layers_alone_is_the_dense_model():
    ids = tokens(LENGTH, 2)
    sparse, sdpa = (tiny_model("mistral-sliding", name, **LOCAL) for name in ("sparse", "sdpa"))
    torch.testing.assert_close(logits(sparse, ids), logits(sdpa, ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cache", [hf.DynamicCache, SparseCache])
def test_the_same_in_chunks_and_in_decode(cache):
    model, ids = tiny_model("gemma3", **LOCAL), tokens(LENGTH)
    whole = logits(model, ids)
    kept, parts = cache(config=model.config), []
    with torch.no_grad():
        for part in ids.split([30, 1, 1, 40, 1, 17], 1):
            parts.append(model(input_ids=part, past_key_values=kept, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


class TestDensity:
    def test_pairs_of_local_layers_do_not_count(self):
        model = tiny_model("gemma3", **LOCAL)
        with record_density(model) as recorder:
            logits(model, tokens(LENGTH, 2))
        assert recorder.admissible == 2 * NUM_HEADS * LENGTH * (LENGTH + 1) / 2
        assert recorder.local == 2 * NUM_HEADS * sum(min(p + 1, 14) for p in range(LENGTH))
        assert 0 < recorder.attended < recorder.scored < recorder.admissible

    def test_a_layer_that_is_dense_by_choice_counts(self):
        model = tiny_model("gemma3", dense_below=13, dense_layers=(0, 1))
        with record_density(model) as recorder:
            logits(model, tokens(LENGTH))
        assert (recorder.local, recorder.density) == (0, 1)

    def test_a_model_of_local_layers_alone_reads_everything(self):
        model = tiny_model("mistral-sliding", **LOCAL)
        check_model(model)
        result = compare_perplexity(model, [{"name": "one", "input_ids": tokens(LENGTH)[0].tolist()}])
        assert result["sparse"]["density"] == result["sparse"]["scored_density"] == 1
        assert result["perplexity_ratio"] == pytest.approx(1)


class TestWindowsByConfig:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_they_are_what_the_forward_passes(self, family):
        model, seen = tiny_model(family), {}
        with observe(model, lambda pattern, *_: seen.update({pattern.layer_idx: pattern.sliding_window})):
            logits(model, tokens(20))
        assert sliding_windows(model.config) == seen

    def test_layers_without_attention_are_left_out(self):
        config = hf.Qwen3NextConfig(num_hidden_layers=4)
        assert sliding_windows(config) == {3: None}


class TestLayersOfDifferentShapes:
    """Gemma 4: global layers have other heads than local ones."""

    @pytest.fixture
    def model(self):
        if not hasattr(hf, "Gemma4ForCausalLM"):
            pytest.skip("this version of Transformers has no Gemma 4")
        config = hf.Gemma4TextConfig(
            vocab_size=64,
            vocab_size_per_layer_input=64,
            hidden_size=32,
            hidden_size_per_layer_input=8,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HEAD_DIM,
            global_head_dim=2 * HEAD_DIM,
            sliding_window=14,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            attn_implementation="sparse",
        )
        config.sparse_attention = {"window_size": 5, "num_global_tokens": 2, "key_budget": 6, "dense_below": 14}
        torch.manual_seed(0)
        return hf.Gemma4ForCausalLM(config).double().eval()

    def test_each_has_its_own_shape(self, model):
        assert [layer_shape(model.config, layer) for layer in (0, 5)] == [(4, 2, HEAD_DIM), (4, 1, 2 * HEAD_DIM)]

    def test_its_configuration_is_checked_layer_by_layer(self, model):
        assert merge_sparse_attention(model.config)["dense_below"] == 14
        with pytest.raises(ValueError, match="key_budget lists 3 KV heads in layer 5, but the model has 1"):
            merge_sparse_attention(model.config, {"key_budget": [[1, 1]] * 5 + [[1, 1, 1]]})
        with pytest.raises(ValueError, match="min_weight lists 3 heads in layer 2"):
            merge_sparse_attention(model.config, {"min_weight": [0.1] * 2 + [[0.1] * 3] + [0.1] * 3})

    def test_it_is_the_specification(self, model):
        ids = tokens(LENGTH)
        with configured(model, model.config.sparse_attention | {"implementation": "reference"}):
            expected = logits(model, ids)
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-9, atol=1e-9)
