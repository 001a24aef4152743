import json

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.benchmarking import decoding, random_models, speed
from hf_sparse_attn.benchmarking.decoding import compare_decoding, compare_generation
from hf_sparse_attn.benchmarking.speed import (
    compare_model_speed,
    compare_speed,
    fitted_exponent,
    layer_inputs,
    make_inputs,
)
from hf_sparse_attn.integration import observe
from hf_sparse_attn.ops import find_keys
from hf_sparse_attn.ops.numba import BACKEND
from hf_sparse_attn.ops.numba import chunks as numba_ops
from hf_sparse_attn.ops.numba.chunks import STAGES
from hf_sparse_attn.patterns import layer_pattern
from hf_sparse_attn.routing import RowChunk

SCRIPT = "benchmark.py"
SMALL = ["--seq-lens", 64, 96, "--num-heads", 4, "--num-kv-heads", 2, "--head-dim", 16, "--repeats", 1]
FIELDS = '{"window_size": 8, "num_global_tokens": 2, "key_budget": 8, "dense_below": 16}'


@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
def test_writes_a_row_for_each_length(run_script, tmp_path, passes):
    output = tmp_path / "benchmark.json"
    finished = run_script(SCRIPT, *SMALL, "--pass", passes, "--sparse-attention", FIELDS, "--output", output)
    assert finished.status == 0, finished.stderr
    result = json.loads(output.read_text())
    assert [row["seq_len"] for row in result["rows"]] == [64, 96]
    for row in result["rows"]:
        assert row["pass"] == passes
        assert 0 < row["floor_ms"] < row["dense_ms"]
        assert row["routing_ms"] > 0
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert 0 < row["density"] < 1
    assert result["environment"]["torch"]
    assert f"{result['rows'][0]['speedup']:.2f}" in finished.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN computes this on a GPU")
def test_other_backends_of_sdpa(run_script, tmp_path):
    """One that this device has, and one that it lacks; the speedup is over the fastest."""
    output = tmp_path / "benchmark.json"
    options = ["--backends", "flash", "cudnn", "--sparse-attention", FIELDS, "--output", output]
    finished = run_script(SCRIPT, *SMALL, *options)
    assert finished.status == 0, finished.stderr
    for row in json.loads(output.read_text())["rows"]:
        assert row["cudnn_ms"] is None
        assert 0 < row["dense_ms"] <= row["flash_ms"]
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])


def test_decode(run_script, tmp_path):
    output = tmp_path / "benchmark.json"
    finished = run_script(SCRIPT, *SMALL, "--pass", "decode", "--sparse-attention", FIELDS, "--output", output)
    assert finished.status == 0, finished.stderr
    for row, length in zip(json.loads(output.read_text())["rows"], (64, 96), strict=True):
        assert (row["pass"], row["seq_len"]) == ("decode", length)
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert 0 < row["density"] < 1
        assert row["dense_peak_bytes"] == 2 * 2 * length * 16 * 4 < row["sparse_peak_bytes"]
    assert "cache MB" in finished.stdout


def test_a_wrong_decoding_step_is_not_timed(monkeypatch):
    config = SparseAttentionConfig(window_size=8, key_budget=8, dense_below=16)
    inputs = make_inputs(300, 4, 2, 16, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(decoding, "_BYTES", 1)
    compare_decoding(inputs, config=config, repeats=1)
    attend = decoding.attention

    def too_large_in_steps(inputs, *args):
        return attend(inputs, *args) * (1.2 if inputs.query.shape[2] == 1 else 1.0)

    monkeypatch.setattr(decoding, "attention", too_large_in_steps)
    with pytest.raises(RuntimeError, match="wrong"):
        compare_decoding(inputs, config=config, repeats=1)


@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
def test_a_wrong_output_is_not_timed(monkeypatch, passes):
    config = SparseAttentionConfig(window_size=8, key_budget=8, dense_below=16)
    inputs = make_inputs(300, 4, 2, 16, torch.float32, torch.device("cpu"))
    compare_speed(inputs, config=config, passes=passes, repeats=1)
    attend = BACKEND.document_attention
    monkeypatch.setattr(BACKEND, "document_attention", lambda *args, **kwargs: 1.1 * attend(*args, **kwargs))
    with pytest.raises(RuntimeError, match="100% of its rows are over 5% off"):
        compare_speed(inputs, config=config, passes=passes, repeats=1)


@pytest.mark.parametrize("passes", ["forward", "forward_backward", "prefill", "training_step"])
def test_of_a_model(run_script, tmp_path, tiny_model_path, passes):
    files = ["--output", tmp_path / "benchmark.json", "--picture", tmp_path / "benchmark.png"]
    finished = run_script(
        SCRIPT, "--model", tiny_model_path, "--seq-lens", 96, 64, "--pass", passes, "--repeats", 1, *files
    )
    assert finished.status == 0, finished.stderr
    result = json.loads((tmp_path / "benchmark.json").read_text())
    whole_model = passes in ("prefill", "training_step")
    assert result["source"].get("layer") == (None if whole_model else 1)
    assert result["sparse_attention"]["window_size"] == 8
    for row, length in zip(result["rows"], (96, 64), strict=True):
        read = sum(min(p + 1, 8 + 2) for p in range(length))
        assert row["density"] == pytest.approx(read / (length * (length + 1) / 2))
        assert ("floor_ms" in row) == (not whole_model)
    assert (tmp_path / "benchmark.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("passes", ["decode", "generation"])
def test_decoding_of_a_model(run_script, tmp_path, tiny_model_path, passes):
    output = tmp_path / "benchmark.json"
    options = ["--pass", passes, "--repeats", 1, "--output", output]
    finished = run_script(SCRIPT, "--model", tiny_model_path, "--seq-lens", 96, 64, *options)
    assert finished.status == 0, finished.stderr
    for row, length in zip(json.loads(output.read_text())["rows"], (96, 64), strict=True):
        assert (row["pass"], row["seq_len"]) == (passes, length)
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert 0 < row["density"] < 1


@pytest.mark.parametrize(
    "passes",
    ["prefill", "training_step", "generation", pytest.param("compiled_generation", marks=pytest.mark.nightly)],
)
def test_of_a_random_model(run_script, tmp_path, monkeypatch, passes, tiny_llama_config):
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = "llama", {name: getattr(tiny_llama_config, name) for name in fields}
    monkeypatch.setitem(random_models.SHAPES, "mistral-7b", shape)
    output = tmp_path / "benchmark.json"
    options = ["--pass", passes, "--repeats", 1, "--sparse-attention", FIELDS, "--output", output]
    finished = run_script(SCRIPT, "--random-model", "mistral-7b", "--seq-lens", 64, *options)
    assert finished.status == 0, finished.stderr
    result = json.loads(output.read_text())
    assert (result["rows"][0]["pass"], result["rows"][0]["seq_len"]) == (passes, 64)
    assert result["source"]["model"] == "mistral-7b, random weights"
    assert result["sparse_attention"]["window_size"] == 8


def test_generation_leaves_a_model_sparse():
    model = tiny_model(dtype=torch.float32)
    row = compare_generation(model, tokens(40), repeats=1)
    assert model.config._attn_implementation == "sparse"
    keys_and_values = 2 * 2 * 2 * 41 * 8 * 4  # after one token that is not timed
    assert row["dense_peak_bytes"] == keys_and_values < row["sparse_peak_bytes"]


@pytest.mark.parametrize("layer", [0, 1])
def test_inputs_of_a_layer_are_the_models_own(layer):
    model = tiny_model(key_budget=5)
    ids = tokens(50)
    seen = {}

    def observer(pattern, query, key, value, scaling, output):
        seen[pattern.layer_idx] = (query, key, value)

    with torch.no_grad(), observe(model, observer):
        model(ids)
    for ours, expected in zip(layer_inputs(model, ids, layer), seen[layer], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected.float())


def test_a_layer_without_inputs_is_an_error():
    with pytest.raises(ValueError, match="layer 7 of the model has no attention"):
        layer_inputs(tiny_model(), tokens(20), 7)


@pytest.mark.parametrize("passes", ["prefill", "training_step"])
def test_a_model_is_left_sparse_and_without_gradients(passes):
    model = tiny_model(dtype=torch.float32)
    row = compare_model_speed(model, tokens(40), passes, repeats=1)
    assert row["seq_len"] == 40
    assert model.config._attn_implementation == "sparse"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fitted_exponent():
    assert fitted_exponent([1000, 2000, 8000], [3 * n**1.5 for n in (1000, 2000, 8000)]) == pytest.approx(1.5)


@pytest.mark.parametrize("implementation", ["numba", "torch"])
def test_find_keys_finds_what_the_forward_scores(implementation, monkeypatch):
    """Every sparse row and KV head is routed once, dense rows and layers never."""
    config = SparseAttentionConfig(window_size=8, dense_below=40, key_budget=9, implementation=implementation)
    rows = []
    if implementation == "numba":
        attend_rows = numba_ops.attend_rows

        def attend(position, query, *rest):
            rows.append((position, len(query)))
            assert STAGES[rest[-1] + 2] == "keys found"
            attend_rows(position, query, *rest)

        monkeypatch.setattr(numba_ops, "attend_rows", attend)
    else:
        select_slots = RowChunk.select_slots
        monkeypatch.setattr(
            RowChunk,
            "select_slots",
            lambda self, *rest: rows.append((self.start, self.stop - self.start)) or select_slots(self, *rest),
        )
    query, key = torch.randn(4, 100, 16), torch.randn(2, 100, 16)

    def find(length=100, **fields):
        shape = (4, 2, 16, torch.device("cpu"), torch.float32)
        find_keys(query[:, :length], key[:, :length], layer_pattern(config.replace(**fields), 0, *shape))

    find()
    assert sorted(p for start, number in rows for p in range(start, start + number)) == sorted([*range(40, 100)] * 2)
    rows.clear()
    find(dense_layers=(0,))
    find(length=30)
    assert not rows


def test_stages(run_script, tmp_path):
    output = tmp_path / "stages.json"
    finished = run_script(SCRIPT, *SMALL, "--pass", "stages", "--sparse-attention", FIELDS, "--output", output)
    assert finished.status == 0, finished.stderr
    for row in json.loads(output.read_text())["rows"]:
        stages = {stage["stage"]: stage for stage in row["stages"]}
        assert list(stages) == [*STAGES, "dense rows", "recomputation", "gradients"]
        length = row["seq_len"]
        sparse_pairs = length * (length + 1) / 2 - 16 * 17 / 2
        pairs = row["density"] * length * (length + 1) / 2 - 16 * 17 / 2
        assert 0 < pairs < sparse_pairs
        assert stages["values"]["gflop"] == pytest.approx(4 * pairs * 16 * 2 / 1e9)
        assert stages["key scores"]["gbyte"] >= 4 * pairs * 16 * 4 / 2 / 1e9
    assert "key scores" in finished.stdout


def test_dense_below_is_where_the_lines_cross(monkeypatch):
    """A dense row at position p takes p units, a sparse one 300 wherever it is."""
    times = {("dense", n): n * n / 2 for n in (512, 1024)} | {("sparse", n): 300 * n for n in (512, 1024)}

    def medians(timed, *_):
        return {name: times[side, int(n)] for name in timed for side, n in [name.split()]}

    monkeypatch.setattr(speed, "_medians", medians)
    inputs = make_inputs(1024, 4, 2, 8, torch.float32, torch.device("cpu"))
    assert speed.measure_dense_below(SparseAttentionConfig(page_size=4), inputs, 0) == 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-heads", 4, "--num-kv-heads", 3], ["--num-kv-heads", "does not divide"]),
        (["--seq-lens", 0], ["--seq-lens", "'0'"]),
        (["--pass", "sideways"], ["--pass", "sideways"]),
        (["--dtype", "auto"], ["--dtype"]),
        (["--pass", "prefill"], ["--pass", "--model"]),
        (["--pass", "prefill", "--random-model", "llama-4"], ["--random-model", "llama-4", "llama-3-8b"]),
        (["--random-model", "llama-3-8b"], ["--random-model", "prefill"]),
        (["--layer", 1], ["--layer", "--model"]),
        (["--model", "demo", "--head-dim", 64], ["--head-dim", "--model"]),
        (["--picture", "times.txt"], ["--picture", ".png"]),
        (["--picture", "times.png", "--seq-lens", 64], ["--picture", "two"]),
        (["--picture", "times.png", "--pass", "stages"], ["--picture", "stages"]),
        (["--backends", "flash", "--pass", "stages"], ["--backends", "forward"]),
        (["--backends", "fastest"], ["--backends", "flash"]),
        (["--pass", "stages", "--seq-lens", 64], ["--seq-lens", "all of the 64 rows are dense"]),
        (["--sparse-attention", '{"stride": -1}'], ["--sparse-attention", "stride"]),
        (["--sparse-attention", '{"implementation": "triton"}', "--device", "cpu"], ["--sparse-attention", "GPU"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert_refused(run_script(SCRIPT, *arguments), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [(["--layer", 2], ["--layer", "0 to 1"]), (["--seq-lens", 10**8], ["--seq-lens", "tokens"])],
    ids=["layer", "length"],
)
def test_bad_arguments_of_a_model_are_refused(run_script, assert_refused, tiny_model_path, changes, words):
    assert_refused(run_script(SCRIPT, "--model", tiny_model_path, *changes), *words)
