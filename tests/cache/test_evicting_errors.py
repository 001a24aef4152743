"""What a cache with a policy cannot do, and says."""

import pytest
import torch
from helpers.batches import tokens
from helpers.eviction import SCALING, small_cache, sparse_config
from helpers.families import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, tiny_model
from helpers.operation import make_pattern
from helpers.specification import cached_logits
from transformers import DynamicCache, Gemma3nTextConfig

from hf_sparse_attn import SparseAttentionConfig, SparseCache
from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.cache.policies import (
    AdaptiveBudget,
    HeavyHitters,
    KeyNorm,
    Recency,
    Recent,
    Sinks,
    UniformBudget,
)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"policy": Recency()}, "budget is missing"),
            ({"budget": 8}, "policy is missing"),
            ({"policy": "h2o", "budget": 8}, "policy must be a sum .* got 'h2o'"),
            ({"policy": Recency(), "budget": 0}, "budget must be a positive integer .* got 0"),
            ({"policy": Recency(), "budget": True}, "budget must be .* got True"),
            ({"policy": Recency(), "budget": 0.5}, "budget must be .* got 0.5"),
            ({"policy": Sinks(4) + Recent(5), "budget": 8}, "budget must be at least 9, .*Sinks.*Recent.* got 8"),
            ({"policy": Recent(9) + KeyNorm(), "budget": AdaptiveBudget(8)}, "budget must be at least 9"),
            ({"policy": Recency(), "budget": 8, "max_cache_len": 9}, "max_cache_len=9 cannot go with a policy"),
        ],
    )
    def test_construction(self, options, words):
        with pytest.raises(ValueError, match=words):
            SparseCache(sparse_config(), **options)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Recency() + KeyNorm(), r"at most one ranker, got Recency\(\) \+ KeyNorm\(\)"),
            (lambda: Sinks(1) + HeavyHitters() + Recent(1) + KeyNorm(), "at most one ranker, got HeavyHitters"),
            (lambda: Sinks(0), "tokens of Sinks must be a positive integer, got 0"),
            (lambda: Recent(2.0), "tokens of Recent must be"),
            (lambda: UniformBudget(-1), "tokens of the budget must be"),
            (lambda: UniformBudget(3, slack=0), "slack of the budget must be"),
            (lambda: AdaptiveBudget(3, floor=1.5), "floor of the budget must be a number from 0 to 1, got 1.5"),
        ],
    )
    def test_parts(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()

    def test_adding_something_else(self):
        with pytest.raises(TypeError):
            Sinks(1) + 3
        assert str(Sinks(1) + Recent(2)) == "Sinks(tokens=1) + Recent(tokens=2) + Recency()"

    def test_another_attention_implementation(self):
        model = tiny_model(implementation="sdpa")
        with pytest.raises(ValueError, match=r'policy needs .* attn_implementation="sparse".* is \'sdpa\''):
            SparseCache(model.config, policy=Recency(), budget=8)

    def test_an_implementation_that_was_changed_afterwards(self):
        model = tiny_model()
        cache = small_cache(model)
        model.set_attn_implementation("sdpa")
        cached_logits(model, tokens(5), (5,), cache)
        with pytest.raises(ValueError, match="never came to the sparse attention"):
            cached_logits(model, tokens(1), (1,), cache)

    def test_gradients(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="carries no gradients"):
            model(tokens(5), past_key_values=small_cache(model))

    def test_packed_documents(self):
        model = tiny_model()
        ends = torch.tensor([0, 3, 5], dtype=torch.int32)
        with pytest.raises(ValueError, match="does not take several packed ones"), torch.no_grad():
            model(tokens(5), cu_seq_lens_q=ends, past_key_values=small_cache(model))

    def test_earlier_tokens_become_padding(self):
        model = tiny_model()
        cache = small_cache(model)
        cached_logits(model, tokens(20), (20,), cache)
        mask = torch.cat([torch.zeros(1, 20), torch.ones(1, 5)], 1)
        with pytest.raises(ValueError, match=r"has seen 20 tokens of row 0, but .* follow 0"), torch.no_grad():
            model(tokens(5), attention_mask=mask, past_key_values=cache)

    def test_layers_that_share_keys(self):
        config = Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2)
        with pytest.raises(ValueError, match="num_kv_shared_layers=2"):
            SparseCache(config, policy=Sinks(4), budget=9)

    def test_keys_that_were_attended_to_already(self):
        cache = small_cache(tiny_model())
        pattern = make_pattern(SparseAttentionConfig(), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
        x = torch.randn(1, NUM_KV_HEADS, 3, HEAD_DIM, dtype=torch.float64)
        inputs = Inputs(x.repeat(1, 2, 1, 1), *cache.update(x, x.clone(), 0))
        attention(inputs, pattern, SCALING, None)
        with pytest.raises(ValueError, match="without new keys"):
            attention(inputs, pattern, SCALING, None)

    def test_another_batch_size(self):
        model = tiny_model()
        cache = small_cache(model)
        cached_logits(model, tokens(20, 2), (20,), cache)
        with pytest.raises(ValueError, match="holds 2 rows, got 3"):
            cached_logits(model, tokens(1, 3), (1,), cache)

    def test_a_sliding_window(self):
        cache = small_cache(tiny_model())
        pattern = make_pattern(SparseAttentionConfig(), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, sliding_window=4)
        x = torch.randn(1, NUM_KV_HEADS, 3, HEAD_DIM, dtype=torch.float64)
        key, value = cache.update(x, x.clone(), 0)
        with pytest.raises(ValueError, match="sliding window"):
            attention(Inputs(x.repeat(1, 2, 1, 1), key, value), pattern, SCALING, None)

    def test_layers_that_slide_are_transformers_own(self):
        model = tiny_model("qwen2-mixed")
        kinds = [type(layer).__name__ for layer in small_cache(model).layers]
        assert kinds == [type(layer).__name__.replace("DynamicLayer", "EvictingLayer") for layer in DynamicCache(config=model.config).layers]  # fmt: skip  # noqa: E501
        assert "EvictingLayer" in kinds

    def test_torch_compile(self):
        model = tiny_model()
        cache = small_cache(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with (
            pytest.raises(Exception, match="SparseCache with a policy"),
            torch.no_grad(),
        ):
            compiled(tokens(5), past_key_values=cache)
