"""The leak test finds what looks at later tokens, and nothing else."""

import copy

import pytest
import torch
import transformers as hf
from helpers.families import tiny_model

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.errors import RunError
from hf_sparse_attn.evaluation.leak_test import NOISE_FACTOR, find_leaks, places

LENGTH = 70  # blocks of 12 leave 10 tokens for the last one
IDS = torch.randint(1, 64, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
VOTES = {"preset": "minference-like", "block_size": 12, "num_voted_blocks": 2}
SPARSE = {
    "routed": {},
    "routed, torch": {"implementation": "torch"},
    "read whole": {"dense_below": 1000},
    "bigbird": {"preset": "bigbird", "block_size": 8, "num_global_tokens": 2},
    "longlora": {"preset": "longlora", "block_size": 16, "by_kv_head": [{}, {"block_offset": 8}]},
    "streaming": {"preset": "streaming-llm", "window_size": 9},
    "global tokens by their id": {"global_token_ids": IDS[-1:]},
    "votes among rows that read everything": VOTES | {"dense_below": 1000},
    "by layer": {"by_layer": [{}, {"slash_distances": [7]}]},
}


def sparse_model(fields, family="llama"):
    others = dict(fields)
    name = others.pop("preset", None)
    model = tiny_model(family, dtype=torch.float32)
    own = model.config.sparse_attention | others
    model.config.sparse_attention = SparseAttentionConfig.preset(name, **others).to_dict() if name else own
    return model


@pytest.mark.parametrize("fields", SPARSE.values(), ids=SPARSE.keys())
def test_causal_patterns_do_not_leak(fields):
    result = find_leaks(sparse_model(fields), IDS, places(LENGTH, 7))
    assert not result["leaks"]
    assert result["tolerance"] == result["largest_difference"] == 0  # to the last bit
    assert result["earliest_moved"] is None
    assert [change["position"] for change in result["changes"]] == [9, 19, 29, 39, 49, 59, 69]
    for change in result["changes"]:
        assert change["own_difference"] > 0.1
        assert change["token"] == IDS[change["position"]] != change["changed_to"]
        assert change["changed_to"] in IDS


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
def test_dense_attention_does_not_leak(family, implementation):
    result = find_leaks(tiny_model(family, implementation, torch.float32), IDS, places(LENGTH, 3))
    assert (result["leaks"], result["largest_difference"]) == (False, 0)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_blocks_that_vote_leak(tiny_llama_config, implementation):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(copy.deepcopy(tiny_llama_config)).eval()
    fields = {"block_size": 24, "num_voted_blocks": 2, "implementation": implementation}
    model.config.sparse_attention = SparseAttentionConfig.preset("minference-like", **fields).to_dict()
    model.set_attn_implementation("sparse")
    ids = torch.randint(256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    result = find_leaks(model, ids)
    (change,) = result["changes"]
    assert result["leaks"]
    assert change["position"] == 199
    assert result["tolerance"] == 0
    assert result["largest_difference"] == change["largest_difference"] > 0.01
    # The last token has a vote on what the rows of its block read, which is not whole, and no others.
    assert 192 <= result["earliest_moved"] == change["earliest_moved"] < 199
    assert 1 <= change["moved"] <= 7


def test_the_earliest_of_several_changes():
    model = tiny_model("llama", "sdpa", torch.float32)

    def leak(module, args, hidden):
        hidden[:, 20] += 1e-3 * hidden[:, 40]
        hidden[:, 31] += 1e-3 * hidden[:, -1]

    model.model.norm.register_forward_hook(leak)
    result = find_leaks(model, IDS, [40, 69])
    first, second = result["changes"]
    assert (first["earliest_moved"], first["moved"]) == (20, 2)
    assert (second["earliest_moved"], second["moved"]) == (31, 1)
    assert result["earliest_moved"] == 20
    assert result["largest_difference"] == max(first["largest_difference"], second["largest_difference"])


def test_encoder_like_attention_leaks():
    """A decoder whose attention looks at both sides; only one change in the middle shows by how much."""
    model = tiny_model("llama", "eager", torch.float32)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, given: (args, given | {"attention_mask": torch.zeros(1, 1, LENGTH, LENGTH)}),
            with_kwargs=True,
        )
    result = find_leaks(model, IDS, [40])
    assert (result["leaks"], result["earliest_moved"], result["changes"][0]["moved"]) == (True, 0, 40)


def test_a_leak_of_a_single_row_in_a_chunk(monkeypatch):
    """Chunks of logits without a difference are passed over, and only those."""
    monkeypatch.setattr("hf_sparse_attn.logits.CHUNK_BYTES", 4 * 64 * 6)
    model = tiny_model("llama", "sdpa", torch.float32)

    def leak(module, args, hidden):
        hidden[:, 31] += 1e-3 * hidden[:, -1]

    model.model.norm.register_forward_hook(leak)
    result = find_leaks(model, IDS)
    assert (result["leaks"], result["earliest_moved"], result["changes"][0]["moved"]) == (True, 31, 1)
    assert 0 < result["largest_difference"] < 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "sparse"])
def test_a_mixture_of_experts_does_not_leak(implementation):
    """A changed token goes to other experts, and so other numbers of tokens are multiplied at once."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.3,
    )
    config.sparse_attention = {"window_size": 8, "dense_below": 0}
    model = hf.MixtralForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    assert not find_leaks(model, IDS, places(LENGTH, 7))["leaks"]


class TestNoise:
    def noisy(self, size, leak=0.0):
        """A model whose hidden states are never the same twice."""
        model, generator = tiny_model("llama", "sdpa", torch.float32), torch.Generator().manual_seed(0)

        def disturb(module, args, hidden):
            hidden += size * torch.rand(hidden.shape, generator=generator)
            hidden[:, 5] += leak * hidden[:, -1]

        model.model.norm.register_forward_hook(disturb)
        return model

    def test_is_no_leak(self):
        result = find_leaks(self.noisy(1e-5), IDS, places(LENGTH, 3))
        assert not result["leaks"]
        assert 0 < result["largest_difference"] < result["tolerance"] < 1e-3
        assert result["tolerance"] < 2 * NOISE_FACTOR * result["largest_difference"]
        assert [change["moved"] for change in result["changes"]] == [0, 0, 0]

    def test_does_not_hide_a_leak(self):
        result = find_leaks(self.noisy(1e-5, leak=0.01), IDS)
        assert (result["leaks"], result["earliest_moved"], result["changes"][0]["moved"]) == (True, 5, 1)

    def test_so_large_that_nothing_can_be_said(self):
        with pytest.raises(RunError, match=r"logits of the same input differ by .* try float32 or float64"):
            find_leaks(self.noisy(0.1), IDS)

    def test_a_batch_whose_documents_see_each_other_is_too_much_noise(self):
        """Such a leak would move the copy that is not changed, too, and must not pass for noise."""
        model = tiny_model("llama", "sdpa", torch.float32)

        def mix(module, args, hidden):
            hidden[:, 5] += hidden[:, -1].mean(0)

        model.model.norm.register_forward_hook(mix)
        with pytest.raises(RunError, match="logits of the same input"):
            find_leaks(model, IDS)


class TestMistakes:
    @pytest.mark.parametrize("position", [0, LENGTH, -1])
    def test_positions(self, position):
        with pytest.raises(ValueError, match=f"positions must be from 1 to 69, got {position}"):
            find_leaks(tiny_model(), IDS, [5, position])

    def test_logits_that_are_not_finite(self):
        model = tiny_model("llama", "sdpa")
        torch.nn.init.constant_(model.model.norm.weight, torch.inf)
        with pytest.raises(ValueError, match="not finite"):
            find_leaks(model, IDS)

    def test_a_model_that_does_not_read(self):
        model = tiny_model("llama", "sdpa")
        torch.nn.init.zeros_(model.model.embed_tokens.weight)
        with pytest.raises(ValueError, match="another token at position 69 does not even move its own logits"):
            find_leaks(model, IDS)


def test_a_document_of_one_word():
    (change,) = find_leaks(tiny_model(), [63] * 20)["changes"]
    assert (change["token"], change["changed_to"]) == (63, 0)


def test_places():
    assert places(100, 1) == [99]
    assert places(10, 3) == [2, 5, 9]
    assert places(10, 5) == [1, 3, 5, 7, 9]
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"must be from 1 to 5, half of the tokens, got {count}"):
            places(10, count)
