import pytest
import torch
from attention_checks import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, logits, make_pattern, tiny_model, tokens

from hf_sparse_attn import SparseAttentionConfig, conversion
from hf_sparse_attn.conversion import (
    BUDGETS,
    CODEBOOK_SIZE,
    NUM_CODEBOOKS,
    allocate_budgets,
    calibrate,
    describe_budgets,
    minimum_tokens,
    num_steps,
)
from hf_sparse_attn.hashing import BucketHash, quantize_codewords
from hf_sparse_attn.ops.reference import attended_keys
from hf_sparse_attn.routing import LayerPattern

CONFIG = SparseAttentionConfig(window_size=8, num_global_tokens=2, page_size=16, dense_below=0)


def errors(*heads):
    """Error of every head of one layer at each of BUDGETS, from a function of the budget."""
    return torch.tensor([[head(budget) for budget in BUDGETS] for head in heads], dtype=torch.float64)[None]


def flat(level):
    return lambda budget: level


def falling(start, keys):
    """An error that falls in a straight line to 0 at `keys` keys."""
    return lambda budget: start * max(0.0, 1 - budget / keys)


class TestAllocateBudgets:
    @pytest.mark.parametrize("mean_budget", [0, 63, 64, 100, 500, 2000, 5000])
    def test_the_mean_is_never_exceeded(self, mean_budget):
        generator = torch.Generator().manual_seed(0)
        curves = (
            torch.rand(3, 5, len(BUDGETS), generator=generator, dtype=torch.float64).sort(-1, descending=True).values
        )
        budgets = allocate_budgets(curves, mean_budget)
        assert budgets.shape == (3, 5)
        assert set(budgets.flatten().tolist()) <= set(BUDGETS)
        assert budgets.double().mean() <= mean_budget
        if mean_budget >= 500:
            assert budgets.double().mean() > mean_budget * 0.9 or (budgets == BUDGETS[-1]).all()

    def test_a_head_without_error_gets_nothing(self):
        assert allocate_budgets(errors(flat(0.0), falling(1.0, 2048)), 1024).tolist() == [[0, 2048]]

    def test_a_head_whose_error_does_not_fall_gets_nothing(self):
        assert allocate_budgets(errors(flat(0.5), falling(0.1, 512)), 1024).tolist() == [[0, 512]]

    def test_a_head_whose_error_grows_gets_nothing(self):
        assert allocate_budgets(errors(lambda budget: budget / 2048), 1024).tolist() == [[0]]

    def test_the_steeper_head_comes_first(self):
        assert allocate_budgets(errors(falling(0.1, 1024), falling(0.9, 1024)), 512).tolist() == [[0, 1024]]

    def test_a_head_that_gains_late_is_found_behind_a_plateau(self):
        """Its first steps bring nothing; the way to 512 as a whole brings more per key than the other head does."""
        late = lambda budget: 0.0 if budget >= 512 else 1.0  # noqa: E731
        assert allocate_budgets(errors(late, falling(0.5, 2048)), 256).tolist() == [[512, 0]]

    def test_a_step_that_costs_too_much_leaves_room_for_cheaper_ones(self):
        late = lambda budget: 0.0 if budget >= 2048 else 1.0  # noqa: E731
        assert allocate_budgets(errors(late, falling(0.01, 64)), 64).tolist() == [[0, 64]]


def clustered(num_clusters=40, size=30, dim=16, seed=0):
    """Keys in tight clusters along directions that the queries see, under noise in one that they do not."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(num_clusters, dim, generator=generator)
    keys = centres.repeat_interleave(size, 0) + 0.15 * torch.randn(num_clusters * size, dim, generator=generator)
    keys[:, 0] = 30 * torch.randn(len(keys), generator=generator)
    order = torch.randperm(len(keys), generator=generator)
    queries = torch.randn(200, dim, generator=generator)
    queries[:, 0] *= 1e-3
    return queries, keys[order], torch.arange(num_clusters).repeat_interleave(size)[order]


def fitted(queries, keys, seed=0):
    moment = queries.T @ queries / len(queries)
    weight, bias = conversion._fit_head(keys, moment, torch.Generator().manual_seed(seed))
    return BucketHash(weight[None], bias[None])


class TestFitHead:
    def test_shapes_and_rounding(self):
        queries, keys, _ = clustered()
        bucket_hash = fitted(queries, keys)
        assert bucket_hash.weight.shape == (1, 16, NUM_CODEBOOKS, CODEBOOK_SIZE)
        assert bucket_hash.bias.shape == (1, NUM_CODEBOOKS, CODEBOOK_SIZE)
        torch.testing.assert_close(quantize_codewords(bucket_hash.weight), bucket_hash.weight)

    def test_deterministic(self):
        queries, keys, _ = clustered()
        assert torch.equal(fitted(queries, keys).weight, fitted(queries, keys).weight)

    def test_buckets_hold_one_cluster_each_where_random_hyperplanes_mix_them(self):
        queries, keys, cluster = clustered()

        def purity(bucket_hash):
            bucket = bucket_hash.assign(keys[None])[0]
            largest = [torch.bincount(cluster[bucket == b]).max() for b in bucket.unique()]
            return float(sum(largest)) / len(keys)

        random = make_pattern(SparseAttentionConfig(num_hash_bits=10), 1, 1, 16, dtype=torch.float32).bucket_hash
        assert purity(fitted(queries, keys)) > 0.9
        # As many buckets as keys, almost: what hyperplanes keep together is by chance.
        assert len(fitted(queries, keys).assign(keys[None]).unique()) < len(random.assign(keys[None]).unique())

    def test_assignment_is_nearest_codeword_in_the_queries_metric(self):
        """Keys of one bucket score alike: the spread of scores within buckets is a small part of the whole."""
        queries, keys, _ = clustered()
        scores = keys @ queries.T
        bucket = fitted(queries, keys).assign(keys[None])[0]
        within = sum(float((scores[bucket == b] - scores[bucket == b].mean(0)).square().sum()) for b in bucket.unique())
        assert within < 0.1 * float((scores - scores.mean(0)).square().sum())

    def test_routes_better_than_random_hyperplanes_of_as_many_buckets(self):
        """Attention mass that the routed keys of the last rows keep, of what the best keys of that number would."""
        queries, keys, _ = clustered()
        config = CONFIG.replace(key_budget=60, num_hash_bits=10, num_global_tokens=0, window_size=1)
        rows = 2 * queries[None, -40:]
        weights = (rows[0] @ keys.T).softmax(-1)
        best = float(weights.topk(61, -1).values.sum(-1).mean())

        def kept(bucket_hash):
            pattern = LayerPattern(config, 0, [60], bucket_hash)
            attended = attended_keys(rows, keys[None], pattern, len(keys) - 40)
            assert (attended.sum(-1) <= 61).all()
            return float((weights * attended[0]).sum(-1).mean()) / best

        random = make_pattern(config, 1, 1, 16, dtype=torch.float32).bucket_hash
        assert kept(fitted(queries, keys)) > 0.9
        assert kept(fitted(queries, keys)) > kept(random) + 0.1


@pytest.fixture
def small_budgets(monkeypatch):
    """Budgets that mean something at 200 tokens."""
    monkeypatch.setattr(conversion, "BUDGETS", (0, 8, 16, 32, 64))
    return conversion.BUDGETS


class TestCalibrate:
    def test_fitted_config_loads_runs_and_keeps_everything_else(self, small_budgets):
        model = tiny_model(dtype=torch.float32, window_size=3)
        before = dict(model.config.sparse_attention)
        steps = []
        documents = [tokens(minimum_tokens(CONFIG) + 60, seed=seed)[0] for seed in (0, 1, 2)]
        config = calibrate(model, documents, CONFIG, 16, steps.append)
        assert model.config.sparse_attention == before
        assert len(steps) == num_steps(3) == 4
        assert config.replace(hash="random", calibrated_hash=None, key_budget=CONFIG.key_budget) == CONFIG
        assert SparseAttentionConfig.from_dict(config.to_dict()) == config
        budgets = torch.tensor(config.key_budget)
        assert budgets.shape == (NUM_LAYERS, NUM_HEADS)
        assert set(budgets.flatten().tolist()) <= set(small_budgets)
        assert 0 < budgets.double().mean() <= 16
        assert describe_budgets(config, NUM_LAYERS, NUM_HEADS) == {
            "mean": budgets.double().mean().item(),
            "min": int(budgets.min()),
            "max": int(budgets.max()),
        }
        model.config.sparse_attention = config.to_dict()
        ours = logits(model, documents[0][None])
        assert ours.isfinite().all()
        model.config.sparse_attention = {**config.to_dict(), "implementation": "reference"}
        expected = logits(model, documents[0][None])
        assert (ours - expected).abs().mean() < 1e-3 * expected.abs().mean()

    def test_deterministic(self, small_budgets):
        documents = [tokens(minimum_tokens(CONFIG))[0]]
        configs = [calibrate(tiny_model(dtype=torch.float32), documents, CONFIG, 16) for _ in range(2)]
        assert configs[0] == configs[1]
        assert configs[0] != calibrate(tiny_model(dtype=torch.float32), documents, CONFIG.replace(seed=1), 16)

    def test_hash_is_fitted_to_the_models_own_keys(self, small_budgets):
        """Each layer and KV head has its own codewords, of the model's head_dim."""
        config = calibrate(tiny_model(dtype=torch.float32), [tokens(minimum_tokens(CONFIG))[0]], CONFIG, 16)
        hashes = [
            make_pattern(config, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, layer).bucket_hash for layer in range(NUM_LAYERS)
        ]
        codewords = torch.stack([bucket_hash.weight for bucket_hash in hashes]).flatten(0, 1)
        assert len(codewords) == NUM_LAYERS * NUM_KV_HEADS
        assert len(codewords.flatten(1).unique(dim=0)) == len(codewords)

    def test_absent_configuration_stays_absent(self, small_budgets):
        model = tiny_model(dtype=torch.float32)
        del model.config.sparse_attention
        calibrate(model, [tokens(minimum_tokens(CONFIG))[0]], CONFIG, 16)
        assert not hasattr(model.config, "sparse_attention")

    @pytest.mark.parametrize("where", ["progress", "model"])
    def test_a_failure_leaves_the_model_as_it_was(self, where, monkeypatch):
        model = tiny_model(dtype=torch.float32)
        before = dict(model.config.sparse_attention)
        calls = []

        def fail(*args, **kwargs):
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("stop")

        if where == "model":
            model.model.layers[1].register_forward_pre_hook(lambda *args: fail() or fail())
        with pytest.raises(RuntimeError, match="stop"):
            calibrate(model, [tokens(200)[0]], CONFIG, 16, fail if where == "progress" else lambda step: None)
        assert model.config.sparse_attention == before
        assert not any("_sparse_attention_observer" in module.__dict__ for module in model.modules())

    def test_too_short(self):
        long, short = tokens(minimum_tokens(CONFIG))[0], tokens(minimum_tokens(CONFIG) - 1)[0]
        with pytest.raises(ValueError, match=r"must have at least 138 tokens.*the shortest has 137$"):
            calibrate(tiny_model(dtype=torch.float32), [long, short], CONFIG, 16)

    def test_dense_rows_count_as_too_short(self):
        with pytest.raises(ValueError, match="must have at least 228 tokens"):
            calibrate(tiny_model(dtype=torch.float32), [tokens(200)[0]], CONFIG.replace(dense_below=100), 16)

    def test_a_model_that_does_not_go_through_the_registry(self):
        model = tiny_model("llama", "sdpa", torch.float32)
        with pytest.raises(ValueError, match="never goes through Transformers' attention registry"):
            calibrate(model, [tokens(200)[0]], CONFIG, 16)
        assert not hasattr(model.config, "sparse_attention")
