import json

import pytest

SCRIPT = "eval_recall.py"
FIELDS = {"window_size": 8, "num_global_tokens": 2, "dense_below": 32, "num_hash_bits": 4, "key_budget": 16}


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return [
        *("--model", tiny_model_path, "--dataset", text_directory, "--context-length", 200),
        *("--output", tmp_path / "recall.json"),
    ]


def test_kept_mass_is_at_most_the_best_and_complete_where_nothing_is_left_out(run_script, arguments, tmp_path):
    results = []
    for budget in (16, 200):
        fields = json.dumps(FIELDS | {"key_budget": budget, "page_size": 1})
        finished = run_script(SCRIPT, *arguments, "--sparse-attention", fields)
        assert finished.status == 0, finished.stderr
        results.append(json.loads((tmp_path / "recall.json").read_text()))
    some, everything = results
    assert 0 < some["kept"] < some["best"] < 1
    assert everything["kept"] == pytest.approx(1, abs=1e-4)
    assert everything["best"] == pytest.approx(1, abs=1e-4)
    assert some["keys"] == pytest.approx(8 + 2 + 16, abs=1)
    assert [len(layer) for layer in some["layers"]] == [4, 4]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--context-length", 50], ["--context-length", "at least 128"]),
        (["--model", "./missing"], ["--model", "no such directory"]),
        (["--dataset", "missing.txt"], ["--dataset", "missing.txt"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, extra, words):
    fields = json.dumps(FIELDS | {"dense_below": 64})
    assert_refused(run_script(SCRIPT, *arguments, "--sparse-attention", fields, *extra), *words)
