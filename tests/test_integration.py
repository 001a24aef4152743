import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.batches import tokens
from helpers.families import SPARSE, tiny_model
from helpers.operation import calibrated_hash_text
from helpers.specification import logits
from transformers import AutoModelForCausalLM

from hf_sparse_attn import check_model
from hf_sparse_attn.integration import sparse_attention_forward


class TestConfiguration:
    def test_two_models_do_not_touch_each_other(self):
        ids = tokens(40)
        wide, narrow = tiny_model(window_size=12), tiny_model(window_size=2)
        expected = [logits(tiny_model(window_size=12), ids), logits(tiny_model(window_size=2), ids)]
        assert not torch.allclose(*expected)
        for _ in range(2):
            assert torch.equal(logits(wide, ids), expected[0])
            assert torch.equal(logits(narrow, ids), expected[1])

    def test_a_deep_copy_is_another_model(self):
        ids, model = tokens(40), tiny_model()
        before = logits(model, ids)
        other = copy.deepcopy(model)
        other.config.sparse_attention["window_size"] = 12
        assert torch.equal(logits(other, ids), logits(tiny_model(window_size=12), ids))
        assert torch.equal(logits(model, ids), before)

    @pytest.mark.parametrize("how", ["a new dict", "in place", "in place, in a nested list"])
    def test_changes_after_load_take_effect(self, how):
        ids = tokens(40)
        model = tiny_model(key_budget=[[2, 2], [2, 2]])
        before = logits(model, ids)
        changed = {"key_budget": [[2, 2], [9, 9]]}
        if how == "a new dict":
            model.config.sparse_attention = {**model.config.sparse_attention, **changed}
        elif how == "in place":
            model.config.sparse_attention.update(changed)
        else:
            model.config.sparse_attention["key_budget"][1][:] = [9, 9]
        after = logits(model, ids)
        assert not torch.equal(after, before)
        assert torch.equal(after, logits(tiny_model(**changed), ids))

    def test_absent_configuration_is_the_default(self):
        ids = tokens(40)
        model = tiny_model()
        del model.config.sparse_attention
        assert torch.equal(logits(model, ids), logits(tiny_model("llama", "sdpa"), ids))  # dense_below is longer

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"window": 3}, "no field 'window'"),
            ({"window_size": 0}, "^window_size must be"),
            ({"key_budget": [1]}, "^key_budget lists 1 layers"),
            ({"key_budget": [[1, 2, 3], [1, 2, 3]]}, "^key_budget lists 3 KV heads"),
            ({"hash": "calibrated"}, "calibrated_hash is missing"),
            ({"hash": "calibrated", "calibrated_hash": calibrated_hash_text()[:-9]}, "^calibrated_hash is damaged"),
            (
                {"hash": "calibrated", "calibrated_hash": calibrated_hash_text(head_dim=4)},
                "^calibrated_hash was fitted",
            ),
        ],
        ids=["unknown field", "value", "layers", "heads", "hash missing", "hash damaged", "hash of another shape"],
    )
    def test_impossible_configuration(self, fields, message):
        model = tiny_model()
        model.config.sparse_attention = fields
        with pytest.raises(ValueError, match=message):
            logits(model, tokens(40))

    @pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen3"])
    def test_save_and_load(self, family, tmp_path):
        """Twice, without a forward in between: what calibration fitted lies in the config and nowhere else."""
        fields = {"hash": "calibrated", "calibrated_hash": calibrated_hash_text(), "key_budget": [[0, 3], 4]}
        model, ids = tiny_model(family, **fields), tokens(40, 2)
        model.save_pretrained(tmp_path / "first")
        arguments = {"attn_implementation": "sparse", "dtype": torch.float64}
        AutoModelForCausalLM.from_pretrained(tmp_path / "first", **arguments).save_pretrained(tmp_path / "second")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second", **arguments)
        assert reloaded.config.sparse_attention == {**SPARSE, **fields}
        assert torch.equal(logits(reloaded, ids), logits(model, ids))
        saved = json.loads((tmp_path / "second" / "config.json").read_text())
        assert "sparse" not in json.dumps({key: value for key, value in saved.items() if key != "sparse_attention"})
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float64)
        assert torch.equal(logits(dense, ids), logits(tiny_model(family, "sdpa"), ids))

    def test_configuration_given_at_load(self, tmp_path):
        tiny_model(window_size=2).save_pretrained(tmp_path)
        fields = {**SPARSE, "window_size": 12}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="sparse", dtype=torch.float64, sparse_attention=fields
        )
        assert torch.equal(logits(model, tokens(40)), logits(tiny_model(window_size=12), tokens(40)))

    def test_switching_the_implementation(self):
        ids, model = tokens(40), tiny_model()
        sparse = logits(model, ids)
        model.set_attn_implementation("sdpa")
        assert torch.equal(logits(model, ids), logits(tiny_model("llama", "sdpa"), ids))
        model.set_attn_implementation("sparse")
        assert torch.equal(logits(model, ids), sparse)


class TestRefusals:
    def call(self, **kwargs):
        model = tiny_model()
        query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
        return sparse_attention_forward(model.model.layers[0].self_attn, query, key, key, None, **kwargs)

    def test_accepted_otherwise(self):
        output, weights = self.call(dropout=0.0, softcap=3.0, s_aux=torch.zeros(4), is_causal=True)
        assert output.shape == (1, 5, 4, 8)
        assert weights is None

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"dropout": 0.1}, r"attention dropout \(attention_dropout=0.1\)"),
            ({"output_attentions": True}, "output_attentions=True"),
            ({"position_bias": torch.zeros(1, 4, 5, 5)}, "the argument position_bias of LlamaAttention"),
            ({"indices": torch.zeros(1, 5, 2)}, "the argument indices of LlamaAttention"),
        ],
        ids=["dropout", "weights", "bias", "indexer"],
    )
    def test_call(self, kwargs, message):
        with pytest.raises(ValueError, match=rf'^attn_implementation="sparse" does not support {message}') as error:
            self.call(**kwargs)
        assert "\n" not in str(error.value)

    def test_dropout_of_a_model_in_training_only(self):
        model, ids = tiny_model(), tokens(40)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        logits(model, ids)
        with pytest.raises(ValueError, match="attention dropout"):
            logits(model.train(), ids)

    def test_chunked_attention(self):
        import transformers

        config = transformers.Llama4TextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            attn_implementation="sparse",
            head_dim=8,
            attention_chunk_size=16,
            num_local_experts=2,
            moe_layers=[],
            no_rope_layers=[1, 1],
        )
        model = transformers.Llama4ForCausalLM(config).eval()
        with pytest.raises(ValueError, match=r'^attn_implementation="sparse" does not support chunked attention'):
            model(tokens(40))


class TestModelsThatNeverCallIt:
    """They take any attn_implementation without a word."""

    def model(self, name, **fields):
        import transformers

        config = getattr(transformers, f"{name}Config")(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0, **fields
        )
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sparse").eval()

    def test_first_forward(self):
        with pytest.raises(ValueError, match="does not support bloom, which never calls its attention") as error:
            self.model("Bloom", n_head=4)(tokens(10))
        assert "\n" not in str(error.value)

    def test_check_model(self):
        """Mamba has no attention, so nothing of the plugin is called in its forward."""
        with pytest.raises(ValueError, match="does not support MambaForCausalLM, which never calls its attention"):
            check_model(self.model("Mamba", state_size=4))

    @pytest.mark.parametrize("name", ["GPTNeoX", "Jamba", "Phi3"])
    def test_models_that_do(self, name):
        fields = {"Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 2}}
        model = self.model(name, num_attention_heads=4, num_key_value_heads=2, **fields.get(name, {}))
        check_model(model)
        model(tokens(10))


IMPORTING = """
import json, sys
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

def registered():
    attention, mask = AttentionInterface(), AttentionMaskInterface()
    return {**{f"attention {k}": id(v) for k, v in attention.items()}, **{f"mask {k}": id(v) for k, v in mask.items()}}

before, modules = registered(), set(sys.modules)
import hf_sparse_attn
after = registered()
print(json.dumps({
    "changed": sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)),
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
}))
"""


def test_importing_registers_one_name_and_loads_nothing_optional():
    root = Path(__file__).parent.parent
    finished = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True, cwd=root)
    found = json.loads(finished.stdout)
    assert found["changed"] == ["attention sparse", "mask sparse"]
    assert "hf_sparse_attn" in found["modules"]
    assert not {"datasets", "matplotlib", "peft", "numba", "gguf", "rich", "accelerate"} & set(found["modules"])


def test_registering_twice_changes_nothing():
    from transformers import AttentionInterface

    from hf_sparse_attn.integration import register

    before = dict(AttentionInterface().items())
    register()
    assert dict(AttentionInterface().items()) == before
