"""Every path through a model gives the same logits: one shot, chunks, caches, padding, packing, training."""

import attention_checks as checks
import pytest
import torch
from attention_checks import (
    FAMILIES,
    TOLERANCE,
    LargestTensor,
    calibrated_hash_text,
    logits,
    padded_batch,
    tiny_model,
    tokens,
)
from transformers import DynamicCache, StaticCache

every_family = pytest.mark.parametrize("family", FAMILIES)
FEATURES = {
    "routing": {},
    "every part of the pattern": {
        "stride": 9,
        "num_random_keys": 2,
        "global_token_indices": [11],
        "key_budget": [[0, 3, 5, 2], 4],
        "dense_below": 7,
    },
    "a dense layer": {"dense_layers": [0]},
    "dense rows in the middle": {"dense_below": 19},
    "calibrated hash": {"hash": "calibrated", "calibrated_hash": calibrated_hash_text()},
}
every_feature = pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())


class TestOracles:
    @every_family
    def test_reference(self, family):
        checks.check_matches_reference(family)

    @every_feature
    def test_reference_with(self, fields):
        checks.check_matches_reference("mistral-sliding", **fields)

    @every_family
    @pytest.mark.parametrize(
        "fields",
        [{"window_size": 60}, {"num_global_tokens": 60}, {"window_size": 1, "key_budget": 60, "page_size": 1}],
        ids=["window", "globals", "routed keys"],
    )
    def test_full_coverage_is_sdpa(self, family, fields):
        checks.check_full_coverage(family, **fields)

    @pytest.mark.parametrize(
        "fields", [{"dense_below": 40}, {"dense_layers": [0, 1]}], ids=["dense rows", "dense layers"]
    )
    def test_dense_is_sdpas_own_call(self, fields):
        ids = tokens(40, 2)
        assert torch.equal(logits(tiny_model(**fields), ids), logits(tiny_model("llama", "sdpa"), ids))

    @pytest.mark.parametrize(
        "fields", [{"dense_below": 60}, {"dense_layers": [0, 1]}], ids=["dense rows", "dense layers"]
    )
    @every_family
    def test_dense_with_padding_and_the_models_window_is_sdpa(self, family, fields):
        rows = [tokens(length, seed=length)[0] for length in (40, 23)]
        ids, mask, position_ids = padded_batch(rows, "left", 2)
        inputs = {"attention_mask": mask, "position_ids": position_ids}
        ours, expected = (
            logits(model, ids, **inputs) for model in (tiny_model(family, **fields), tiny_model(family, "sdpa"))
        )
        torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], **TOLERANCE)

    def test_window_only_is_a_sliding_window_model(self):
        ids = tokens(40, 2)
        window_only = tiny_model("mistral", window_size=14, num_global_tokens=0, key_budget=0)
        torch.testing.assert_close(
            logits(window_only, ids), logits(tiny_model("mistral-sliding", "sdpa"), ids), **TOLERANCE
        )

    @every_family
    def test_gradients(self, family):
        checks.check_gradients(family)

    @every_family
    def test_density(self, family):
        checks.check_density(family)

    @every_feature
    def test_density_with(self, fields):
        checks.check_density("qwen2-mixed", **fields)


class TestCaches:
    @every_family
    @pytest.mark.parametrize(
        "sizes", [(7, 13), (1,), (20, 1), (39, 1), (3, 16, 4)], ids=lambda sizes: "+".join(map(str, sizes))
    )
    def test_dynamic_cache(self, family, sizes):
        checks.check_chunks(family, sizes)

    @every_feature
    def test_dynamic_cache_with(self, fields):
        checks.check_chunks("mistral-sliding", (9, 1), **fields)

    @every_family
    @pytest.mark.parametrize("sizes", [(40,), (13, 1)], ids=["one piece", "decode"])
    def test_static_cache(self, family, sizes):
        model, ids = tiny_model(family), tokens(40, 2)
        cache = StaticCache(config=model.config, max_cache_len=64)
        torch.testing.assert_close(checks.cached_logits(model, ids, sizes, cache), logits(model, ids), **TOLERANCE)

    @every_family
    def test_static_cache_filled_to_the_last_slot(self, family):
        model, ids = tiny_model(family), tokens(24, 2)
        cache = StaticCache(config=model.config, max_cache_len=24)
        torch.testing.assert_close(checks.cached_logits(model, ids, (21, 1), cache), logits(model, ids), **TOLERANCE)

    def test_cache_without_sliding_layers_under_a_sliding_model(self):
        """The cache keeps every key; the model's own window still applies."""
        model, ids = tiny_model("mistral-sliding"), tokens(40, 2)
        torch.testing.assert_close(
            checks.cached_logits(model, ids, (13, 1), DynamicCache()), logits(model, ids), **TOLERANCE
        )

    @every_family
    def test_left_padded_decode(self, family):
        """A padded batch, prefilled and then fed token by token, gives each row's own logits."""
        model = tiny_model(family)
        rows = [tokens(length, seed=length)[0] for length in (36, 20, 9)]
        ids, mask, position_ids = padded_batch(rows, "left", 2)
        cache, pieces, split = DynamicCache(config=model.config), [], 30
        with torch.no_grad():
            for start, stop in [(0, split), *((i, i + 1) for i in range(split, ids.shape[1]))]:
                output = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=position_ids[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
                pieces.append(output.logits)
        together = torch.cat(pieces, 1)
        assert together.isfinite().all()
        for i, row in enumerate(rows):
            torch.testing.assert_close(together[i][mask[i].bool()], logits(model, row[None])[0], **TOLERANCE)

    def test_crop_and_go_on(self):
        """As assisted generation does: some tokens are taken back and others follow."""
        model, ids, other = tiny_model(), tokens(40), tokens(40, seed=1)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.cat([ids[:, :25], other[:, :5]], 1), past_key_values=cache, use_cache=True)
            cache.crop(-5)
            resumed = model(ids[:, 25:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(resumed, logits(model, ids)[:, 25:], **TOLERANCE)

    def test_packed_then_decoded(self):
        model = tiny_model()
        first, second = tokens(23, seed=1), tokens(32, seed=2)
        cache = DynamicCache(config=model.config)
        position_ids = torch.cat([torch.arange(23), torch.arange(28)])[None]
        with torch.no_grad():
            packed = torch.cat([first, second[:, :28]], 1)
            pieces = [model(packed, position_ids=position_ids, past_key_values=cache, use_cache=True).logits[:, 23:]]
            for p in range(28, 32):
                ids = torch.tensor([[p]])
                step = model(second[:, p : p + 1], position_ids=ids, past_key_values=cache, use_cache=True)
                pieces.append(step.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), logits(model, second), **TOLERANCE)


class TestBatches:
    @every_family
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("extra", [0, 3, 17])
    def test_padding(self, family, side, extra):
        checks.check_padding(family, side, extra)

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

    @every_family
    def test_packed(self, family):
        checks.check_packed(family)

    @every_feature
    def test_packed_with(self, fields):
        checks.check_packed("mistral-sliding", **fields)

    def test_packed_with_a_mask_of_ones(self):
        """Transformers itself loses the packing here."""
        model = tiny_model()
        first, second = tokens(23, seed=1), tokens(31, seed=2)
        position_ids = torch.cat([torch.arange(23), torch.arange(31)])[None]
        ids = torch.cat([first, second], 1)
        together = logits(model, ids, position_ids=position_ids, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(together[:, :23], logits(model, first), **TOLERANCE)
        torch.testing.assert_close(together[:, 23:], logits(model, second), **TOLERANCE)

    def test_packed_documents_that_are_dense(self):
        model = tiny_model(dense_below=100)
        first, second = tokens(23, seed=1), tokens(31, seed=2)
        position_ids = torch.cat([torch.arange(23), torch.arange(31)])[None]
        together = logits(model, torch.cat([first, second], 1), position_ids=position_ids)
        torch.testing.assert_close(together[:, 23:], logits(model, second), **TOLERANCE)

    @every_family
    def test_later_tokens(self, family):
        checks.check_later_tokens(family)

    @every_feature
    def test_later_tokens_with(self, fields):
        checks.check_later_tokens("mistral-sliding", **fields)

    def test_padded_gradients_are_those_of_the_rows_alone(self):
        rows = [tokens(length, seed=length)[0] for length in (35, 22)]
        ids, mask, position_ids = padded_batch(rows, "right", 4)
        together, alone = tiny_model(), tiny_model()
        labels = ids.masked_fill(mask == 0, -100)
        output = together(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        (output.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * (labels != -100)).sum().backward()
        for row in rows:
            output = alone(row[None], use_cache=False).logits
            output.log_softmax(-1).gather(-1, row[None, :, None]).sum().backward()
        gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (together, alone)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


class TestGenerate:
    def greedy(self, model, ids, steps):
        for _ in range(steps):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
        return ids

    @every_family
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_greedy(self, family, cache):
        model, ids = tiny_model(family), tokens(21, 2)
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, cache_implementation=cache
        )
        assert torch.equal(generated, self.greedy(model, ids, 9))

    @every_family
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_left_padded(self, family, cache):
        model = tiny_model(family)
        rows = [tokens(length, seed=length)[0] for length in (21, 13)]
        ids, mask, _ = padded_batch(rows, "left", 2)
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, cache_implementation=cache
        )
        for i, row in enumerate(rows):
            assert torch.equal(generated[i, -9:], self.greedy(model, row[None], 9)[0, -9:])

    def test_prompt_lookup(self):
        """Verifies several tokens at once and crops the cache."""
        model, ids = tiny_model(), tokens(5).repeat(1, 5)
        mask = torch.ones_like(ids)
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3
        )
        assert torch.equal(generated, self.greedy(model, ids, 9))

    def test_beams(self):
        """Rows of the cache are copied and reordered."""
        model, ids = tiny_model(), tokens(21)
        mask = torch.ones_like(ids)
        arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
        assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments, use_cache=False))


@pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")
class TestTraining:
    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    @pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
    def test_gradient_checkpointing(self, family, use_reentrant):
        ids, gradients = tokens(40, 2), []
        for checkpointing in (False, True):
            model = tiny_model(family, num_random_keys=2).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.equal(gradients[1][name], gradient), name
            assert gradient.any(), name

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

    def test_autocast(self):
        """Query and key arrive in float32, value in bfloat16."""
        model, ids = tiny_model(dtype=torch.float32).train(), tokens(40, 2)
        plain = logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids, labels=ids, use_cache=False)
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        assert (output.logits[:, :6] - plain[:, :6]).abs().mean() < 0.1 * plain.abs().mean()


def test_a_whole_model_with_padding_makes_no_quadratic_tensor():
    length = 4096
    fields = {"window_size": 64, "key_budget": 32, "num_hash_bits": 6, "page_size": 32}
    model = tiny_model(dtype=torch.float32, **fields)
    ids, mask = tokens(length), torch.ones(1, length, dtype=torch.long)
    mask[:, :100] = 0
    with LargestTensor() as largest, torch.no_grad():
        model.model(ids, attention_mask=mask, use_cache=False)
    assert largest.bytes < length * length / 2
