"""Every field of the configuration on every kind of path, and single cases; families by paths are in the matrix."""

import pytest
import torch
from helpers import checks
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.operation import calibrated_hash_text
from helpers.specification import TOLERANCE, logits
from matrix.training import gradient_checkpointing

FEATURES = {
    "routing": {},
    "every part of the pattern": {
        "stride": 9,
        "num_random_keys": 2,
        "global_token_indices": [11],
        "key_budget": [[0, 3], 4],
        "min_weight": [[0.0, 0.02, 0.05, 0.1], 0.01],
        "dense_below": 7,
    },
    "blocks by layer and head": {
        "block_size": 9,
        "num_random_blocks": 1,
        "slash_distances": [13],
        "by_layer": [{"by_kv_head": [{}, {"block_offset": 4}]}, {"dilated_window_size": 4, "dilation": 5}],
    },
    "a dense layer": {"dense_layers": [0]},
    "dense rows in the middle": {"dense_below": 12},
    "calibrated hash": {"hash": "calibrated", "calibrated_hash": calibrated_hash_text()},
}
every_feature = pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())


class TestOracles:
    @every_feature
    def test_reference_with(self, fields):
        checks.check_matches_reference("mistral-sliding", **fields)

    @pytest.mark.parametrize(
        "fields", [{"dense_below": 40}, {"dense_layers": [0, 1]}], ids=["dense rows", "dense layers"]
    )
    def test_dense_is_sdpas_own_call(self, fields):
        ids = tokens(40, 2)
        assert torch.equal(logits(tiny_model(**fields), ids), logits(tiny_model("llama", "sdpa"), ids))

    def test_window_only_is_a_sliding_window_model(self):
        ids = tokens(40, 2)
        window_only = tiny_model("mistral", window_size=14, num_global_tokens=0, key_budget=0)
        torch.testing.assert_close(
            logits(window_only, ids), logits(tiny_model("mistral-sliding", "sdpa"), ids), **TOLERANCE
        )

    @every_feature
    def test_density_with(self, fields):
        checks.check_density("qwen2-mixed", **fields)


class TestCaches:
    @every_feature
    def test_dynamic_cache_with(self, fields):
        checks.check_chunks("mistral-sliding", (9, 1), **fields)


class TestBatches:
    @every_feature
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_with(self, fields, side):
        checks.check_padding("mistral-sliding", side, 5, **fields)

    def test_left_padding_without_position_ids(self):
        """Rotary positions then count the padding, which shifts them all alike (in float32, hence the tolerance).

        Without routed keys: a hash of rotated keys is not the same hash after the shift.
        """
        model, row = tiny_model(key_budget=0), tokens(33)
        ids, mask, _ = padded_batch([row[0]], "left", 6)
        ours = logits(model, ids, attention_mask=mask)[:, 6:]
        torch.testing.assert_close(ours, logits(model, row), rtol=1e-4, atol=1e-4)

    def test_a_mask_of_ones_is_none(self):
        model, ids = tiny_model(), tokens(40, 2)
        torch.testing.assert_close(
            logits(model, ids, attention_mask=torch.ones_like(ids)), logits(model, ids), **TOLERANCE
        )

    def test_neighbours(self):
        model, ids = tiny_model(), tokens(40, 3)
        together = logits(model, ids)
        for i in range(3):
            torch.testing.assert_close(together[i], logits(model, ids[i : i + 1])[0], **TOLERANCE)

    @every_feature
    def test_packed_with(self, fields):
        checks.check_packed("mistral-sliding", **fields)

    def test_packed_documents_that_are_dense(self):
        model = tiny_model(dense_below=100)
        first, second = tokens(23, seed=1), tokens(31, seed=2)
        position_ids = torch.cat([torch.arange(23), torch.arange(31)])[None]
        together = logits(model, torch.cat([first, second], 1), position_ids=position_ids)
        torch.testing.assert_close(together[:, 23:], logits(model, second), **TOLERANCE)

    @every_feature
    def test_later_tokens_with(self, fields):
        checks.check_later_tokens("mistral-sliding", **fields)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")
class TestTraining:
    @every_feature
    def test_gradient_checkpointing_with(self, fields):
        gradient_checkpointing("mistral-sliding", **fields)

    def test_lora(self):
        peft = pytest.importorskip("peft")
        ids = tokens(40, 2)
        plain = logits(tiny_model(), ids)
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
        model = model.double()
        torch.testing.assert_close(logits(model, ids), plain, **TOLERANCE)
        assert not torch.allclose(plain, logits(tiny_model("llama", "sdpa"), ids))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        adapted = logits(model, ids)
        assert not torch.allclose(adapted, plain)
        torch.testing.assert_close(logits(model.merge_and_unload(), ids), adapted, rtol=1e-6, atol=1e-6)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_casting_a_model_that_has_already_run(self, dtype):
        model, ids = tiny_model(window_size=12), tokens(40, 2)
        double = logits(model, ids)
        cast = logits(model.to(dtype), ids)
        assert cast.dtype == dtype
        sdpa = logits(tiny_model("llama", "sdpa", dtype), ids)
        error = (sdpa - logits(tiny_model("llama", "sdpa"), ids)).abs().mean()
        assert (cast[:, :12] - double[:, :12]).abs().mean() < 2 * error
        assert cast.isfinite().all()

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float32, 1e-4)], ids=str)
    def test_reference_in_the_models_dtype(self, dtype, tolerance):
        ids = tokens(40, 2)
        model, oracle = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
        oracle.config.sparse_attention["implementation"] = "reference"
        expected = logits(oracle, ids)
        assert (logits(model, ids) - expected).abs().mean() < tolerance * expected.abs().mean()
