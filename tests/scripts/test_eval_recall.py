import json

import pytest
import torch
from helpers.operation import calibrated_hash_text

SCRIPT = "eval_recall.py"
FIELDS = {
    "window_size": 8,
    "num_global_tokens": 2,
    "dense_below": 32,
    "num_hash_bits": 4,
    "key_budget": 16,
    "min_weight": 0,
}
CALIBRATED = {"hash": "calibrated", "calibrated_hash": calibrated_hash_text()}


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return [
        *("--model", tiny_model_path, "--dataset", text_directory, "--context-length", 200),
        *("--output", tmp_path / "recall.json", "--picture", tmp_path / "recall.png"),
    ]


@pytest.fixture
def measure(run_script, arguments, tmp_path):
    """Run the script with more arguments and fields of the sparse attention: its report and what it printed."""

    def run(*extra, **fields):
        finished = run_script(SCRIPT, *arguments, *extra, "--sparse-attention", json.dumps(FIELDS | fields))
        assert finished.status == 0, finished.stderr
        return json.loads((tmp_path / "recall.json").read_text()), finished.stdout

    return run


def table_rows(stdout):
    """The printed cells by the first one of their row."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_kept_mass_is_at_most_the_best_and_complete_where_nothing_is_left_out(measure):
    some, _ = measure(page_size=1)
    everything, _ = measure(page_size=1, key_budget=200)
    assert 0 < some["kept"] < some["best"] < 1
    assert 0 < some["recall"] < 1
    for name in ("kept", "best", "recall"):
        assert everything[name] == pytest.approx(1, abs=1e-4)
    assert some["keys"] == pytest.approx(8 + 2 + 16, abs=1)
    assert [len(layer) for layer in some["layers"]] == [4, 4]


def test_report_table_and_picture_hold_every_family(measure, tmp_path):
    result, stdout = measure(**CALIBRATED)
    families = result["families"]
    assert list(families) == ["calibrated", "random", "none"]
    assert families["calibrated"] == {name: result[name] for name in families["calibrated"]}
    assert families["none"]["keys"] == pytest.approx(8 + 2)
    assert families["random"]["keys"] > 20
    rows = table_rows(stdout)
    assert set(rows) == {"0", "1", "all"}
    assert rows["all"] == [
        f"{figure:.4f}"
        for figure in (result["best"], *(families[family][name] for family in families for name in ("kept", "recall")))
    ]
    recalls = [head["recall"] for head in families["random"]["layers"][1]]
    assert rows["1"][4] == f"{sum(recalls) / 4:.4f}"
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_hashes_chooses_the_families_beside_the_models_own(measure):
    result, _ = measure("--hashes", "none", **CALIBRATED)
    assert list(result["families"]) == ["calibrated", "none"]
    result, _ = measure("--hashes", "random")
    assert list(result["families"]) == ["random"]


def test_top_keys_is_the_number_that_recall_counts(measure):
    everything, few = (measure("--top-keys", number, page_size=1)[0] for number in (200, 1))
    rows = [start + i for start in (32, 82, 133, 184) for i in range(16)]  # the positions of the sampled rows
    assert everything["recall"] == pytest.approx(sum((8 + 2 + 16) / (row + 1) for row in rows) / len(rows))
    assert few["recall"] > everything["recall"]
    assert (everything["top_keys"], few["top_keys"]) == (200, 1)
    assert everything["kept"] == few["kept"]


def test_dense_layers_are_marked(measure, monkeypatch, tmp_path):
    drawn = []

    def draw(*arguments, **_):
        drawn.append(arguments)
        arguments[2].write_text("a picture")

    monkeypatch.setattr("hf_sparse_attn.visualization.plot_heads", draw)
    result, stdout = measure(dense_layers=[0])
    assert result["layers"][0] == {"dense": True}
    assert table_rows(stdout)["0"] == ["dense", "", "", "", ""]
    ((maps, titles, _),) = drawn
    assert titles == ["random: kept / best", "none: kept / best", "random: recall", "none: recall"]
    assert (tmp_path / "recall.png").read_text() == "a picture"
    assert maps.isnan().all(-1).tolist() == [[True, False]] * 4
    second = result["families"]["none"]["layers"][1]
    torch.testing.assert_close(maps[3, 1], torch.tensor([head["recall"] for head in second]))


def test_rows_are_capped_by_those_that_there_are(measure):
    """Every sparse row is read at most once or so, whatever is asked for."""
    most, _ = measure("--num-rows", 2**31 - 1)
    some, _ = measure("--num-rows", 200 - 32)
    assert most["kept"] == some["kept"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--context-length", 50], ["--context-length", "at least 128"]),
        (["--model", "./missing"], ["--model", "no such directory"]),
        (["--dataset", "missing.txt"], ["--dataset", "missing.txt"]),
        (["--hashes", "simhash"], ["--hashes", "'simhash'", "random"]),
        (["--hashes", "random", "calibrated"], ["--hashes", "calibrated_hash is missing"]),
        (["--hashes"], ["--hashes", "at least one"]),
        (["--top-keys", 0], ["--top-keys", "'0'"]),
        (["--picture", "recall.txt"], ["--picture", "must end in one of"]),
        (["--sparse-attention", '{"dense_layers": [0, 1]}'], ["--sparse-attention", "every layer is dense"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, extra, words):
    fields = json.dumps(FIELDS | {"dense_below": 64})
    assert_refused(run_script(SCRIPT, *arguments, "--sparse-attention", fields, *extra), *words)
