"""The calibrated hash: keys that the queries score alike share a bucket."""

import torch
from helpers.operation import make_pattern

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.hashing import quantize_codewords
from hf_sparse_attn.hashing.product_quantizer import CODEBOOK_SIZE, NUM_CODEBOOKS, fit_hash
from hf_sparse_attn.ops.reference import attended_keys
from hf_sparse_attn.patterns import LayerPattern


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
    return fit_hash(keys[None], moment[None], seed)


def spread(queries, keys, bucket):
    """Share of the scores' variance that lies within the buckets."""
    scores = keys @ queries.T
    within = sum(float((scores[bucket == b] - scores[bucket == b].mean(0)).square().sum()) for b in bucket.unique())
    return within / float((scores - scores.mean(0)).square().sum())


class TestFitHash:
    def test_shapes_and_rounding(self):
        queries, keys, _ = clustered()
        bucket_hash = fitted(queries, keys)
        assert bucket_hash.weight.shape == (1, 16, NUM_CODEBOOKS, CODEBOOK_SIZE)
        assert bucket_hash.bias.shape == (1, NUM_CODEBOOKS, CODEBOOK_SIZE)
        torch.testing.assert_close(quantize_codewords(bucket_hash.weight), bucket_hash.weight)

    def test_deterministic(self):
        queries, keys, _ = clustered()
        assert torch.equal(fitted(queries, keys).weight, fitted(queries, keys).weight)

    def test_another_seed_starts_elsewhere(self):
        queries, keys, _ = clustered()
        assert not torch.equal(fitted(queries, keys, 0).weight, fitted(queries, keys, 1).weight)

    def test_heads_are_fitted_to_their_own_keys_and_queries(self):
        queries, keys, _ = clustered()
        parts = [(queries, keys), (queries.roll(1, 1), keys.roll(1, 1))]  # the noise is elsewhere in the second one
        moments = torch.stack([q.T @ q / len(q) for q, _ in parts])
        both = fit_hash(torch.stack([k for _, k in parts]), moments, 0)
        assert both.weight.shape == (2, 16, NUM_CODEBOOKS, CODEBOOK_SIZE)
        for i, (q, k) in enumerate(parts):
            assert spread(q, k, both.assign(torch.stack([k, k]))[i]) < 0.1
            assert spread(q, k, both.assign(torch.stack([k, k]))[1 - i]) > 0.3

    def test_directions_count_as_much_as_the_queries_see_of_them(self):
        """Queries see some directions thirty times as strongly as others; the buckets keep apart what they see."""
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(200, 8, generator=generator) * torch.logspace(-1, 0.5, 8)
        keys = torch.randn(1500, 8, generator=generator)
        bucket = fitted(queries, keys).assign(keys[None])[0]
        assert spread(queries, keys, bucket) < 0.05

    def test_fewer_keys_than_codewords_and_equal_keys(self):
        keys = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0)).expand(1, 40, 6).contiguous()
        keys[:, 20:] += 1
        bucket_hash = fit_hash(keys, torch.eye(6)[None], 0)
        assert bucket_hash.weight.isfinite().all()
        assert bucket_hash.bias.isfinite().all()
        bucket = bucket_hash.assign(keys)[0]
        assert len(bucket[:20].unique()) == len(bucket[20:].unique()) == 1
        assert bucket[0] != bucket[20]

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
        assert spread(queries, keys, fitted(queries, keys).assign(keys[None])[0]) < 0.1

    def test_routes_better_than_random_hyperplanes_of_as_many_buckets(self):
        """Attention mass that the routed keys of the last rows keep, of what the best keys of that number would."""
        queries, keys, _ = clustered()
        config = SparseAttentionConfig(
            window_size=1, num_global_tokens=0, key_budget=60, num_hash_bits=10, page_size=16, dense_below=0
        )
        rows = 2 * queries[None, -40:]
        weights = (rows[0] @ keys.T).softmax(-1)
        best = float(weights.topk(61, -1).values.sum(-1).mean())

        def kept(bucket_hash):
            pattern = LayerPattern(config, 0, [60], [0.0], bucket_hash)
            attended = attended_keys(rows, keys[None], pattern, len(keys) - 40, scaling=1.0)
            assert (attended.sum(-1) <= 61).all()
            return float((weights * attended[0]).sum(-1).mean()) / best

        random = make_pattern(config, 1, 1, 16, dtype=torch.float32).bucket_hash
        assert kept(fitted(queries, keys)) > 0.9
        assert kept(fitted(queries, keys)) > kept(random) + 0.1
