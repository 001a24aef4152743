"""Every preset is its paper's mask, written out here from the formula: row by row and key by key, in plain Python."""

import json

import pytest
import torch
from helpers.families import tiny_model
from helpers.operation import SCALING, KeyMask, attend, make_pattern

from hf_sparse_attn import SparseAttentionConfig, configure
from hf_sparse_attn.integration import merge_sparse_attention
from hf_sparse_attn.ops import reference
from hf_sparse_attn.presets import PRESETS

HEADS, KV_HEADS, DIM = 4, 2, 2


def longformer(i, j, head, w=512, num_global=1):
    """w / 2 keys on each side of the row, of which a decoder sees one; and global tokens."""
    return j <= i and (i - w // 2 <= j <= i + w // 2 or j < num_global)


def drawn_blocks(block, r, seed=0):
    """MurmurHash3's finaliser, in Python's integers."""
    numbers = set()
    for draw in range(r if block else 0):
        x = (block * 0x9E3779B1 + draw * 0x85EBCA77 + seed * 0xC2B2AE3D) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        numbers.add((x ^ x >> 16) % block)
    return numbers


BLOCKS = {}


def bigbird(i, j, head, b=64, w=3, r=3, g=2):
    """By blocks of b: the first g, those less than w / 2 away from the row's, and r random ones."""
    row, key = i // b, j // b
    random = BLOCKS.setdefault((row, r), drawn_blocks(row, r))
    return j <= i and (key < g or abs(row - key) <= (w - 1) // 2 or key in random)


def sparse_transformer(i, j, head, stride=128, c=32):
    """A(1) = {j : floor(j / l) = floor(i / l)}, A(2) = {j : j mod l in {l - c, ..., l - 1}}, both up to i."""
    return j <= i and (j // stride == i // stride or j % stride in range(stride - c, stride))


def sparse_transformer_strided(i, j, head, stride=128):
    """A(1) = {max(0, i - l), ..., i}, A(2) = {j : (i - j) mod l = 0}."""
    return j <= i and (j >= max(0, i - stride) or (i - j) % stride == 0)


def streaming_llm(i, j, head, sinks=4, recent=1020):
    return j <= i and (j < sinks or i - j < recent)


def longlora(i, j, head, group=2048):
    """Groups; of the second half of the heads, all moved on by half a group, and nothing comes around the end."""
    shift = group // 2 if head >= HEADS // 2 else 0
    return j <= i and (i - shift) // group == (j - shift) // group


def test_minference_like_is_voted_blocks():
    """Whose rule test_block_votes.py writes out."""
    config = SparseAttentionConfig.preset("minference-like")
    only = {"block_size": 64, "num_voted_blocks": 100, "window_size": 1, "num_global_tokens": 0, "key_budget": 0}
    assert config == SparseAttentionConfig(**only, min_weight=0.0, dense_below=0)


FORMULAS = {
    "longformer": (longformer, {"w": 12}, {"window_size": 7}),
    "bigbird": (bigbird, {"b": 4, "r": 2}, {"block_size": 4, "num_random_blocks": 2, "num_global_tokens": 8}),
    "sparse-transformer": (
        sparse_transformer,
        {"stride": 9, "c": 2},
        {"block_size": 9, "stride": 9, "stride_offset": 7, "stride_width": 2},
    ),
    "sparse-transformer-strided": (sparse_transformer_strided, {"stride": 9}, {"window_size": 10, "dilation": 9}),
    "streaming-llm": (streaming_llm, {"recent": 13}, {"window_size": 13}),
    "longlora": (longlora, {"group": 10}, {"block_size": 10, "by_kv_head": [{}, {"block_offset": 5}]}),
}
LENGTHS = {"longformer": (1, 700), "bigbird": (63, 701), "streaming-llm": (1100,), "longlora": (1, 2200)}


def inputs(length):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(heads, length, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def read(config, length, implementation="torch"):
    """The keys that are really read, [HEADS, length, length]."""
    recorder = KeyMask(HEADS, length, length)
    pattern = make_pattern(config, HEADS, KV_HEADS, DIM, dtype=torch.float32)
    attend(*inputs(length), pattern, implementation, recorder=recorder)
    return recorder.mask


def by_formula(formula, length, numbers):
    heads = [
        torch.tensor([[formula(i, j, head, **numbers) for j in range(length)] for i in range(length)])
        for head in (0, HEADS - 1)
    ]
    return torch.stack([heads[0], heads[0], heads[1], heads[1]])


def test_every_preset_has_a_formula():
    assert set(PRESETS) == {*FORMULAS, "ssa", "minference-like"}


@pytest.mark.parametrize("implementation", ["torch", "numba"])
@pytest.mark.parametrize("length", [1, 2, 9, 64, 131])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula_with_small_numbers(name, length, implementation):
    formula, numbers, fields = FORMULAS[name]
    mask = read(SparseAttentionConfig.preset(name, **fields), length, implementation)
    assert torch.equal(mask, by_formula(formula, length, numbers))


@pytest.mark.parametrize(
    ("name", "length"), [(name, length) for name in FORMULAS for length in LENGTHS.get(name, (127, 577))]
)
def test_formula_with_the_papers_numbers(name, length):
    mask = read(SparseAttentionConfig.preset(name), length)
    if length < 2000:
        assert torch.equal(mask, by_formula(FORMULAS[name][0], length, {}))
        return
    for i in (0, 1, 1023, 1024, 2047, 2048, length - 1):  # rows on both sides of each group's edge
        for head in range(HEADS):
            assert mask[head, i].tolist() == [FORMULAS[name][0](i, j, head) for j in range(length)]


@pytest.mark.parametrize("name", FORMULAS)
def test_the_specification_agrees(name):
    formula, numbers, fields = FORMULAS[name]
    pattern = make_pattern(SparseAttentionConfig.preset(name, **fields), HEADS, KV_HEADS, DIM, dtype=torch.float32)
    query, key, _ = inputs(47)
    attended = reference.attended_keys(query, key, pattern, 0, scaling=SCALING)
    assert torch.equal(attended, by_formula(formula, 47, numbers))


def ssa(query, key, pattern, window=256, num_global=16, budget=1024):
    """A window, leading keys, and the buckets of best mean until `budget` older keys are scored, the light ones unread.

    Means are those of each page of 64 rows.
    """
    length, group, least = query.shape[1], HEADS // KV_HEADS, 2e-4
    mask = torch.zeros(HEADS, length, length, dtype=torch.bool)
    bucket = pattern.bucket_hash.assign(key).tolist()
    for head in range(HEADS):
        kv_head = head // group
        for i in range(length):
            scores = {}
            for b in set(bucket[kv_head][num_global : i // 64 * 64]):
                known = [j for j in range(num_global, i // 64 * 64) if bucket[kv_head][j] == b]
                together = query[kv_head * group : (kv_head + 1) * group, i].sum(0)
                scores[b] = float(together @ key[kv_head, known].mean(0))
            found = []
            for b in sorted(scores, key=scores.get, reverse=True):
                newest = [j for j in range(i - window, num_global - 1, -1) if bucket[kv_head][j] == b]
                found += newest[: budget - len(found)]
            fixed = [j for j in range(i + 1) if j < num_global or j > i - window]
            scored = [*fixed, *found]
            weights = (SCALING * query[head, i] @ key[kv_head, scored].T).softmax(-1).tolist()
            heavy = [j for j, weight in zip(scored, weights, strict=True) if weight >= least]
            mask[head, i, [*fixed, *(set(heavy) & set(found))]] = True
    return mask


@pytest.mark.parametrize("length", [33, 150])
def test_ssa_is_the_defaults_by_their_rules(length):
    assert SparseAttentionConfig.preset("ssa") == SparseAttentionConfig()
    config = SparseAttentionConfig.preset("ssa", window_size=20, key_budget=17, dense_below=0, num_hash_bits=2)
    pattern = make_pattern(config, HEADS, KV_HEADS, DIM)
    query, key, value = (x.double() for x in inputs(length))
    recorder = KeyMask(HEADS, length, length)
    attend(query, key, value, pattern, recorder=recorder)
    assert torch.equal(recorder.mask, ssa(query, key, pattern, window=20, budget=17))


def test_what_is_saved_is_the_fields():
    config = SparseAttentionConfig.preset("longlora", window_size=3)
    written = json.loads(json.dumps(config.to_dict()))
    assert "preset" not in written
    assert SparseAttentionConfig.from_dict(written) == config
    assert (config.block_size, config.window_size, config.key_budget, config.dense_below) == (2048, 3, 0, 0)


def test_a_preset_takes_the_place_of_a_models_own_pattern():
    """Whatever decides which keys are read; fields that are given beside it count."""
    own = {"stride": 7, "num_random_keys": 3, "by_layer": [{"stride": 2}], "dense_layers": [0], "seed": 5}
    model = tiny_model(**own)
    configured = configure(model, preset="streaming-llm", window_size=30)
    expected = SparseAttentionConfig.preset("streaming-llm", window_size=30, seed=5)
    assert configured == expected
    assert model.config.sparse_attention == expected.to_dict()
    assert merge_sparse_attention(tiny_model(**own).config, {"preset": "ssa"})["stride"] == 0


@pytest.mark.parametrize("layer", [0, 1])
def test_too_many_parts_of_any_layer_are_told_before_a_forward(layer):
    by_layer = [{"by_kv_head": [{}] * 3} if i == layer else {} for i in range(2)]
    with pytest.raises(ValueError, match="by_kv_head must list at most as many parts as the layer has KV heads, 2"):
        merge_sparse_attention(tiny_model().config, {"by_layer": by_layer})


@pytest.mark.parametrize("name", ["minference", "", None, 3, ["longformer"]])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"^preset must be one of longformer, bigbird, .*, ssa, got ") as error:
        SparseAttentionConfig.preset(name)
    assert "\n" not in str(error.value)


def test_an_unknown_field_beside_a_preset():
    with pytest.raises(ValueError, match="no field 'windows'"):
        SparseAttentionConfig.preset("longformer", windows=3)
