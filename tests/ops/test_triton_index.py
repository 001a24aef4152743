"""The Triton index of a cached document: compiled where there is a GPU, else in Triton's interpreter."""

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.cases import FEATURES, inputs, sinks_of
from helpers.families import tiny_model
from helpers.index_checks import (
    Implementation,
    check_any_steps,
    check_copies,
    check_same_rows_again,
    check_steps,
    check_taken_back,
    in_steps,
)
from helpers.operation import attend, make_pattern
from helpers.specification import TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_attn import SparseAttentionConfig, SparseCache, ops
from hf_sparse_attn.ops import dispatch, self_check
from hf_sparse_attn.ops.triton import launch as triton_launch

pytest.importorskip("triton")
from hf_sparse_attn.ops.triton import choose_buckets, find_cached
from hf_sparse_attn.ops.triton import chunks as triton_ops
from hf_sparse_attn.ops.triton import index as triton_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 40
TRITON = Implementation("triton", triton_index, LENGTH, DEVICE)
SIZES = (30, 1, 4, 1)  # up to 16 rows at a time are steps
OFFERED = [name for name, fields in FEATURES.items() if "sliding_window" not in fields]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs where a document of these tests would have one, and tiles of many rows."""
    tile_shape = triton_launch.tile_shape
    monkeypatch.setattr(self_check, "_applies_to", lambda device: False)  # these tests tell more
    monkeypatch.setattr(triton_ops, "_CHUNK_ROWS", 32)
    monkeypatch.setattr(choose_buckets, "_CHOOSING_ROWS", 8)
    monkeypatch.setattr(triton_launch, "tile_shape", lambda query, *others: tile_shape(query.half(), *others))
    monkeypatch.setattr(triton_launch, "block_keys", lambda keys, dim: 16)
    monkeypatch.setattr(find_cached, "_BLOCK_KEYS", 32)


def output_in_steps(fields, sizes=SIZES, **others):
    """Ours and the specification's."""
    pattern, tensors = TRITON.pattern(fields), TRITON.inputs()
    output = in_steps(TRITON, pattern, tensors, sizes, **others)
    return output, attend(*tensors, pattern, "reference", **others)


def assert_like_reference(fields, sizes=SIZES, **others):
    torch.testing.assert_close(*output_in_steps(fields, sizes, **others), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OFFERED)
def test_steps(name):
    assert_like_reference(FEATURES[name] | ({"dense_below": 32} if name == "dense rows" else {}))


def test_rows_whose_keys_are_recorded():
    check_steps("smallest weights by head", (37, 1), TRITON)


@pytest.mark.parametrize("sizes", [(16, 3), (7, 17, 16)], ids=str)
def test_many_rows_and_few(sizes):
    assert_like_reference({"page_size": 6}, sizes)


def test_rows_of_one_launch():
    """Of one page; 16 rows of 32 heads over 131072 keys at a time, unless a row reads them all."""
    index = TRITON.index(TRITON.pattern({"page_size": 64, "key_budget": 1024}))
    assert list(index._row_blocks(50, 40, 32, 131072)) == [(50, 64), (64, 80), (80, 90)]
    index = TRITON.index(TRITON.pattern({"page_size": 64, "key_budget": 10**6}))
    assert list(index._row_blocks(50, 3, 32, 131072)) == [(50, 51), (51, 52), (52, 53)]


def test_softcap_and_sinks():
    assert_like_reference(FEATURES["smallest weights by head"], softcap=0.7, sinks=sinks_of(device=DEVICE))


@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups(group):
    pattern = TRITON.pattern({}, num_heads=group, num_kv_heads=1)
    tensors = TRITON.inputs(num_heads=group, num_kv_heads=1)
    output = in_steps(TRITON, pattern, tensors, (37, 1))
    torch.testing.assert_close(output, attend(*tensors, pattern, "reference"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [5, 40])
def test_head_dims(dim):
    pattern, tensors = TRITON.pattern({}, dim=dim), TRITON.inputs(dim=dim)
    tensors[2] = torch.cat([tensors[2], tensors[2].flip(1)], -1)
    tensors = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    output = in_steps(TRITON, pattern, tensors, (37, 1))
    torch.testing.assert_close(output, attend(*tensors, pattern, "reference"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_lower_precision(dtype):
    """Steps round as one shot does: the same keys, within the precision of the dtype."""
    pattern, tensors = TRITON.pattern({}, dtype=torch.float32), [x.to(dtype) for x in TRITON.inputs()]
    output = in_steps(TRITON, pattern, tensors, (37, 1))
    assert output.dtype == dtype
    expected = attend(*(x.float() for x in tensors), pattern, "reference")
    torch.testing.assert_close(output.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 8, 128), (16, 1, 256), (9, 3, 64)], ids=str)
def test_steps_over_many_keys(shape, dtype, monkeypatch):
    """Against plain torch operations in float32; launches as they are outside of tests."""
    monkeypatch.undo()
    num_heads, num_kv_heads, dim = shape
    config = SparseAttentionConfig(dense_below=1024)
    pattern = make_pattern(config, num_heads, num_kv_heads, dim, dtype=torch.float32, device=DEVICE)
    tensors = [x.to(dtype) for x in inputs(9001, 9001, num_heads, num_kv_heads, dim=dim, device=DEVICE)]
    index, start, outputs = TRITON.index(pattern), 0, []
    for size in (8900, *[1] * 90, 11):
        outputs.append(TRITON.go_on(pattern, *tensors, index, start, start + size))
        start += size
    query, key, value = (x.float() for x in tensors)
    expected = attend(query[:, -101:], key, value, pattern, "torch")
    ours = torch.cat(outputs, 1)[:, -101:].float()
    off = (ours - expected).norm(dim=-1) > 0.05 * expected.norm(dim=-1)
    assert float(off.float().mean()) < 0.1


@pytest.mark.parametrize("name", ["defaults of this file", "page of 3", "stride"])
def test_taken_back(name):
    check_taken_back(26, 5, name, 7, TRITON)


def test_the_same_rows_again():
    check_same_rows_again(TRITON)


def test_a_copy_goes_its_own_way():
    check_copies(TRITON, 36)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=4),
    st.sampled_from(["defaults of this file", "page of 3", "window of 1", "budgets by head", "stride"]),
)
def test_any_steps(steps, name):
    check_any_steps(steps, name, TRITON)


def test_steps_do_not_look_at_all_keys(monkeypatch):
    """A step sorts nothing, and five launches do it all."""
    pattern, tensors = TRITON.pattern({}), TRITON.inputs()
    index = TRITON.index(pattern)
    TRITON.go_on(pattern, *tensors, index, 0, 36)
    TRITON.go_on(pattern, *tensors, index, 36, 37)
    launched = []
    monkeypatch.setattr(triton_launch, "launch", lambda kernel, *args, **kwargs: launched.append(kernel.fn.__name__))
    monkeypatch.setattr(torch, "sort", lambda *args, **kwargs: pytest.fail("sorted"))
    TRITON.go_on(pattern, *tensors, index, 37, 38)
    names = ["append_and_score", "choose_ranks", "list_found", "score_listed", "sum_listed"]
    assert launched == [f"{name}_kernel" for name in names]


@torch.no_grad()
@pytest.mark.skipif(DEVICE != "cpu", reason="the models of this check live on the CPU")
def test_through_transformers(monkeypatch):
    """A left-padded batch whose steps "auto" gives to Triton, interpreted; inside inference mode and outside."""
    model = tiny_model()
    rows = [tokens(length, seed=length)[0] for length in (28, 25)]
    ids, mask, position_ids = padded_batch(rows, "left", 0)
    expected = model(ids, attention_mask=mask, position_ids=position_ids).logits
    monkeypatch.setattr(dispatch, "_best", lambda device: "triton")
    cache, pieces, start = SparseCache(model.config), [], 0
    for size in (20, 1, 4, 1, 1, 1):
        part = slice(start, start + size)
        with torch.inference_mode(start < 24):
            inputs = {"attention_mask": mask[:, : part.stop], "position_ids": position_ids[:, part]}
            pieces.append(model(ids[:, part], **inputs, past_key_values=cache, use_cache=True).logits.clone())
        start = part.stop
    indexes = [index for layer in cache.layers for *_, index in layer.indexes._of_row.values()]
    assert len(indexes) == 4
    assert all(isinstance(index, triton_index.Index) for index in indexes)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()], **TOLERANCE)


def test_where_there_is_none():
    """Another implementation of the same config, or a window of the model's own."""
    _, key, _ = TRITON.inputs()
    fields = {"implementation": "triton"}
    assert isinstance(ops.new_index(TRITON.pattern(fields), key, 0), triton_index.Index)
    assert ops.new_index(TRITON.pattern(fields | {"sliding_window": 20}), key, 0) is None
    assert ops.new_index(TRITON.pattern(fields | {"dense_layers": (0,)}), key, 0) is None


def test_memory_is_counted():
    pattern, (_, key, _) = TRITON.pattern({}), TRITON.inputs()
    index = TRITON.index(pattern)
    before = index.nbytes
    index.append(key)
    assert index.nbytes - before >= 2 * 4 * len(key) * LENGTH  # a bucket and a rank for each key


# Kernels launched with something wrong: (kernel, argument, how it is changed).
MUTANTS = {
    "window": ("score_listed", "window", lambda window: window - 1),
    "static keys": ("score_listed", "num_static", lambda number: number - 1),
    "random keys": ("score_listed", "NUM_RANDOM", lambda number: number - 1),
    "softcap": ("score_listed", "SCORE", lambda score: score._replace(SOFTCAP=None)),
    "light keys": ("sum_listed", "DROP", lambda _: False),
    "sinks": ("sum_listed", "sinks", lambda _: None),
    "another page's sums": ("append_and_score", "PAGE_SIZE", lambda size: size - 1),
    "sums that stand still": ("append_and_score", "since_known", lambda _: 0),
    "other heads of the group": ("append_and_score", "GROUP", lambda _: 1),
    "unranked keys": ("append_and_score", "num_new", lambda _: 0),
    "keys inside the window": ("choose_ranks", "window", lambda window: window - 1),
    "keys counted twice": ("choose_ranks", "since_older", lambda rows: rows + 1),
    "unlisted keys": ("list_found", "newest", lambda newest: newest - 20),
}


def output_of_everything():
    fields = FEATURES["everything at once"] | {"stride": 7, "window_size": 5, "page_size": 6, "key_budget": ((6, 4),)}
    del fields["sliding_window"]
    return output_in_steps(fields, (27, 1), softcap=0.7, sinks=sinks_of(device=DEVICE))


def test_nothing_is_caught_where_nothing_is_broken():
    torch.testing.assert_close(*output_of_everything(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_mutants_are_caught(mutant, monkeypatch):
    name, argument, change = mutant
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what is not written is a key all the same
    launch = triton_launch.launch

    def launch_broken(kernel, grid, *args, **kwargs):
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        if kernel.fn.__name__ == f"{name}_kernel":
            values[argument] = change(values[argument])
        launch(kernel, grid, *(values.pop(parameter) for parameter in kernel.arg_names[:1]), **values)

    monkeypatch.setattr(triton_launch, "launch", launch_broken)
    output, expected = output_of_everything()
    assert not torch.allclose(output, expected, rtol=1e-8, atol=1e-8)
