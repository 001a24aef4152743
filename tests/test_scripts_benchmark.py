import json

import pytest

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
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert 0 < row["density"] < 1
    assert result["environment"]["torch"]
    assert f"{result['rows'][0]['speedup']:.2f}" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-heads", 4, "--num-kv-heads", 3], ["--num-kv-heads", "does not divide"]),
        (["--seq-lens", 0], ["--seq-lens", "'0'"]),
        (["--pass", "sideways"], ["--pass", "sideways"]),
        (["--dtype", "auto"], ["--dtype"]),
        (["--sparse-attention", '{"stride": -1}'], ["--sparse-attention", "stride"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, words):
    assert_refused(run_script(SCRIPT, *arguments), *words)
