import json

import pytest

SCRIPT = "eval_needle.py"
LENGTH = 1000


@pytest.fixture
def dataset(tmp_path):
    directory = tmp_path / "long"
    directory.mkdir()
    for index in range(2):
        (directory / f"{index}.txt").write_text(" ".join(f"document {index} says {number}." for number in range(100)))
    return directory


@pytest.fixture
def arguments(tiny_model_path, dataset, tmp_path):
    return {
        "--model": [tiny_model_path],
        "--dataset": [dataset],
        "--context-lengths": [LENGTH, 1200],
        "--depths": [0, 1],
        "--num-samples": [2],
        "--output": [tmp_path / "result.json"],
        "--picture": [tmp_path / "needle.png"],
    }


def flat(arguments):
    return [part for name, values in arguments.items() for part in (name, *values)]


def test_writes_the_report_and_the_picture_and_prints_the_table(run_script, arguments):
    finished = run_script(SCRIPT, *flat(arguments), "--sparse-attention", '{"window_size": 4}')
    assert finished.status == 0, finished.stderr
    result = json.loads(arguments["--output"][0].read_text())
    assert set(result["dense"]) == {"accuracy", "generation_accuracy", "margin", "seconds"}
    assert set(result["sparse"]) == {"accuracy", "generation_accuracy", "margin", "seconds", "density"}
    assert 0 < result["sparse"]["density"] < 0.1
    assert result["sparse_attention"]["window_size"] == 4
    # By default two facts a depth in every sample, and one context with a single fact for each depth.
    assert result["samples"] == 2 * (2 * 2 * 2 + 2)
    cells = [(cell["task"], cell["context_length"], cell["depth"], cell["samples"]) for cell in result["cells"]]
    assert cells == [
        (task, length, depth, samples)
        for task, samples in (("several", 4), ("single", 1))
        for length in (LENGTH, 1200)
        for depth in (0, 1)
    ]
    assert [context["document"] for context in result["contexts"]] == ["0.txt", "1.txt", "0.txt", "0.txt"] * 2
    assert arguments["--picture"][0].read_bytes().startswith(b"\x89PNG")
    assert finished.stderr.count("1200 tokens are more than the 512 that the model was made for") == 1
    for shown in (f"{result['sparse']['density']:.4f}", f"{result['difference']['margin']:+.3f}"):
        assert shown in finished.stdout


def test_the_same_seed_gives_the_same_answers_and_another_one_others(run_script, arguments):
    answers = []
    few = arguments | {"--context-lengths": [LENGTH], "--depths": [0.5], "--num-single": [0], "--num-samples": [1]}
    for seed in (3, 3, 4):
        finished = run_script(SCRIPT, *flat(few | {"--seed": [seed]}))
        assert finished.status == 0, finished.stderr
        contexts = json.loads(arguments["--output"][0].read_text())["contexts"]
        answers.append([needle for context in contexts for needle in context["needles"]])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": ["./missing"]}, ["--model", "'./missing'", "no such directory"]),
        ({"--dataset": ["missing.txt"]}, ["--dataset", "missing.txt"]),
        ({"--depths": [0, 1.5]}, ["--depths", "[0, 1]", "'1.5'"]),
        ({"--depths": ["half"]}, ["--depths", "'half'"]),
        ({"--depths": ["nan"]}, ["--depths", "'nan'"]),
        ({"--context-lengths": [LENGTH, 300]}, ["--context-lengths 300", "too short for 4 facts"]),
        ({"--context-lengths": [100_000]}, ["--dataset", "at least 100000 tokens", "longest"]),
        ({"--context-lengths": [0]}, ["--context-lengths", "'0'"]),
        ({"--num-samples": [0]}, ["--num-samples", "'0'"]),
        ({"--num-single": [-1]}, ["--num-single", "'-1'"]),
        ({"--needles-per-depth": [40]}, ["--needles-per-depth", "at most 38 facts"]),
        ({"--seed": ["x"]}, ["--seed", "'x'"]),
        ({"--sparse-attention": ['{"windw_size": 4}']}, ["--sparse-attention", "windw_size"]),
        ({"--sparse-attention": ['{"dense_below": 990}']}, ["--context-lengths 1000", "dense_below=990"]),
        ({"--device": ["gpu"]}, ["--device", "'gpu'"]),
        ({"--dtype": ["float33"]}, ["--dtype", "'float33'"]),
        ({"--picture": ["needle.txt"]}, ["--picture", "must end in one of"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, tmp_path, changes, words):
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--output", "--picture"])
def test_output_that_is_a_directory_is_refused(run_script, assert_refused, arguments, tmp_path, option):
    assert_refused(run_script(SCRIPT, *flat(arguments | {option: [tmp_path]})), option, "is a directory")


@pytest.mark.real_weights
def test_real_model_finds_facts_with_dense_attention(run_script, tmp_path):
    """Where dense attention finds nothing, equal accuracies say nothing."""
    output = tmp_path / "result.json"
    options = ("--depths", 0, 0.5, 1, "--num-samples", 2, "--needles-per-depth", 1, "--num-single", 0)
    options += ("--sparse-attention", '{"dense_below": 1024}')
    finished = run_script(SCRIPT, "--model", "demo", "--context-lengths", 1536, *options, "--output", output)
    assert finished.status == 0, finished.stderr
    result = json.loads(output.read_text())
    assert result["samples"] == 6
    assert result["dense"]["accuracy"] >= 5 / 6
    assert result["dense"]["generation_accuracy"] >= 4 / 6
    assert result["dense"]["margin"] > 2
