"""The operation beside what `ops/` tests: masks, modes, dropout, statistics, graphs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import FEATURES, KV_HEADS, sinks_of
from helpers.operation import KeyMask
from helpers.tensors import EXACT, assert_all_close, batch, config, with_gradients
from torch.utils.checkpoint import checkpoint

from hf_sparse_attn import AttentionStatistics, SparseAttentionConfig, sparse_attention
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.operation import in_mode
from hf_sparse_attn.ops.common.dropout import Dropout


class TestMasks:
    PADDED = ([[1] * 70], [[0] * 9 + [1] * 61], [[1] * 48 + [0] * 22], [[1] * 20 + [0] * 7 + [1] * 40 + [0] * 3])

    @pytest.mark.parametrize("num_queries", [70, 25])
    @pytest.mark.parametrize("given_as", ["key_padding_mask", "attention_mask", "both"])
    def test_each_row_is_as_alone(self, num_queries, given_as):
        keep = torch.tensor(self.PADDED, dtype=torch.bool).flatten(0, 1)
        tensors = batch(num_queries, 70, len(keep))
        causal = torch.ones(num_queries, 70, dtype=torch.bool).tril(70 - num_queries)
        own = (torch.arange(70) == torch.arange(70 - num_queries, 70)[:, None]) & ~keep[:, None]
        masks = {
            "key_padding_mask": {"key_padding_mask": keep},
            "attention_mask": {"attention_mask": (causal & keep[:, None]) & ~own},
            "both": {"attention_mask": causal, "key_padding_mask": keep},
        }[given_as]
        found = with_gradients(lambda q, k, v: sparse_attention(q, k, v, config=config(), **masks), *tensors)

        def one_by_one(query, key, value):
            output = torch.zeros_like(query)
            for i, row in enumerate(keep):
                rows, own = row[-num_queries:], (key[i : i + 1, :, row], value[i : i + 1, :, row])
                reference = config(implementation="reference")
                output[i, :, rows] = sparse_attention(query[i : i + 1, :, rows], *own, config=reference)[0]
            return output

        assert_all_close(found, with_gradients(one_by_one, *tensors))
        assert (found[0].transpose(1, 2)[~keep[:, -num_queries:]] == 0).all()

    def test_packed(self):
        tensors = batch(batch_size=1)
        document = torch.tensor([0] * 30 + [1] * 25 + [2] * 15)
        mask = (document[:, None] == document).tril()
        found = sparse_attention(*tensors, config=config(), attention_mask=mask)
        parts = [[x[:, :, document == i] for x in tensors] for i in range(3)]
        torch.testing.assert_close(found, torch.cat([sparse_attention(*p, config=config()) for p in parts], 2), **EXACT)

    @pytest.mark.parametrize("name", ["key_padding_mask", "attention_mask"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
    def test_other_dtypes_are_refused(self, name, dtype):
        mask = torch.ones((2, 70) if name == "key_padding_mask" else (70, 70), dtype=dtype)
        with pytest.raises(ArgumentError, match=rf"^{name}: must be bool, True .*; got {dtype}$"):
            sparse_attention(*batch(), config=config(), **{name: mask})

    def test_other_shapes_are_refused(self):
        ones = torch.ones(2, 71, dtype=torch.bool)
        with pytest.raises(ArgumentError, match=r"^key_padding_mask: must be of shape \(2, 70\), got \(2, 71\)$"):
            sparse_attention(*batch(), config=config(), key_padding_mask=ones)
        with pytest.raises(ArgumentError, match=r"^attention_mask: .* or \(2, 1, 70, 70\), got \(2, 71\)$"):
            sparse_attention(*batch(), config=config(), attention_mask=ones)

    def test_a_mask_that_is_not_causal_is_refused(self):
        with pytest.raises(ValueError, match="other than causal attention inside documents"):
            sparse_attention(*batch(), config=config(), attention_mask=torch.ones(70, 70, dtype=torch.bool))


class TestModes:
    ROW, KEY = torch.arange(70)[:, None], torch.arange(70)

    @pytest.mark.parametrize(
        ("mode", "fields", "admitted"),
        [
            ("all", {}, KEY <= ROW),
            ("local", {"num_random_keys": 5, "stride": 7, "dense_below": 50}, (KEY > ROW - 11) | (KEY < 3)),
            ("local", {"global_token_indices": (20,)}, (KEY > ROW - 11) | (KEY < 3) | (KEY == 20)),
            ("strided", {}, (KEY > ROW - 11) | (KEY < 3) | (KEY % 11 == 0)),
            ("strided", {"stride": 7}, (KEY > ROW - 11) | (KEY < 3) | (KEY % 7 == 0)),
        ],
    )
    def test_what_rows_read(self, mode, fields, admitted):
        query, key, value = batch()
        found = sparse_attention(query, key, value, config=config(**fields), mode=mode)
        mask = admitted & (self.KEY <= self.ROW)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(found, expected, **EXACT)

    def test_routed_is_the_config_as_it_is(self):
        tensors = batch()
        routed = sparse_attention(*tensors, config=config(), mode="routed")
        assert torch.equal(routed, sparse_attention(*tensors, config=config()))
        assert not torch.allclose(routed, sparse_attention(*tensors, config=config(), mode="local"))

    @pytest.mark.parametrize("mode", ["local", "strided"])
    def test_every_other_pattern_is_off(self, mode):
        kept = {"window_size": 5, "num_global_tokens": 2} | (
            {"stride": 7, "stride_offset": 2} if mode == "strided" else {}
        )
        others = {"dilated_window_size": 3, "slash_distances": (9,), "block_size": 8, "num_random_blocks": 1}
        given = SparseAttentionConfig(**kept, **others, by_layer=[{"window_size": 3}], by_kv_head=[{}, {"dilation": 2}])
        assert in_mode(given, mode) == SparseAttentionConfig(**kept, key_budget=0, dense_below=0)

    def test_another_is_refused(self):
        with pytest.raises(ArgumentError, match=r"^mode: must be one of routed, all, local, strided, got 'global'$"):
            sparse_attention(*batch(), config=config(), mode="global")


class TestDropout:
    @pytest.mark.parametrize(
        "name",
        [name for name, fields in FEATURES.items() if "sliding_window" not in fields and "budget over" not in name],
    )
    @pytest.mark.parametrize("num_queries", [90, 37])
    def test_like_the_specification(self, name, num_queries):
        tensors = batch(num_queries, 90)
        fields = {"dropout": 0.3, "dropout_seed": 2**40 + 5, "softcap": 0.9, "sinks": sinks_of()}

        def attend(implementation):
            own = config(**{**FEATURES[name], "implementation": implementation})
            return with_gradients(lambda q, k, v: sparse_attention(q, k, v, config=own, **fields), *tensors)

        found = attend("torch")
        assert_all_close(found, attend("reference"))
        assert not torch.allclose(found[0], sparse_attention(*tensors, config=config(**FEATURES[name])))

    def test_weights_are_dropped_or_scaled(self):
        """Values that are the rows of a unit matrix show the weights."""
        query, key, _ = batch(70, 70, 1)
        eye = torch.eye(70, dtype=torch.float64).expand(1, KV_HEADS, -1, -1)
        weights = sparse_attention(query, key, eye, config=config())
        dropped = sparse_attention(query, key, eye, config=config(), dropout=0.25, dropout_seed=3)
        read = weights > 0
        assert ((dropped[read] == 0) | ((dropped[read] / weights[read] - 4 / 3).abs() < 1e-12)).all()
        assert abs(float((dropped[read] == 0).double().mean()) - 0.25) < 4 * (0.25 * 0.75 / int(read.sum())) ** 0.5

    def test_the_mean_over_seeds_is_the_attention_without(self):
        tensors = batch(30, 30, 1)
        draws = torch.stack(
            [sparse_attention(*tensors, config=config(), dropout=0.5, dropout_seed=seed) for seed in range(200)]
        )
        error = draws.mean(0) - sparse_attention(*tensors, config=config())
        deviation = draws.std(0) / 200**0.5
        assert (error.abs() <= 5 * deviation + 1e-12).all()
        assert float((error / deviation)[deviation > 0].square().mean()) == pytest.approx(1, abs=0.2)

    def test_draws_are_independent(self):
        """Of the head, the row, the key, the batch row and the seed: no two streams agree more than by chance."""
        places = [torch.arange(n) for n in (6, 64, 64)]
        grid = [x.view([-1 if i == j else 1 for j in range(3)]) for i, x in enumerate(places)]
        streams = [Dropout(0.5, seed, row) for seed in (0, 1, 2**32, 2**32 + 1) for row in (0, 1)]
        kept = torch.stack([stream.factors(*grid) > 0 for stream in streams]).double() - 0.5  # [8, 6, 64, 64]
        for flat in (kept.flatten(0, 1).flatten(1), kept.movedim(2, 0).flatten(1), kept.movedim(3, 0).flatten(1)):
            correlation = 4 * flat @ flat.T / flat.shape[1]
            assert (correlation - torch.eye(len(flat))).abs().max() < 6 / flat.shape[1] ** 0.5

    def test_the_same_however_the_rows_are_computed(self):
        query, key, value = batch(70, 70)
        given = {"config": config(dense_below=20), "dropout": 0.4, "dropout_seed": 9}
        whole = sparse_attention(query, key, value, **given)
        first = sparse_attention(query[:, :, :41], key[:, :, :41], value[:, :, :41], **given)
        rest = sparse_attention(query[:, :, 41:], key, value, **given)
        torch.testing.assert_close(torch.cat([first, rest], 2), whole, **EXACT)
        keep = torch.tensor([[0] * 8 + [1] * 70, [1] * 70 + [0] * 8], dtype=torch.bool)
        padded = [torch.zeros(*x.shape[:2], 78, x.shape[3], dtype=x.dtype) for x in (query, key, value)]
        for target, x in zip(padded, (query, key, value), strict=True):
            target.transpose(1, 2)[keep] = x.transpose(1, 2).flatten(0, 1)
        found = sparse_attention(*padded, key_padding_mask=keep, **given).transpose(1, 2)[keep]
        torch.testing.assert_close(found, whole.transpose(1, 2).flatten(0, 1), **EXACT)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_recompute_drops_the_same(self, use_reentrant):
        """Also where nobody restores PyTorch's generator."""
        tensors = batch()
        torch.manual_seed(0)

        def attend(query, key, value):
            torch.rand(1)
            return sparse_attention(query, key, value, config=config(), dropout=0.5, dropout_seed=4)

        gradients = []
        for again in (False, True):
            leaves = [x.clone().requires_grad_() for x in tensors]
            options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
            output = checkpoint(attend, *leaves, **options) if again else attend(*leaves)
            output.square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        assert_all_close(*gradients)

    def test_all_keys(self):
        query, key, value = batch(40, 40)
        eye = torch.eye(40, dtype=torch.float64).expand(2, KV_HEADS, -1, -1)
        given = {"config": config(), "mode": "all", "dropout": 0.5, "dropout_seed": 1}
        weights = sparse_attention(query, key, eye, **given)
        assert 0.4 < float((weights > 0).double().sum()) / (2 * 4 * 40 * 41 / 2) < 0.6
        expected = weights @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(sparse_attention(query, key, value, **given), expected, **EXACT)

    @pytest.mark.parametrize("implementation", ["numba", "triton"])
    def test_other_implementations_refuse_it(self, implementation):
        own = config(implementation=implementation)
        with pytest.raises(ValueError, match=f'^implementation="{implementation}" knows neither attention dropout'):
            sparse_attention(*batch(), config=own, dropout=0.5, dropout_seed=1)

    def test_auto_takes_pytorchs_operations(self):
        tensors = batch()
        outputs = [
            sparse_attention(*tensors, config=config(implementation=name), dropout=0.5, dropout_seed=1)
            for name in ("auto", "torch")
        ]
        assert torch.equal(*outputs)

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"dropout": 1.0}, "dropout: must be a number of at least 0 and under 1, got 1.0"),
            ({"dropout": "much"}, "dropout: must be a number of at least 0 and under 1, got 'much'"),
            ({"dropout": 0.1}, "dropout_seed: dropout=0.1 needs an integer that says what is dropped, got None"),
            ({"dropout": 0.1, "dropout_seed": -1}, "dropout_seed: must be an integer of at least 0, got -1"),
        ],
    )
    def test_bad_numbers(self, fields, told):
        with pytest.raises(ArgumentError) as error:
            sparse_attention(*batch(), config=config(), **fields)
        assert str(error.value) == told


class TestStatistics:
    @pytest.mark.parametrize("implementation", ["torch", "numba", "reference"])
    @pytest.mark.parametrize("fields", [{}, {"dense_below": 33}, {"num_random_keys": 4, "min_weight": 0.05}])
    @pytest.mark.parametrize("num_rows", [1, 7, 500])
    def test_of_the_rows_that_were_read(self, implementation, fields, num_rows):
        tensors = batch(50, 90)
        own = config(implementation=implementation, **fields)
        others = {"softcap": 0.9, "sinks": sinks_of()}
        statistics = AttentionStatistics(num_rows=num_rows)
        found = sparse_attention(*tensors, config=own, recorder=statistics, **others)
        torch.testing.assert_close(found, sparse_attention(*tensors, config=own, **others), **EXACT)

        step = -(-50 // num_rows)
        rows, masks, mass = torch.arange(49, -1, -step), [], []
        for query, key, value in zip(*tensors, strict=True):
            recorder = KeyMask(4, 50, 90, query_offset=40)
            specified = config(implementation="reference", **fields)
            sparse_attention(query[None], key[None], value[None], config=specified, recorder=recorder, **others)
            scores = query @ key.repeat_interleave(2, 0).transpose(-1, -2) * 8**-0.5
            scores = (0.9 * (scores / 0.9).tanh()).masked_fill(~torch.ones(50, 90).tril(40).bool(), -torch.inf)
            masks.append(recorder.mask)
            mass.append((scores.softmax(-1) * recorder.mask).sum(-1)[:, rows])
        masks, mass = torch.stack(masks), torch.stack(mass)
        admissible = sum(range(41, 91)) * 4 * 2
        assert statistics.density == pytest.approx(float(masks.sum()) / admissible, abs=1e-6)
        torch.testing.assert_close(statistics.keys_per_row, masks.double().sum(-1).mean((0, 2)))
        torch.testing.assert_close(statistics.kept_mass, mass.mean((0, 2)))

    @pytest.mark.parametrize("num_queries", [1, 30, 70])
    def test_of_all_keys(self, num_queries):
        statistics = AttentionStatistics()
        sparse_attention(*batch(num_queries), config=config(), mode="all", recorder=statistics)
        assert statistics.density == 1
        torch.testing.assert_close(statistics.kept_mass, torch.ones(4, dtype=torch.float64))
        assert repr(statistics).startswith("AttentionStatistics(density=1.0000, keys_per_row=")

    def test_without_sampled_rows(self):
        statistics = AttentionStatistics(num_rows=0)
        sparse_attention(*batch(), config=config(), recorder=statistics)
        assert 0 < statistics.density < 1
        assert statistics.kept_mass.isnan().all()


class TestGraphs:
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("dense_below", [0, 100])
    def test_compiled(self, padded, dense_below):
        tensors = batch()
        keep = torch.tensor([[0] * 9 + [1] * 61, [1] * 70], dtype=torch.bool) if padded else None
        own = config(dense_below=dense_below)
        attend = lambda q, k, v: sparse_attention(q, k, v, config=own, key_padding_mask=keep)  # noqa: E731
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert_all_close(with_gradients(compiled, *tensors), with_gradients(attend, *tensors))

    @pytest.mark.parametrize(
        "fields",
        [
            {"dropout": 0.1, "dropout_seed": 1},
            {"recorder": AttentionStatistics()},
            {"mode": "local"},
            {"attention_mask": torch.ones(70, 70).tril().bool()},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_what_graphs_cannot_have(self, fields):
        compiled = torch.compile(lambda q, k, v: sparse_attention(q, k, v, config=config(), **fields), backend="eager")
        with pytest.raises(Exception, match=f"{next(iter(fields))}: torch.compile and torch.export "):
            compiled(*batch())
