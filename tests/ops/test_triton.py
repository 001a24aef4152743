"""The Triton kernels against the specification: compiled where there is a GPU, else in Triton's interpreter."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import checks
from helpers.cases import (
    FEATURES,
    assert_like_reference,
    check_lower_precision,
    output_and_gradients,
    pattern_of,
    sinks_of,
)
from helpers.cases import inputs as make_inputs
from helpers.operation import SCALING, KeyMask, attend, make_pattern

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.ops import api, dispatch, reference
from hf_sparse_attn.ops.triton import launch as triton_launch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE_SHAPE = triton_launch.tile_shape
LENGTH = 45  # tokens: the interpreter takes a tenth of a second for a tile of rows

like_reference = functools.partial(assert_like_reference, implementations=("triton",))
inputs = functools.partial(make_inputs, device=DEVICE)


def patterns(fields, *args, **kwargs):
    return pattern_of({"page_size": 16} | fields, *args, device=DEVICE, **kwargs)


sinks = functools.partial(sinks_of, device=DEVICE)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The host side, with chunks so short that most documents have several, and float64's tiles of several rows."""
    from hf_sparse_attn.ops import self_check
    from hf_sparse_attn.ops.triton import choose_buckets
    from hf_sparse_attn.ops.triton import chunks as triton

    monkeypatch.setattr(self_check, "_applies_to", lambda device: False)  # these tests tell more
    monkeypatch.setattr(triton, "_CHUNK_ROWS", 32)
    monkeypatch.setattr(triton, "BACKWARD_CHUNK_ROWS", 32)
    monkeypatch.setattr(choose_buckets, "_CHOOSING_ROWS", 8)
    with monkeypatch.context() as context:
        context.setattr(triton_launch, "tile_shape", half_precision_tiles)
        yield triton


def half_precision_tiles(query, *others):
    """What `tile_shape` says of queries in half precision, whatever they are in."""
    return TILE_SHAPE(query.half(), *others)


def assert_same_keys(query, key, pattern, softcap=None, sinks=None):
    offset = key.shape[1] - query.shape[1]
    recorder = KeyMask(query.shape[0], query.shape[1], key.shape[1], offset)
    attend(query, key, key, pattern, "triton", recorder=recorder, softcap=softcap, sinks=sinks)
    expected = reference.attended_keys(query, key, pattern, offset, scaling=SCALING, softcap=softcap, sinks=sinks)
    assert torch.equal(recorder.mask, expected.cpu())


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
def test_every_feature(fields):
    pattern = patterns(fields)
    length = LENGTH if pattern.config.page_size > 3 else 21
    query, key, value = inputs(length, length)
    like_reference(query, key, value, pattern)
    assert_same_keys(query, key, pattern)


@pytest.mark.parametrize("name", ["smallest weights by head", "dense rows"])
def test_softcap_and_sinks(name):
    pattern = patterns(FEATURES[name])
    query, key, value = inputs(LENGTH, LENGTH)
    like_reference(query, key, value, pattern, softcap=0.7, sinks=sinks())
    assert_same_keys(query, key, pattern, softcap=0.7, sinks=sinks())


@pytest.mark.parametrize("num_queries", [1, 30], ids=lambda n: f"{n} queries")
def test_cached_keys(num_queries):
    """Q < N: the rows of the whole document's last queries."""
    query, key, value = inputs(LENGTH, LENGTH)
    pattern = patterns(FEATURES["everything at once"] | {"page_size": 16})
    output = like_reference(query[:, -num_queries:], key, value, pattern)
    whole = attend(query, key, value, pattern, "triton")
    torch.testing.assert_close(output, whole[:, -num_queries:], rtol=1e-10, atol=1e-10)


def test_dropped_keys():
    """A sliding cache keeps only the keys that the rows can see; positions still count from the document's start."""
    pattern, dropped = patterns({"sliding_window": 25, "num_random_keys": 3}), 10
    query, key, value = inputs(LENGTH, LENGTH)
    first_row = dropped + pattern.sliding_window - 1
    like_reference(query[:, first_row:], key[:, dropped:], value[:, dropped:], pattern, key_offset=dropped)


@pytest.mark.parametrize("group", [1, 3, 5, 16], ids=lambda group: f"group of {group}")
@pytest.mark.parametrize("length", [1, 35], ids=lambda length: f"{length} tokens")
def test_groups_and_lengths(group, length):
    pattern = patterns({"key_budget": 7, "page_size": 33}, num_heads=group, num_kv_heads=1)
    query, key, value = inputs(length, length, group, 1)
    like_reference(query, key, value, pattern)
    assert_same_keys(query, key, pattern)


@pytest.mark.parametrize("dim", [5, 40])
def test_head_dims(dim):
    like_reference(*inputs(40, 40, dim=dim), patterns({}, dim=dim))


def test_values_of_another_width_and_strided_inputs():
    query, key, value = inputs(40, 40)
    value = torch.cat([value, value.flip(1)], -1)
    query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    value = value.transpose(0, 1).contiguous().transpose(0, 1)
    like_reference(query, key, value, patterns({}))


def test_queries_of_zeros():
    """All buckets score alike; the highest numbers win."""
    query, key, value = inputs(LENGTH, LENGTH)
    query[:, ::2] = 0
    query[:, ::4] *= -1
    pattern = patterns({"key_budget": 9})
    like_reference(query, key, value, pattern)
    assert_same_keys(query, key, pattern)


@pytest.mark.parametrize("name", ["defaults of this file", "everything at once"])
def test_later_tokens_leave_earlier_rows_alone_to_the_last_bit(name, monkeypatch):
    monkeypatch.setattr(triton_launch, "tile_shape", TILE_SHAPE)
    pattern = patterns(FEATURES[name] | {"page_size": 16})
    query, key, value = inputs(LENGTH, LENGTH)
    before = attend(query, key, value, pattern, "triton")
    torch.testing.assert_close(before, attend(query, key, value, pattern, "reference"), rtol=1e-10, atol=1e-10)
    others = inputs(LENGTH, LENGTH, seed=1)
    for cut in (28, 41):
        changed = [
            torch.cat([x[:, :cut], 30 * y[:, cut:]], 1) for x, y in zip((query, key, value), others, strict=True)
        ]
        after = attend(*changed, pattern, "triton")
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.isclose(after[:, cut:], before[:, cut:]).all(-1).any()


def test_tiles_of_64_rows(kernels, monkeypatch):
    """Each row has a bit of its own; the backward takes tiles of 32."""
    monkeypatch.setattr(kernels, "_CHUNK_ROWS", 64)
    query, key, value = inputs(64, 64, 1, 1)
    pattern = patterns({"page_size": 64, "key_budget": 5, "num_random_keys": 1}, num_heads=1, num_kv_heads=1)
    shapes, fwd = [], kernels.fwd

    def note(output, query, key, value, sinks, lists, *others, **kwargs):
        shapes.append((lists.keys.shape[1], lists.rows.dtype))
        return fwd(output, query, key, value, sinks, lists, *others, **kwargs)

    monkeypatch.setattr(kernels, "fwd", note)
    like_reference(query, key, value, pattern)
    assert_same_keys(query, key, pattern)
    assert set(shapes) == {(1, torch.int64)}


def test_gradients_of_tiles_of_one_row(monkeypatch):
    monkeypatch.setattr(triton_launch, "tile_shape", TILE_SHAPE)
    like_reference(*inputs(20, 20), patterns({}))


@pytest.mark.parametrize("num_hash_bits", [3, 8], ids=["buckets are kept", "too many buckets"])
def test_the_backward_takes_the_buckets_of_the_forward(num_hash_bits, kernels, monkeypatch):
    """It chooses anew only where these took more than half the room of the queries: 32 bytes beside 48."""
    chosen, choose = [], kernels.choose_buckets
    monkeypatch.setattr(kernels, "BACKWARD_CHUNK_ROWS", 16)  # other chunks than in the forward

    def choose_buckets(scores, keys, span):
        chosen.append(keys.call.backward)
        return choose(scores, keys, span)

    monkeypatch.setattr(kernels, "choose_buckets", choose_buckets)
    fields = {"num_hash_bits": num_hash_bits, "dense_below": 5}
    like_reference(*inputs(LENGTH, LENGTH, dim=3), patterns(fields, dim=3))
    assert set(chosen) == ({False} if num_hash_bits == 3 else {False, True})


def test_programs_take_one_kv_head_after_the_other(monkeypatch):
    """The last dimension of each grid, the slowest, is that of the KV heads."""
    grids, launch = {}, triton_launch.launch

    def note(kernel, grid, *args, **kwargs):
        grids[kernel.fn.__name__] = grid
        launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(triton_launch, "launch", note)
    output_and_gradients("triton", *inputs(33, 33, num_heads=6, num_kv_heads=3), patterns({}, 6, 3))
    assert len(grids) == 12
    assert {name: grid[-1] for name, grid in grids.items()} == dict.fromkeys(grids, 3)


def test_the_same_gradients_every_time():
    runs = [output_and_gradients("triton", *inputs(LENGTH, LENGTH), patterns({})) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["defaults of this file", "random keys"])
def test_error_of_lower_precision_is_at_most_twice_that_of_sdpa(name, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 numbers")
    check_lower_precision("triton", name, dtype, LENGTH, DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_over_many_tokens(dtype, kernels, monkeypatch):
    """Tiles, chunks and blocks as they are outside of tests."""
    monkeypatch.undo()
    check_lower_precision("triton", "defaults of this file", dtype, 3000, DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("shape", [(32, 8, 128), (16, 1, 256), (9, 3, 64), (8, 8, 80), (32, 8, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_attention_and_its_gradients(shape, dtype, kernels, monkeypatch):
    """Against plain torch operations in float32, but for rows to which rounding gives another bucket."""
    monkeypatch.undo()
    num_heads, num_kv_heads, dim = shape
    config = SparseAttentionConfig(dense_below=1024)
    pattern = make_pattern(config, num_heads, num_kv_heads, dim, dtype=torch.float32, device=DEVICE)
    tensors = [x.to(dtype) for x in inputs(9001, 9001, num_heads, num_kv_heads, dim=dim)]
    ours = output_and_gradients("triton", *tensors, pattern)
    expected = output_and_gradients("torch", *(x.float() for x in tensors), pattern)
    for x, y in zip(ours, expected, strict=True):
        off = (x.float() - y).norm(dim=-1) > 0.05 * y.norm(dim=-1)
        assert float(off.float().mean()) < 0.1


def test_dense_rows_in_lower_precision_with_softcap_and_sinks():
    """They are computed in float32 and rounded once."""
    pattern = patterns({"dense_layers": (0,)}, dtype=torch.float32)
    exact = attend(*inputs(40, 40), pattern, "triton", softcap=0.7, sinks=sinks())
    halves = [x.bfloat16() for x in inputs(40, 40)]
    again = attend(*(x.double() for x in halves), pattern, "triton", softcap=0.7, sinks=sinks())
    rounded = attend(*halves, pattern, "triton", softcap=0.7, sinks=sinks())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), again, rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(rounded.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.skipif(DEVICE != "cpu", reason="the model of this check lives on the CPU")
def test_through_transformers(monkeypatch):
    """Gradients of all weights, where a model's attention calls the Triton implementation, interpreted."""
    choose, used = api.find_backend, []

    def choose_triton(name, *others):
        used.append(name)
        return choose("triton" if name == "auto" else name, *others)

    monkeypatch.setattr(api, "find_backend", choose_triton)
    checks.check_gradients()
    assert "auto" in used


def test_a_device_that_cannot_run_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='implementation="triton" runs on a GPU only, not on cpu; choose "auto"'):
        attend(*make_inputs(9, 9), pattern_of({}), "triton")


@pytest.mark.parametrize(
    ("device", "cuda", "capability", "packages", "chosen"),
    [
        ("cuda", "13.0", (9, 0), {"triton", "numba"}, "triton"),
        ("cuda", "13.0", (8, 0), {"triton"}, "triton"),
        ("cuda", "13.0", (7, 5), {"triton"}, "torch"),
        ("cuda", "13.0", (9, 0), {"numba"}, "torch"),
        ("cuda", None, (9, 0), {"triton"}, "torch"),
        ("cpu", "13.0", (9, 0), {"triton"}, "torch"),
        ("cpu", None, (9, 0), {"triton", "numba"}, "numba"),
        ("mps", None, (9, 0), {"triton", "numba"}, "torch"),
    ],
)
def test_auto(device, cuda, capability, packages, chosen, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_installed", packages.__contains__)
    assert dispatch._best(torch.device(device)) == chosen


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda package: False)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        attend(*make_inputs(9, 9), pattern_of({}), "triton")


# Kernels launched with something wrong: (kernel, argument or a member of it, how it is changed).
FORWARD_MUTANTS = {
    "window": ("list_keys", "window", lambda window: window + 1),
    "model's window": ("list_keys", "sliding_window", lambda _: 2**30),
    "model's window of the buckets": ("choose_buckets", "SLIDING", lambda _: False),
    "model's window of the means": ("mean_buckets", "SLIDING", lambda _: False),
    "keys inside the window": ("choose_buckets", "window", lambda window: window - 2),
    "means without lag": ("mean_buckets", "means_lag", lambda lag: lag - 12),
    "means of another page": ("mean_buckets", "first_position", lambda position: position - 16),
    "light keys": ("fwd", "DROP", lambda _: False),
    "softcap": ("fwd", "SCORE.SOFTCAP", lambda _: None),
    "sinks": ("fwd", "sinks", lambda _: None),
    "random keys": ("list_keys", "NUM_RANDOM", lambda _: 0),
    "other heads of the group": ("score_buckets", "GROUP", lambda _: 1),
}
BACKWARD_MUTANTS = {
    "light keys": ("bwd_dkv_older", "DROP", lambda _: False),
    "light keys of the queries": ("bwd_dq", "DROP", lambda _: False),
    "softcap": ("bwd_dkv_window", "SCORE.SOFTCAP", lambda _: None),
    "random keys": ("find_readers", "NUM_RANDOM", lambda _: 0),
    "rows of a tile": ("list_rows", "window", lambda window: window + 4),
    "random keys of rows": ("list_rows", "NUM_RANDOM", lambda _: 0),
    "window": ("bwd_dkv_window", "window", lambda window: window - 1),
    "model's window": ("bwd_dkv_older", "sliding_window", lambda window: window - 1),
}


@pytest.fixture(scope="module")
def right():
    """Arguments of a document with everything in it, its output and gradients."""
    fields = {"dense_below": 0, "page_size": 16, "sliding_window": 30, "key_budget": ((6, 4),)}
    fields = FEATURES["everything at once"] | fields
    arguments = (*inputs(LENGTH, LENGTH), patterns(fields))
    return arguments, output_and_gradients("reference", *arguments, softcap=0.7, sinks=sinks())


def broken(mutant, kernels, monkeypatch):
    """From now on a kernel is launched with something wrong."""
    name, argument, change = mutant
    launch = triton_launch.launch
    monkeypatch.setattr(triton_launch, "block_keys", lambda keys, dim: 16)

    def launch_broken(kernel, grid, *args, **kwargs):
        if kernel.fn.__name__ != f"{name}_kernel":
            launch(kernel, grid, *args, **kwargs)
            return
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        kernel[grid](**changed(values, argument, change))

    monkeypatch.setattr(triton_launch, "launch", launch_broken)


def changed(values, argument, change):
    """The values with another one of an argument, or of a named tuple's member: "argument.member"."""
    argument, _, member = argument.partition(".")
    value = values[argument]
    return values | {argument: value._replace(**{member: change(getattr(value, member))}) if member else change(value)}


def differ(ours, expected):
    return not all(torch.allclose(x, y, rtol=1e-8, atol=1e-8) for x, y in zip(ours, expected, strict=True))


def test_nothing_is_caught_where_nothing_is_broken(right):
    arguments, expected = right
    assert not differ(output_and_gradients("triton", *arguments, softcap=0.7, sinks=sinks()), expected)


@pytest.mark.parametrize("mutant", FORWARD_MUTANTS.values(), ids=FORWARD_MUTANTS.keys())
def test_mutants_of_the_forward_are_caught(mutant, right, kernels, monkeypatch):
    arguments, expected = right
    broken(mutant, kernels, monkeypatch)
    assert differ([attend(*arguments, "triton", softcap=0.7, sinks=sinks())], expected[:1])


@pytest.mark.parametrize("mutant", BACKWARD_MUTANTS.values(), ids=BACKWARD_MUTANTS.keys())
def test_mutants_of_the_backward_are_caught(mutant, right, kernels, monkeypatch):
    arguments, expected = right
    broken(mutant, kernels, monkeypatch)
    ours = output_and_gradients("triton", *arguments, softcap=0.7, sinks=sinks())
    assert not differ(ours[:1], expected[:1])
    assert differ(ours[1:], expected[1:])


@pytest.mark.parametrize(("capability", "num_shapes"), [(80, 1), (89, 2), (90, 3), (100, 1)], ids=lambda x: str(x))
def test_every_kernel_compiles_without_a_gpu(capability, num_shapes, tmp_path):
    """For what the interpreter does not check: shapes of products, shared memory, registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(capability), str(num_shapes)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    compiled = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len({entry["kernel"] for entry in compiled}) == 17
    room = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}[capability]
    assert all(entry["shared"] <= room for entry in compiled)
