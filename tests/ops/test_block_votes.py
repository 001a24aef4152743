"""Blocks that vote: the specification against a rule in Python, the fast path against both, and where it is refused."""

import pytest
import torch
from helpers.cases import LENGTH, inputs, pattern_of, sinks_of
from helpers.operation import SCALING, KeyMask, attend
from helpers.tensors import EXACT, batch, config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sparse_attn import AttentionStatistics, SparseAttention, SparseAttentionConfig, build_index, sparse_attention
from hf_sparse_attn.pattern_fields import check_causal

FIELDS = {"key_budget": 0, "block_size": 12, "num_voted_blocks": 2}
CASES = {
    "alone": {"window_size": 1, "num_global_tokens": 0},
    "beside a window and global keys": {},
    "whose first block is not whole": {"block_offset": 5},
    "beside neighbours": {"num_neighbouring_blocks": 1},
    "inside the model's window": {"sliding_window": 61},
    "with dense rows": {"dense_below": 40},
    "of some heads": {"by_kv_head": ({"num_voted_blocks": 0}, {"block_size": 9})},
    "with a smallest weight": {"min_weight": 0.02},
    "all of them": {"num_voted_blocks": 50},
    "beside keys of a row's own": {"num_random_keys": 5, "stride": 7},
    "of one key": {"block_size": 1, "num_voted_blocks": 4},
}


def read(implementation, tensors, pattern, **others):
    query, key, _ = tensors
    recorder = KeyMask(len(query), query.shape[1], key.shape[1], key.shape[1] - query.shape[1])
    with torch.no_grad():
        output = attend(*tensors, pattern, implementation, recorder=recorder, **others)
    return output, recorder.mask


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_like_the_specification(fields):
    tensors, pattern = inputs(), pattern_of(FIELDS | {"min_weight": 0.0} | fields)
    output, mask = read("torch", tensors, pattern)
    expected, expected_mask = read("reference", tensors, pattern)
    torch.testing.assert_close(output, expected, **EXACT)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_by_the_formula(implementation):
    """MInference's block-sparse heads: mean queries and keys, the best blocks, a causal mask inside the own one."""
    query, key, value = tensors = inputs()
    pattern = pattern_of(FIELDS | CASES["alone"] | {"min_weight": 0.0})
    expected = torch.zeros(4, LENGTH, LENGTH, dtype=torch.bool)
    for head in range(4):
        queries = query[2 * (head // 2) : 2 * (head // 2) + 2].sum(0).split(12)
        keys = key[head // 2].split(12)
        for row in range(LENGTH):
            own = row // 12
            scores = [float(queries[own].mean(0) @ keys[block].mean(0)) for block in range(own)]
            best = sorted(range(own), key=scores.__getitem__)[-2:]
            expected[head, row] = torch.tensor(
                [k <= row and (k // 12 == own or k // 12 in best) for k in range(LENGTH)]
            )
    output, mask = read(implementation, tensors, pattern)
    assert torch.equal(mask, expected)
    scores = query @ key.repeat_interleave(2, 0).transpose(-1, -2) * SCALING
    weights = scores.masked_fill(~expected, -torch.inf).softmax(-1)
    torch.testing.assert_close(output, weights @ value.repeat_interleave(2, 0), **EXACT)


def test_later_rows_decide_what_earlier_ones_read():
    """The leak, which is why it is refused in training."""
    query, key, value = inputs()
    pattern = pattern_of(FIELDS)
    before, _ = read("torch", (query, key, value), pattern)
    query = query.clone()
    query[:, 71] = 100 * query[:, 70]  # the last row of its block
    after, _ = read("torch", (query, key, value), pattern)
    assert not torch.allclose(after[:, 60:71], before[:, 60:71])
    torch.testing.assert_close(after[:, :60], before[:, :60], **EXACT)


def test_rows_after_a_prefix_read_everything():
    query, key, value = inputs()
    rows = (query[:, 100:], key, value)
    output, mask = read("torch", rows, pattern_of(FIELDS))
    assert torch.equal(mask, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[100:].expand(4, -1, -1))
    torch.testing.assert_close(output, read("reference", rows, pattern_of({"dense_below": 9999}))[0], **EXACT)


def test_padded_batches():
    query, key, value = batch(70, 70)
    own = config(**FIELDS, min_weight=0.0)
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[0, :9] = False
    with torch.no_grad():
        output = sparse_attention(query, key, value, config=own, key_padding_mask=keep)
        alone = sparse_attention(query[:1, :, 9:], key[:1, :, 9:], value[:1, :, 9:], config=own)
        torch.testing.assert_close(output[:1, :, 9:], alone, **EXACT)


def test_with_softcap_sinks_and_dropout():
    tensors = batch(70, 70)
    others = {"softcap": 0.9, "sinks": sinks_of(), "dropout": 0.3, "dropout_seed": 5}
    for fields in (FIELDS, {**FIELDS, "min_weight": 0.05}):
        with torch.no_grad():
            outputs = [
                sparse_attention(*tensors, config=config(**fields, implementation=name), **others)
                for name in ("torch", "reference")
            ]
        torch.testing.assert_close(*outputs, **EXACT)


def test_statistics():
    tensors, found = batch(70, 70), {}
    for name in ("torch", "reference"):
        found[name] = AttentionStatistics()
        with torch.no_grad():
            sparse_attention(*tensors, config=config(**FIELDS, implementation=name), recorder=found[name])
    assert found["torch"].density == found["reference"].density < 1
    torch.testing.assert_close(found["torch"].kept_mass, found["reference"].kept_mass, **EXACT)


def test_build_index_does_not_know_them():
    with pytest.raises(ValueError, match=r"^num_voted_blocks are not found through buckets; build_index does not know"):
        build_index(*batch()[:2], config=config(**FIELDS))


def test_generation_reads_a_cached_prefix_densely():
    module = SparseAttention(32, 4, 2, dtype=torch.float64, **FIELDS, window_size=5, dense_below=0)
    dense = SparseAttention(32, 4, 2, dtype=torch.float64, mode="all")
    dense.load_state_dict(module.state_dict())
    x = torch.randn(1, 70, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x[:, -1:], x), dense(x[:, -1:], x), **EXACT)
        assert not torch.allclose(module(x), dense(x))


@pytest.mark.parametrize("implementation", ["auto", "torch", "reference"])
def test_refused_where_gradients_are_recorded(implementation):
    """Whatever is trained: it may be what comes after the attention."""
    tensors, own = batch(70, 70), config(**FIELDS, implementation=implementation)
    for given in (tensors, [x.requires_grad_() for x in batch(70, 70)]):
        with pytest.raises(ValueError, match=r"^num_voted_blocks look at later tokens, so nothing can be trained"):
            sparse_attention(*given, config=own)


def test_a_layer_on_both_sides_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"^config: num_voted_blocks look at later tokens"):
        SparseAttention(32, 4, 2, is_causal=False, **FIELDS)


def test_memory_is_linear_in_the_number_of_blocks():
    """Blocks of one key: a table of all pairs of blocks would be one of all pairs of tokens."""
    tensors, pattern = inputs(600, 600), pattern_of(FIELDS | {"block_size": 1})
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            output = operation(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(output) if isinstance(x, torch.Tensor))])
            return output

    with torch.no_grad(), Largest():
        attend(*tensors, pattern, "torch")
    assert largest < 100 * 600


@pytest.mark.parametrize("implementation", ["auto", "torch", "reference"])
def test_refused_on_both_sides(implementation):
    with pytest.raises(ValueError, match=r"^num_voted_blocks know causal attention alone$"), torch.no_grad():
        sparse_attention(*batch(), config=config(**FIELDS, implementation=implementation), is_causal=False)


def test_refused_by_kernels_that_are_asked_for_by_name():
    with pytest.raises(ValueError, match=r'^implementation="numba" knows neither .* nor voted blocks'), torch.no_grad():
        sparse_attention(*batch(), config=config(**FIELDS, implementation="numba"))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_voted_blocks": 2, "key_budget": 0}, "num_voted_blocks does nothing without block_size"),
        ({"num_voted_blocks": 2, "block_size": 8}, "num_voted_blocks stand in place of keys found through buckets"),
        ({"num_voted_blocks": -1}, "num_voted_blocks must be an integer of at least 0"),
    ],
)
def test_impossible_fields(fields, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        SparseAttentionConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        FIELDS,
        {"key_budget": 0, "by_layer": [{}, {"block_size": 8, "num_voted_blocks": 1}]},
        {"key_budget": 0, "by_kv_head": [{}, {"block_size": 8, "num_voted_blocks": 1}]},
        {"key_budget": 0, "by_layer": [{"by_kv_head": [{}, {"block_size": 8, "num_voted_blocks": 1}]}]},
        {"preset": "minference-like"},
    ],
    ids=str,
)
def test_losses_are_refused(fields):
    with pytest.raises(ValueError, match=r"^num_voted_blocks look at later tokens, so a loss"):
        check_causal(SparseAttentionConfig.from_dict(fields))


def test_what_is_causal_is_not_refused():
    check_causal(SparseAttentionConfig(by_layer=[{"by_kv_head": [{}, {"block_size": 8}]}], num_random_keys=3))
