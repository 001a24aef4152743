import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.batches import tokens
from helpers.families import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, VOCABULARY, tiny_model
from helpers.operation import make_pattern
from helpers.specification import logits

from hf_sparse_attn import SparseAttentionConfig, configure, linear_layers, record_density
from hf_sparse_attn.calibration import budget_allocation as allocation
from hf_sparse_attn.calibration import calibrate as conversion
from hf_sparse_attn.calibration.budget_allocation import least_density
from hf_sparse_attn.calibration.calibrate import calibrate, choose_by_loss, minimum_tokens, num_steps
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.evaluation.perplexity import compare_perplexity
from hf_sparse_attn.side_channels import PATTERN

CONFIG = SparseAttentionConfig(window_size=16, num_global_tokens=2, page_size=16, dense_below=60)
LENGTH = minimum_tokens(CONFIG) + 22
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


@pytest.fixture(autouse=True)
def small_choices(monkeypatch):
    """Budgets that mean something at 200 tokens, and that every sparse row of CONFIG can use up."""
    monkeypatch.setattr(allocation, "BUDGETS", (0, 8, 16, 40))
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-3, 1e-2))


@pytest.fixture(scope="module")
def calibrated():
    """A calibration of the tiny model on three documents, which tests must leave as it is; and the documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "BUDGETS", (0, 8, 16, 40))
        patch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-3, 1e-2))
        documents = [tokens(LENGTH, seed=seed)[0] for seed in range(3)]
        return calibrate(tiny_model(dtype=torch.float32), documents, CONFIG), documents


def measured_density(model, config, document):
    model.config.sparse_attention = config.to_dict()
    with record_density(model) as recorder:
        logits(model, document[None])
    return recorder.density


def traces(model):
    """What a calibration might leave behind in a model."""
    return {
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in HOOKS],
        "attached": [key for module in model.modules() for key in module.__dict__ if key.startswith("_sparse_att")],
        "config": dict(model.config.__dict__),
        "training": [module.training for module in model.modules()],
    }


class TestCalibrate:
    def test_everything_but_the_hash_stays(self, calibrated):
        config = calibrated[0].config
        assert config.hash == "calibrated"
        assert config.replace(hash="random", calibrated_hash=None) == CONFIG

    def test_progress(self):
        steps = []
        documents = [tokens(minimum_tokens(CONFIG), seed=seed)[0] for seed in (0, 1)]
        calibrate(tiny_model(dtype=torch.float32), documents, CONFIG, steps.append)
        assert len(steps) == len(set(steps)) == num_steps(2)

    def test_deterministic(self):
        documents = [tokens(LENGTH)[0]]
        one, two, other = (
            calibrate(tiny_model(dtype=torch.float32), documents, CONFIG.replace(seed=seed)) for seed in (0, 0, 1)
        )
        assert one.config == two.config
        assert torch.equal(one.costs.loss, two.costs.loss)
        assert one.config.calibrated_hash != other.config.calibrated_hash
        assert not torch.equal(one.costs.loss, other.costs.loss)

    def test_each_layer_and_kv_head_has_codewords_of_its_own(self, calibrated):
        hashes = [
            make_pattern(calibrated[0].config, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, layer).bucket_hash
            for layer in range(NUM_LAYERS)
        ]
        codewords = torch.stack([bucket_hash.weight for bucket_hash in hashes]).flatten(0, 1)
        assert len(codewords.flatten(1).unique(dim=0)) == len(codewords) == NUM_LAYERS * NUM_KV_HEADS

    def test_coarse_linear_layers_find_almost_the_same(self, monkeypatch):
        """What is made of queries, keys and gradients is computed in float32 all the same."""
        found = []
        for capable in (True, False):
            monkeypatch.setattr(linear_layers, "_has_bfloat16", lambda capable=capable: capable)
            model, document = tiny_model(dtype=torch.float32), tokens(LENGTH)[0]
            moments = conversion._gradient_moments(model, document, 0)
            samples, _ = conversion._read(model, document, CONFIG)
            found.append((moments, {layer: sample.query_moment for layer, sample in samples.items()}))
        # Logits that are a little different draw other labels of a few tokens.
        for coarse, exact, tolerance in zip(*found, (0.4, 0.03), strict=True):
            for layer, expected in exact.items():
                assert coarse[layer].dtype == torch.float32
                assert 0 < (coarse[layer] - expected).norm() < tolerance * expected.norm()

    def test_the_last_document_does_not_fit_the_hash(self, calibrated):
        documents = [*calibrated[1][:2], tokens(LENGTH, seed=9)[0]]
        other = calibrate(tiny_model(dtype=torch.float32), documents, CONFIG)
        assert other.config == calibrated[0].config
        assert not torch.equal(other.costs.loss, calibrated[0].costs.loss)

    def test_gradients_are_those_of_each_documents_beginning_with_labels_of_its_own(self, monkeypatch):
        documents = [tokens(LENGTH, seed=seed)[0] for seed in (0, 1)]
        seen = []

        def moments(model, document, seed):
            seen.append((document.tolist(), seed))
            return {layer: torch.eye(HEAD_DIM).repeat(NUM_HEADS, 1, 1) for layer in range(NUM_LAYERS)}

        monkeypatch.setattr(conversion, "_gradient_moments", moments)
        monkeypatch.setattr(conversion, "GRADIENT_TOKENS", 50)
        calibrate(tiny_model(dtype=torch.float32), documents, CONFIG.replace(seed=7))
        assert seen == [(documents[0][:50].tolist(), 7), (documents[1][:50].tolist(), 8)]

    def test_costs_are_those_of_all_documents(self, calibrated):
        costs = calibrated[0].costs
        assert costs.loss.shape == costs.read.shape == (NUM_LAYERS, NUM_HEADS, 4, 3)
        assert (costs.rows, costs.tokens, costs.group) == (3 * (LENGTH - 60), 3 * LENGTH, NUM_HEADS // NUM_KV_HEADS)
        assert costs.admissible.tolist() == [3 * LENGTH * (LENGTH + 1) / 2] * NUM_LAYERS
        assert costs.least_density == pytest.approx(least_density(CONFIG, dict.fromkeys(range(NUM_LAYERS)), LENGTH))
        assert (costs.loss > 0).all()

    @pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen3", "gemma2", "gpt_oss"])
    def test_a_model_is_left_as_it_was(self, family):
        model = tiny_model(family, dtype=torch.float32).train()
        next(model.parameters()).requires_grad_(False)
        before = traces(model)
        config = CONFIG.replace(dense_below=10)  # smaller than any layer's own window
        calibrate(model, [tokens(minimum_tokens(config))[0]], config)
        after = traces(model)
        after["attached"] = [key for key in after["attached"] if key != PATTERN]
        assert after == before

    def test_local_layers_become_dense_ones_that_cost_nothing(self):
        model, document = tiny_model("gemma3", dtype=torch.float32), tokens(LENGTH)[0]
        calibration = calibrate(model, [document], CONFIG)
        config, choice = calibration.choose(0.7, 1000)
        assert (calibration.local_layers, config.dense_layers, choice.dense_layers) == ((0,), (0,), ())
        costs = calibration.costs
        assert costs.admissible.tolist() == [0, LENGTH * (LENGTH + 1) / 2]
        assert costs.fixed[0] == costs.loss[0].sum() == costs.read[0].sum() == 0
        assert costs.least_density == pytest.approx(least_density(CONFIG, {0: 14, 1: None}, LENGTH))
        assert measured_density(model, config, document) == pytest.approx(choice.density, rel=0.1)

    def test_a_model_of_local_layers_alone(self):
        with pytest.raises(ValueError, match="all of its layers have sliding windows of their own so small"):
            calibrate(tiny_model("mistral-sliding", dtype=torch.float32), [tokens(LENGTH)[0]], CONFIG)

    def test_absent_configuration_stays_absent(self):
        model = tiny_model(dtype=torch.float32)
        del model.config.sparse_attention
        calibrate(model, [tokens(minimum_tokens(CONFIG))[0]], CONFIG)
        assert not hasattr(model.config, "sparse_attention")

    @pytest.mark.parametrize("forward", [1, 2], ids=["gradients", "queries and keys"])
    def test_a_failure_leaves_the_model_as_it_was(self, forward):
        model = tiny_model(dtype=torch.float32)
        before = traces(model)
        calls = []

        def fail(*_):
            calls.append(None)
            if len(calls) == forward:
                raise RuntimeError("stop")

        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            calibrate(model, [tokens(LENGTH)[0]], CONFIG)
        hook.remove()
        after = traces(model)
        after["attached"] = [key for key in after["attached"] if key != PATTERN]
        assert after == before

    def test_too_short(self):
        documents = [tokens(minimum_tokens(CONFIG) - shorter)[0] for shorter in (0, 1)]
        with pytest.raises(ValueError, match=r"must have at least 188 tokens.*the shortest has 187$"):
            calibrate(tiny_model(dtype=torch.float32), documents, CONFIG)

    @pytest.mark.parametrize("fields", [{}, {"dense_below": 0}, {"page_size": 1}, {"window_size": 50}], ids=str)
    def test_minimum_tokens_are_enough(self, fields):
        config = CONFIG.replace(**fields)
        calibration = calibrate(tiny_model(dtype=torch.float32), [tokens(minimum_tokens(config))[0]], config)
        assert (calibration.costs.read[..., 1, 0] > 0).all()

    def test_a_model_that_does_not_go_through_the_registry(self):
        model = tiny_model("llama", "sdpa", torch.float32)
        before = traces(model)
        with pytest.raises(ValueError, match="never goes through Transformers' attention registry"):
            calibrate(model, [tokens(LENGTH)[0]], CONFIG)
        assert traces(model) == before

    def test_layers_without_attention(self):
        calibration = calibrate(hybrid(), [tokens(LENGTH)[0]], CONFIG)
        assert (calibration.costs.loss[0] == 0).all()
        assert (calibration.costs.loss[1] > 0).all()
        config, choice = calibration.choose(0.3, 1000)
        assert max(choice.key_budget[1]) > 0
        assert choice.density == pytest.approx(measured_density(hybrid(), config, tokens(LENGTH)[0]), rel=0.1)

    def test_a_model_that_ends_without_attention_loads_again(self):
        config, _ = calibrate(hybrid(), [tokens(LENGTH)[0]], CONFIG).choose(0.3, 1000)
        configure(hybrid(), **config.to_dict())

    def test_key_budget_is_the_mean_of_layers_with_attention(self):
        choice = calibrate(hybrid(), [tokens(LENGTH)[0]], CONFIG).choose(0.9, 20)[1]
        assert sum(choice.key_budget[1]) / NUM_KV_HEADS <= 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_change_a_calibration(calibrated, dtype):
    (calibration, documents), model = calibrated, tiny_model(dtype=torch.float32)
    torch.set_default_dtype(dtype)
    try:
        found = calibrate(model, documents, CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.config == calibration.config
    assert torch.equal(found.costs.loss, calibration.costs.loss)


def hybrid():
    """One layer of attention between two of convolutions."""
    torch.manual_seed(0)
    config = hf.Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=NUM_HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        layer_types=["conv", "full_attention", "conv"],
        initializer_range=0.3,
        attn_implementation="sparse",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return hf.Lfm2ForCausalLM(config).eval()


class TestGradientMoments:
    @pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen3"])
    def test_those_of_the_models_own_attention(self, family):
        """Read where the heads' outputs enter the output projection, under the family's own dense attention."""
        ids = tokens(40)
        found = conversion._gradient_moments(tiny_model(family), ids[0], seed=5)

        model = tiny_model(family, "eager").requires_grad_(False)
        outputs = []

        def keep(module, inputs):
            outputs.append(inputs[0].requires_grad_())
            return (outputs[-1],)

        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(keep)
        scores = model(ids, use_cache=False).logits[0]
        drawn = torch.rand(40, 1, generator=torch.Generator().manual_seed(5))[:, 0]
        labels = [int((row.softmax(-1).cumsum(-1) < u).sum()) for row, u in zip(scores.detach(), drawn, strict=True)]
        loss = sum(F.cross_entropy(row[None], torch.tensor([label])) for row, label in zip(scores, labels, strict=True))
        assert set(found) == set(range(NUM_LAYERS))
        for layer, gradient in enumerate(torch.autograd.grad(loss, outputs)):
            for head in range(NUM_HEADS):
                of_head = gradient[0, :, head * HEAD_DIM : (head + 1) * HEAD_DIM]
                expected = sum(torch.outer(row, row) for row in of_head) / 40
                atol = 1e-5 * float(expected.abs().amax())
                torch.testing.assert_close(found[layer][head].double(), expected, rtol=1e-4, atol=atol)

    def test_labels_are_drawn_from_the_model(self):
        """Another seed gives other labels; a sure model is never surprised, so nothing matters to it."""
        model, document = tiny_model(dtype=torch.float32), tokens(40)[0]
        moments = [conversion._gradient_moments(model, document, seed)[0] for seed in (0, 0, 1)]
        assert torch.equal(moments[0], moments[1])
        assert not torch.equal(moments[0], moments[2])
        with torch.no_grad():
            model.lm_head.weight.mul_(1e4)
        assert conversion._gradient_moments(model, document, 0)[0].abs().amax() < 1e-6 * moments[0].abs().amax()


class TestChoose:
    @pytest.mark.parametrize("budget", range(4))
    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_densities_are_those_that_the_model_reads(self, family, budget):
        """Every sparse row finds as many keys as the largest budget and CONFIG's pages hold no row back, so that each
        row reads the same number, sampled or not. Gemma's first layer has a window that leaves nothing to route."""
        document, model = tokens(LENGTH)[0], tiny_model(family, dtype=torch.float32)
        calibration = calibrate(model, [document], CONFIG)
        costs = calibration.costs
        config = calibration.config.replace(key_budget=allocation.BUDGETS[budget], min_weight=0.0)
        pairs = NUM_HEADS * costs.fixed + costs.read[:, :, budget, 0].sum(1)
        expected = float(pairs.sum() / (NUM_HEADS * costs.admissible.sum()))
        assert measured_density(model, config, document) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("density", [0.25, 0.3, 0.6, 1.0])
    def test_chosen_densities_are_those_that_the_model_reads(self, monkeypatch, density):
        monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0,))
        document, model = tokens(LENGTH)[0], tiny_model(dtype=torch.float32)
        config, choice = calibrate(model, [document], CONFIG).choose(density, 1000)
        assert choice.density <= density
        assert measured_density(model, config, document) == pytest.approx(choice.density, rel=1e-9)

    @pytest.mark.parametrize(
        "family",
        ["llama", "gpt_oss"],
    )
    def test_smallest_weights_leave_out_about_as_many_keys_as_predicted(self, family):
        """A row's own weights exceed the dense ones that they are predicted with: it reads a little more."""
        document, model = tokens(LENGTH)[0], tiny_model(family, dtype=torch.float32)
        calibration = calibrate(model, [document], CONFIG)
        costs = calibration.costs
        pairs = NUM_HEADS * costs.fixed.sum() + costs.read[:, :, 3].sum((0, 1))
        predicted = (pairs / (NUM_HEADS * costs.admissible.sum())).tolist()
        for min_weight, share in zip(allocation.MIN_WEIGHTS, predicted, strict=True):
            config = calibration.config.replace(key_budget=40, min_weight=min_weight)
            assert share * 0.99 < measured_density(model, config, document) < share * 1.05
        assert predicted[0] > 1.1 * predicted[1] > 1.2 * predicted[2]

    @pytest.mark.parametrize("density", [0.25, 0.4])
    def test_the_configuration_is_the_choice(self, calibrated, density):
        config, choice = calibrated[0].choose(density, 1000)
        assert (config.key_budget, config.min_weight, config.dense_layers) == (
            choice.key_budget,
            choice.min_weight,
            choice.dense_layers,
        )
        unfitted = {name: getattr(CONFIG, name) for name in ("key_budget", "min_weight", "dense_layers")}
        assert config.replace(**unfitted) == calibrated[0].config
        assert SparseAttentionConfig.from_dict(config.to_dict()) == config

    @pytest.mark.parametrize("density", [0.25, 0.4])
    def test_both_implementations_run_it_alike(self, calibrated, density):
        calibration, documents = calibrated
        fields = calibration.choose(density, 1000)[0].to_dict()
        model = tiny_model()
        found = []
        for implementation in ("auto", "reference"):
            model.config.sparse_attention = {**fields, "implementation": implementation}
            found.append(logits(model, documents[0][None]))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
        model.config.sparse_attention = {"dense_below": LENGTH}
        assert (logits(model, documents[0][None]) - found[0]).abs().amax() > 1e-2

    def test_trade_goes_from_the_least_density_to_a_half(self, calibrated):
        trade = calibrated[0].trade(1000)
        densities, losses = [point.density for point in trade], [point.loss for point in trade]
        assert densities == sorted(densities)
        assert losses == sorted(losses, reverse=True)
        least = calibrated[0].costs.least_density
        assert least <= densities[0] < least + 0.02
        assert trade[-1] == calibrated[0].choose(0.5, 1000)[1]
        assert losses[-1] < losses[0] / 2

    def test_predicted_losses_follow_measured_ones(self, calibrated):
        """With labels from the dense model the loss rises by the divergence of the two models' distributions."""
        calibration, documents = calibrated
        model = tiny_model(dtype=torch.float32)
        dense = [distributions(model, document, CONFIG.replace(dense_below=LENGTH)) for document in documents]
        measured, predicted = [], []
        for density in (0.24, 0.3, 0.5):
            config, choice = calibration.choose(density, 1000)
            sparse = [distributions(model, document, config) for document in documents]
            rises = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(dense, sparse, strict=True)]
            measured.append(float(sum(rises)) / len(rises))
            predicted.append(choice.loss)
        assert predicted == sorted(predicted, reverse=True)
        for ours, real in zip(predicted, measured, strict=True):
            assert 0.1 < ours / real < 10


def distributions(model, document, config):
    """Logarithms of the next token's probabilities."""
    model.config.sparse_attention = config.to_dict()
    return logits(model, document[None])[0].log_softmax(-1)


def sequence(results, seen):
    """A `compare_perplexity` that measures these rises of the loss, one after another."""

    def compare(model, rows, **_):
        seen.append(dict(model.config.sparse_attention))
        return {"delta_nll": {"mean": results[len(seen) - 1]}}

    return compare


def _first_choice(calibration, max_loss):
    return conversion._smallest_density(calibration, max_loss / conversion.LOSS_FACTOR, 1000)[1]


class TestChooseByLoss:
    def test_the_measured_loss_is_under_the_limit(self, calibrated):
        calibration, documents = calibrated
        model = tiny_model(dtype=torch.float32)
        row = [{"name": "document", "input_ids": documents[-1].tolist()}]
        for max_loss in (0.5, 0.05):
            config, choice = choose_by_loss(model, calibration, documents[-1], max_loss, 1000)
            assert (config, choice) == calibration.choose(choice.density, 1000)
            model.config.sparse_attention = config.to_dict()
            assert compare_perplexity(model, row)["delta_nll"]["mean"] <= max_loss

    def test_the_first_choice_is_the_smallest_density_that_is_predicted_to_do(self, calibrated, monkeypatch):
        calibration, documents = calibrated
        seen = []
        aim = calibration.choose(0.3, 1000)[1]
        most = conversion.LOSS_FACTOR * aim.loss
        monkeypatch.setattr(conversion, "compare_perplexity", sequence([0.6 * most], seen))
        config, choice = choose_by_loss(tiny_model(dtype=torch.float32), calibration, documents[0], most, 1000)
        assert choice.loss <= aim.loss
        assert choice.density == aim.density
        assert seen == [config.to_dict()]

    @pytest.mark.parametrize(("second", "taken"), [(0.9, 1), (1.1, 0)], ids=["holds", "is too much"])
    def test_a_loss_far_under_the_limit_makes_one_sparser_choice(self, calibrated, monkeypatch, second, taken):
        """The loss rises as predicted, without a factor: that much less needs to be read, if it then still holds."""
        calibration, documents = calibrated
        seen = []
        aim = calibration.choose(0.3, 1000)[1]
        most = conversion.LOSS_FACTOR * aim.loss
        monkeypatch.setattr(conversion, "compare_perplexity", sequence([aim.loss, second * most], seen))
        config, choice = choose_by_loss(tiny_model(dtype=torch.float32), calibration, documents[0], most, 1000)
        assert len(seen) == 2
        assert config.to_dict() == seen[taken]
        assert (choice.density < aim.density) == (taken == 1)

    def test_noise_where_nothing_is_predicted_is_no_factor(self, calibrated, monkeypatch):
        """The first choice reads everything; its loss is rounding, and says nothing of sparser choices."""
        calibration, documents = calibrated
        sparser, seen = calibration.choose(0.9, 1000)[1], []
        most = 1.5 * sparser.loss
        assert _first_choice(calibration, most).loss == 0
        monkeypatch.setattr(conversion, "compare_perplexity", sequence([1e-8, most], seen))
        _, choice = choose_by_loss(tiny_model(dtype=torch.float32), calibration, documents[0], most, 1000)
        assert len(seen) == 2
        assert choice.density < 1

    def test_a_measured_factor_makes_the_next_choice_denser(self, calibrated, monkeypatch):
        """The first choice loses half more than was predicted: the next one is to be predicted that much lower."""
        calibration, documents = calibrated
        seen, steps = [], []
        first = calibration.choose(0.3, 1000)[1]
        most = conversion.LOSS_FACTOR * first.loss
        monkeypatch.setattr(conversion, "compare_perplexity", sequence([1.5 * most, most], seen))
        model = tiny_model(dtype=torch.float32)
        config, choice = choose_by_loss(model, calibration, documents[0], most, 1000, steps.append)
        assert choice.loss <= first.loss / 1.5
        assert choice.density > first.density
        assert seen[1] == config.to_dict() != seen[0]
        assert len(steps) == 4
        below = calibration.choose(choice.density - 0.01, 1000)[1]
        assert below.loss > first.loss / 1.5, "no smaller density would have done"

    def test_impossible(self, calibrated, monkeypatch):
        calibration, documents = calibrated
        seen = []
        monkeypatch.setattr(conversion, "compare_perplexity", sequence([1.0] * 99, seen))
        model = tiny_model(dtype=torch.float32)
        before = dict(model.config.sparse_attention)
        with pytest.raises(
            ValueError, match=r"^a rise of the loss by at most 0\.01 was not reached in 5 tries, .*1\.0"
        ):
            choose_by_loss(model, calibration, documents[0], 0.01, 1000)
        assert len(seen) == 5
        assert model.config.sparse_attention == before

    @pytest.mark.parametrize(
        "present",
        [True, False],
        ids=["configured", "unconfigured"],
    )
    @pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
    def test_the_model_is_left_as_it_was(self, calibrated, monkeypatch, present, fails):
        calibration, documents = calibrated
        model = tiny_model(dtype=torch.float32)
        if not present:
            del model.config.sparse_attention
        before = dict(model.config.__dict__)
        if fails:
            monkeypatch.setattr(conversion, "compare_perplexity", sequence([], []))
            with pytest.raises(IndexError):
                choose_by_loss(model, calibration, documents[0], 1.0, 1000)
        else:
            choose_by_loss(model, calibration, documents[0], 100.0, 1000)
        assert model.config.__dict__ == before


@pytest.mark.parametrize("fields", [{"by_layer": [{"stride": 3}]}, {"by_kv_head": [{"stride": 3}]}], ids=str)
def test_patterns_that_differ_by_layer_or_head_are_refused(fields):
    """All layers are measured at the same rows."""
    with pytest.raises(ArgumentError, match="sparse_attention: by_layer and by_kv_head cannot be fitted"):
        minimum_tokens(SparseAttentionConfig(**fields))
