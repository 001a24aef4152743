import pytest

SCRIPT = "plot_pattern.py"


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return {
        "--model": tiny_model_path,
        "--dataset": text_directory,
        "--context-length": 128,
        "--output": tmp_path / "pattern.png",
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def test_writes_a_picture(run_script, arguments):
    finished = run_script(SCRIPT, *flat(arguments), "--layers", 1, "--heads", 0, 3)
    assert finished.status == 0, finished.stderr
    assert arguments["--output"].read_bytes().startswith(b"\x89PNG")
    assert "0.txt, 128 tokens, layers [1], heads [0, 3]" in finished.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--output": "pattern.txt"}, ["--output", "must end in one of"]),
        ({"--layers": 2}, ["--layers", "2 is out of range", "0 to 1"]),
        ({"--heads": -1}, ["--heads", "-1 is out of range", "0 to 3"]),
        ({"--bins": 0}, ["--bins", "'0'"]),
        ({"--context-length": 100_000}, ["--dataset", "at least 100000 tokens"]),
        ({"--sparse-attention": '{"seeed": 4}'}, ["--sparse-attention", "seeed"]),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, changes, words):
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert not arguments["--output"].exists()
