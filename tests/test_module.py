"""`SparseAttention`, a layer of any PyTorch model."""

import copy

import pytest
import torch
from helpers.tensors import EXACT, FIELDS, assert_all_close
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_sparse_attn import AttentionStatistics, SparseAttention, SparseAttentionConfig, sparse_attention
from hf_sparse_attn.errors import ArgumentError

WIDTH = 32


def layer(num_heads=4, num_key_value_heads=2, dtype=torch.float64, seed=0, **others):
    torch.manual_seed(seed)
    return SparseAttention(WIDTH, num_heads, num_key_value_heads, dtype=dtype, **{**FIELDS, **others})


def tokens(length=70, batch_size=2, seed=1, dtype=torch.float64):
    return torch.randn(batch_size, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients_of(module, x, **others):
    """The output and the gradients of the input and of every weight."""
    x = x.clone().requires_grad_()
    output = module(x, **others)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), [x, *module.parameters()])]


class TestAnswers:
    @pytest.mark.parametrize("implementation", ["torch", "auto"])
    @pytest.mark.parametrize("length", [1, 2, 63, 101])
    @pytest.mark.parametrize(
        ("num_heads", "num_key_value_heads"), [(4, None), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"]
    )
    def test_like_the_specification(self, implementation, length, num_heads, num_key_value_heads):
        shape = {"num_heads": num_heads, "num_key_value_heads": num_key_value_heads, "bias": True}
        found, expected = (layer(**shape, implementation=name) for name in (implementation, "reference"))
        assert_all_close(gradients_of(found, tokens(length)), gradients_of(expected, tokens(length)))

    @pytest.mark.parametrize("bias", [False, True])
    def test_all_keys_are_pytorchs_multi_head_attention(self, bias):
        ours = layer(4, 4, mode="all", bias=bias)
        theirs = nn.MultiheadAttention(WIDTH, 4, bias=bias, batch_first=True, dtype=torch.float64)
        parts = [ours.q_proj, ours.k_proj, ours.v_proj]
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            theirs.out_proj.weight.copy_(ours.o_proj.weight)
            if bias:
                theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                theirs.out_proj.bias.copy_(ours.o_proj.bias)
        x = tokens()
        padding = torch.zeros(2, 70, dtype=torch.bool)  # True: padding
        padding[0, 61:] = True
        later = torch.ones(70, 70, dtype=torch.bool).triu(1)
        expected, _ = theirs(x, x, x, key_padding_mask=padding, attn_mask=later, need_weights=False)
        found = ours(x, key_padding_mask=~padding)
        torch.testing.assert_close(found[~padding], expected[~padding], **EXACT)

    @pytest.mark.parametrize("implementation", ["torch", "auto"])
    @pytest.mark.parametrize("mode", ["routed", "local", "strided", "all"])
    def test_the_last_token_moves_nothing_before_it(self, implementation, mode):
        module, x = layer(implementation=implementation, mode=mode), tokens(101)
        before = module(x)
        x[:, -1] = 5 * tokens(1, seed=3)[:, 0]
        after = module(x)
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.allclose(before[:, -1], after[:, -1])

    def test_global_tokens_are_read_by_all(self):
        module, x = layer(mode="local"), tokens(70)
        before = module(x)
        for token, is_read in ((2, True), (3, False)):
            changed = x.clone()
            changed[:, token] += 1
            assert (not torch.equal(module(changed)[:, 69], before[:, 69])) == is_read

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side):
        module, rows = layer(), [tokens(length, 1, seed=length)[0] for length in (40, 63)]
        x, keep = torch.full((2, 70, WIDTH), 9.0, dtype=torch.float64), torch.zeros(2, 70, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(70 - len(row), 70)
            x[i, place], keep[i, place] = row, True
        found = module(x, key_padding_mask=keep)
        for i, row in enumerate(rows):
            torch.testing.assert_close(found[i, keep[i]], module(row[None])[0], **EXACT)
        assert (found[~keep] == 0).all()

    @pytest.mark.parametrize("num_queries", [1, 7])
    def test_queries_go_on_with_a_document(self, num_queries):
        module, x = layer(), tokens(70)
        torch.testing.assert_close(module(x[:, -num_queries:], x), module(x)[:, -num_queries:], **EXACT)

    def test_layers_hash_differently(self):
        first, second = layer(layer_idx=0), layer(layer_idx=1)
        assert not torch.allclose(first(tokens()), second(tokens()))

    def test_single_fields_replace_those_of_the_config(self):
        config = SparseAttentionConfig(window_size=7, key_budget=5)
        module = SparseAttention(WIDTH, 4, config=config, key_budget=9)
        assert module.config == config.replace(key_budget=9)
        assert SparseAttention(WIDTH, 4).config == SparseAttentionConfig()


class TestDropout:
    def test_while_training_alone(self):
        module, x = layer(dropout=0.5), tokens()
        assert not torch.allclose(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))
        assert torch.equal(module(x), layer()(x))

    def test_by_a_seed(self):
        module, x = layer(dropout=0.5), tokens()
        assert torch.equal(module(x, dropout_seed=3), module(x, dropout_seed=3))
        assert not torch.allclose(module(x, dropout_seed=3), module(x, dropout_seed=4))

    @pytest.mark.parametrize("seed", [None, 3])
    def test_a_recompute_drops_the_same(self, seed):
        module, results = layer(dropout=0.5), []
        for recomputed in (False, True):
            torch.manual_seed(5)
            x = tokens().requires_grad_()
            given = {"use_reentrant": False, "preserve_rng_state": seed is None, "dropout_seed": seed}
            output = checkpoint(module, x, **given) if recomputed else module(x, dropout_seed=seed)
            torch.rand(3)
            results.append(torch.autograd.grad(output.square().sum(), [x, *module.parameters()]))
        assert_all_close(*results)


class TestChosenKeys:
    def test_layers_share_them(self):
        """The second layer reads what the first chose, scored with its own queries."""
        first, second, x = layer(), layer(seed=4, layer_idx=1), tokens()
        output, index = first(x, return_index=True)
        torch.testing.assert_close(output, first(x), **EXACT)
        shared = gradients_of(second, output, index=index)
        twin = layer(seed=4, layer_idx=1, implementation="reference")
        assert_all_close(shared, gradients_of(twin, output, index=index))
        assert not torch.allclose(shared[0], second(output))
        again, same = second(output, index=index, return_index=True)
        assert same is index
        torch.testing.assert_close(again, shared[0], **EXACT)

    def test_with_the_masks_that_they_were_chosen_with(self):
        module, x, keep = layer(), tokens(), torch.ones(2, 70, dtype=torch.bool)
        keep[1, :20] = False
        expected, index = module(x, key_padding_mask=keep, return_index=True)
        torch.testing.assert_close(module(x, index=index), expected, **EXACT)
        with pytest.raises(ArgumentError, match=r"^index: has the masks that it was built with; give none beside it$"):
            module(x, key_padding_mask=keep, index=index)

    def test_statistics_come_before(self):
        output, statistics, index = layer()(tokens(), need_statistics=True, return_index=True)
        assert isinstance(statistics, AttentionStatistics)
        assert 0 < statistics.density < 1
        assert statistics.keys_per_row.shape == statistics.kept_mass.shape == (4,)
        assert index.shape == (2, 2, 70, 70)
        torch.testing.assert_close(output, layer()(tokens()), **EXACT)


class TestPrecision:
    @pytest.mark.parametrize("implementation", ["torch", "auto"])
    def test_bfloat16(self, implementation):
        exact = layer(min_weight=0.0, key_budget=100)
        module = copy.deepcopy(exact).bfloat16()
        module.config = module.config.replace(implementation=implementation)
        output = module(tokens().bfloat16())
        assert output.dtype == torch.bfloat16
        assert (output.double() - exact(tokens())).norm() < 0.02 * exact(tokens()).norm()
        output.sum().backward()
        assert all(weight.grad.isfinite().all() for weight in module.parameters())

    def test_autocast(self):
        module, x = layer(dtype=torch.float32, min_weight=0.0, key_budget=100), tokens().float()
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        assert output.dtype == torch.bfloat16
        assert 0 < (output.float() - expected).norm() < 0.02 * expected.norm()
        output.float().square().sum().backward()
        assert module.q_proj.weight.grad.isfinite().all()


class TestLife:
    def test_weights_go_from_one_to_another(self, tmp_path):
        module, other = layer(bias=True), layer(seed=3, bias=True)
        assert sorted(module.state_dict()) == sorted(
            f"{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")
        )
        torch.save(module.state_dict(), tmp_path / "weights.pt")
        other.load_state_dict(torch.load(tmp_path / "weights.pt"))
        assert torch.equal(module(tokens()), other(tokens()))

    def test_it_is_copied_and_stored_whole(self, tmp_path):
        module = layer()
        module(tokens())
        torch.save(module, tmp_path / "module.pt")
        stored = torch.load(tmp_path / "module.pt", weights_only=False)
        for other in (copy.deepcopy(module), stored):
            assert torch.equal(module(tokens()), other(tokens()))

    def test_after_inference_mode(self):
        """What a call keeps for the next one carries gradients there."""
        module = layer(implementation="reference", num_hash_bits=4)
        with torch.inference_mode():
            module(tokens())
        gradients_of(module, tokens())

    def test_two_layers_in_one_graph(self):
        model = nn.Sequential(layer(), layer(layer_idx=1, window_size=9, mode="local"))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_all_close(gradients_of(compiled, tokens()), gradients_of(model, tokens()))

    def test_it_tells_its_shape(self):
        assert repr(layer(dropout=0.1)).startswith("SparseAttention(\n  num_heads=4, is_causal=True, dropout=0.1\n")

    def test_it_is_the_operation(self):
        module, x = layer(), tokens()
        heads = [
            proj(x).unflatten(-1, (-1, 8)).transpose(1, 2) for proj in (module.q_proj, module.k_proj, module.v_proj)
        ]
        output = sparse_attention(*heads, config=module.config)
        torch.testing.assert_close(module.o_proj(output.transpose(1, 2).flatten(2)), module(x), **EXACT)


def test_presets_and_fields():
    """A preset replaces what `config` says of the keys that are read, and fields beside it count."""
    given = SparseAttention(
        32, 4, config=SparseAttentionConfig(stride=7, seed=5), preset="streaming-llm", window_size=9
    )
    assert given.config == SparseAttentionConfig.preset("streaming-llm", window_size=9, seed=5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hidden_size": 0}, "hidden_size: must be an integer of at least 1, got 0"),
        ({"num_heads": 2.5}, "num_heads: must be an integer of at least 1, got 2.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must divide the 4 query heads, got 3"),
        ({"num_heads": 5}, "num_heads: must divide hidden_size, or give head_dim; got 5 and 32"),
        ({"head_dim": -1}, "head_dim: must be an integer of at least 1, got -1"),
        ({"layer_idx": -1}, "layer_idx: must be an integer of at least 0, got -1"),
        ({"dropout": 1}, "dropout: must be a number of at least 0 and under 1, got 1"),
        ({"config": {}}, "config: must be a SparseAttentionConfig or None, got dict"),
        ({"mode": "dense"}, "mode: must be one of routed, all, local, strided, got 'dense'"),
        ({"window_size": 0}, "config: window_size must be an integer of at least 1, got 0"),
        ({"preset": "bert"}, "config: preset must be one of longformer, bigbird, "),
        ({"windw_size": 3}, "config: sparse_attention has no field 'windw_size'; did you mean window_size?"),
        ({"key_budget": ((1, 2, 3),)}, "config: key_budget lists 3 KV heads in layer 0, but the model has 4"),
        ({"by_kv_head": [{}] * 5}, "config: by_kv_head must list at most as many parts as the layer has KV heads, 4"),
        ({"global_token_ids": [3]}, "config: global_token_ids needs a model; name positions by"),
        ({"min_weight": (0.0,), "layer_idx": 1}, "config: min_weight lists 1 layers, but the model has a layer 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(given, told):
    with pytest.raises(ArgumentError) as error:
        SparseAttention(**{"hidden_size": 32, "num_heads": 4, **given})
    assert str(error.value).startswith(told)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"x": tokens()[0]}, "x: must be [batch, tokens, 32], got shape (70, 32)"),
        ({"context": tokens()[..., :5]}, "context: must be [batch, tokens, 32], got shape (2, 70, 5)"),
        ({"context": tokens(69)}, "query must have key's batch, a multiple of its heads and at most its tokens"),
        ({"key_padding_mask": torch.ones(2, 70)}, "key_padding_mask: must be bool, True for tokens"),
        ({"dropout_seed": 1.5}, "dropout_seed: must be an integer of at least 0, got 1.5"),
        ({"index": 3}, "index: must be what build_index returned, got int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input(given, told):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        layer(dropout=0.5)(**{"x": tokens(), **given})
    assert str(error.value).startswith(told)
