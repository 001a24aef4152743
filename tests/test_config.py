import dataclasses
import json

import pytest

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.config import MAX_HASH_BITS

NOT_DEFAULT = {
    "window_size": 7,
    "num_global_tokens": 3,
    "global_token_indices": (5, 90),
    "global_token_ids": (5, 3),
    "stride": 4,
    "stride_offset": 1,
    "stride_width": 2,
    "num_random_keys": 2,
    "dilated_window_size": 5,
    "dilation": 3,
    "slash_distances": (9, 20),
    "block_size": 8,
    "block_offset": 3,
    "num_neighbouring_blocks": 1,
    "num_random_blocks": 2,
    "num_voted_blocks": 1,
    "by_layer": ((("by_kv_head", ((("stride", 7),),)), ("window_size", 2)), ()),
    "by_kv_head": ((("slash_distances", (1, 2)),), (("block_offset", 0),)),
    "key_budget": ((0, 0), 0),
    "min_weight": ((0.25, 0.0), 0.5),
    "hash": "calibrated",
    "num_hash_bits": 5,
    "seed": 9,
    "page_size": 32,
    "dense_layers": (1,),
    "dense_below": 10,
    "implementation": "reference",
    "calibrated_hash": "text",
}


def test_the_round_trip_covers_every_field():
    defaults = SparseAttentionConfig()
    assert NOT_DEFAULT.keys() == {field.name for field in dataclasses.fields(defaults)}
    assert all(getattr(defaults, name) != value for name, value in NOT_DEFAULT.items())


def test_round_trip_through_json():
    config = SparseAttentionConfig(**NOT_DEFAULT)
    assert SparseAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("fields", [None, {}], ids=["absent", "empty"])
def test_defaults(fields):
    config = SparseAttentionConfig.from_dict(fields)
    assert config == SparseAttentionConfig()


def test_to_dict_writes_defaults_out():
    """Another release may have others; a checkpoint reads as it did."""
    written = SparseAttentionConfig(seed=3, dense_layers=(0,)).to_dict()
    assert (written["seed"], written["dense_layers"], written["dense_below"]) == (3, [0], 2048)
    assert set(written) == {field.name for field in dataclasses.fields(SparseAttentionConfig)} - {"calibrated_hash"}


def test_frozen_and_hashable():
    config = SparseAttentionConfig(key_budget=[[1, 2], [3, 4]], global_token_indices=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert hash(config) == hash(SparseAttentionConfig(key_budget=((1, 2), (3, 4)), global_token_indices=(1,)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_size", 0),
        ("window_size", -3),
        ("window_size", 2.0),
        ("window_size", True),
        ("window_size", "64"),
        ("window_size", None),
        ("num_global_tokens", -1),
        ("stride", -1),
        ("stride_width", 0),
        ("num_random_keys", -1),
        ("dilated_window_size", 4097),
        ("dilation", 0),
        ("slash_distances", [-1]),
        ("slash_distances", 3),
        ("block_size", -1),
        ("stride_offset", 1),
        ("stride_width", 2),
        ("dilation", 2),
        ("block_offset", 1),
        ("num_neighbouring_blocks", 1),
        ("num_random_blocks", 1),
        ("num_voted_blocks", 1),
        ("by_layer", {"0": {}}),
        ("by_layer", [3]),
        ("by_layer", [[("stride", 3)]]),
        ("by_layer", [{"key_budget": 3}]),
        ("by_layer", [{"by_layer": []}]),
        ("by_layer", [{"stride": -1}]),
        ("by_layer", [{}, {"by_kv_head": [{"seed": 1}]}]),
        ("by_kv_head", [{"by_kv_head": []}]),
        ("by_kv_head", [{"block_offset": 4}]),
        ("num_hash_bits", 0),
        ("num_hash_bits", MAX_HASH_BITS + 1),
        ("seed", 2**32),
        ("seed", -1),
        ("page_size", 0),
        ("dense_below", -1),
        ("global_token_indices", 4),
        ("global_token_indices", [-1]),
        ("global_token_indices", ["a"]),
        ("dense_layers", "0"),
        ("dense_layers", [0.5]),
        ("min_weight", -1e-9),
        ("min_weight", 1),
        ("min_weight", None),
        ("min_weight", [0.1, "x"]),
        ("min_weight", float("nan")),
        ("key_budget", -1),
        ("key_budget", None),
        ("key_budget", [4, -1]),
        ("key_budget", [[4], [True]]),
        ("key_budget", [[[4]]]),
        ("hash", "simhash"),
        ("implementation", "cuda"),
        ("calibrated_hash", b"bytes"),
    ],
    ids=lambda value: repr(value),
)
def test_impossible_value(name, value):
    with pytest.raises(ValueError, match=rf"^{name}[ ,].*got ") as error:
        SparseAttentionConfig.from_dict({name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 8, "stride_offset": 6, "stride_width": 3}, "stride_offset .* at most stride=8, got 6 . 3"),
        ({"block_size": 8, "block_offset": 8}, "block_offset must be under block_size=8, got 8"),
        ({"block_size": 4096, "num_neighbouring_blocks": 3, "num_random_keys": 1}, "at most 16384, got 16385"),
        ({"block_size": 4096, "num_random_blocks": 3, "slash_distances": [7]}, "at most 16384, got 16385"),
        ({"block_size": 8, "by_layer": [{}, {"block_offset": 9}]}, "by_layer, entry 1: block_offset must be under"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_that_do_not_fit_together(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        SparseAttentionConfig(**fields)
    assert "\n" not in str(error.value)


def test_what_fits_exactly():
    SparseAttentionConfig(stride=8, stride_offset=6, stride_width=2, block_size=4096, num_random_blocks=3)
    SparseAttentionConfig(block_size=8, block_offset=7)


def test_value_at_its_limit():
    SparseAttentionConfig(window_size=1, num_global_tokens=0, key_budget=0, num_hash_bits=MAX_HASH_BITS, page_size=1)


def test_calibrated_hash_missing():
    with pytest.raises(ValueError, match=r"calibrated_hash is missing.*convert\.py"):
        SparseAttentionConfig(hash="calibrated")


def test_unknown_field_with_a_hint():
    with pytest.raises(ValueError, match=r"no field 'window_sizes'.*did you mean window_size\?"):
        SparseAttentionConfig.from_dict({"window_sizes": 3})


def test_unknown_field_without_a_hint_lists_what_is_allowed():
    with pytest.raises(ValueError, match=r"no field 'xyz'.*key_budget") as error:
        SparseAttentionConfig.from_dict({"xyz": 3})
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "fields", [[("seed", 1)], "window_size=3", SparseAttentionConfig()], ids=["list", "str", "config"]
)
def test_not_a_dict(fields):
    with pytest.raises(ValueError, match="must be a dict"):
        SparseAttentionConfig.from_dict(fields)


def test_replace_validates():
    config = SparseAttentionConfig(seed=3)
    assert config.replace(window_size=9) == SparseAttentionConfig(seed=3, window_size=9)
    with pytest.raises(ValueError, match=r"^window_size"):
        config.replace(window_size=0)


def test_patterns_by_layer_repeat():
    config = SparseAttentionConfig(window_size=9, by_layer=[{}, {"window_size": 3}, {"stride": 5}])
    assert [config.of_layer(i).window_size for i in range(6)] == [9, 3, 9, 9, 3, 9]
    assert config.of_layer(5) == SparseAttentionConfig(window_size=9, stride=5)
    assert SparseAttentionConfig().of_layer(3) == SparseAttentionConfig()


def test_patterns_by_head_are_dealt_evenly():
    config = SparseAttentionConfig(block_size=8, by_kv_head=[{}, {"block_offset": 4}])
    entries = [config.kv_head_entries(num_kv_heads) for num_kv_heads in (2, 3, 8)]
    assert entries == [[0, 1], [0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert config.of_entry(1) == SparseAttentionConfig(block_size=8, block_offset=4)
    assert SparseAttentionConfig().kv_head_entries(4) == []
    with pytest.raises(ValueError, match="as many parts as the layer has KV heads, 1, got 2"):
        config.kv_head_entries(1)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(5, [5, 5, 5]), ([1, 7], [7, 7, 7]), ([[9, 9, 9], [1, 2, 3]], [1, 2, 3]), ([[9], 4], [4, 4, 4])],
    ids=["one number", "by layer", "by head", "mixed"],
)
def test_values_by_head(budget, expected):
    assert SparseAttentionConfig(key_budget=budget).key_budgets(1, 3) == expected


@pytest.mark.parametrize(
    ("budget", "message"),
    [([1], "key_budget lists 1 layers"), ([[1, 2, 3], [1, 2]], "key_budget lists 2 KV heads in layer 1")],
    ids=["too few layers", "too few heads"],
)
def test_values_of_another_model(budget, message):
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig(key_budget=budget).key_budgets(1, 3)


def test_smallest_weights_by_head():
    config = SparseAttentionConfig(min_weight=[0.5, [0.0, 1e-4]])
    assert config.min_weights(0, 2) == [0.5, 0.5]
    assert config.min_weights(1, 2) == [0.0, 1e-4]
    with pytest.raises(ValueError, match="min_weight lists 2 heads in layer 1, but the model has 3"):
        config.min_weights(1, 3)
