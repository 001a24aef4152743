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


def test_writes_a_page(run_script, arguments, tmp_path):
    arguments["--output"] = tmp_path / "pattern.html"
    finished = run_script(SCRIPT, *flat(arguments), "--layers", 1, "--heads", 0, 3, "--rows", 7)
    assert finished.status == 0, finished.stderr
    page = arguments["--output"].read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "0.txt" in page
    assert "(of 7 rows)" in finished.stdout


def test_a_page_has_no_cells(run_script, assert_refused, arguments, tmp_path):
    arguments["--output"] = tmp_path / "pattern.html"
    assert_refused(run_script(SCRIPT, *flat(arguments), "--bins", 10), "--bins", "a page (.html) has no cells")
    assert not arguments["--output"].exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--output": "pattern.txt"}, ["--output", "must end in one of"]),
        ({"--layers": 2}, ["--layers", "2 is out of range", "0 to 1"]),
        ({"--heads": -1}, ["--heads", "-1 is out of range", "0 to 3"]),
        ({"--output": "pattern.htm"}, ["--output", "must end in one of .png, .svg, .pdf, .html"]),
        ({"--bins": 0}, ["--bins", "'0'"]),
        ({"--rows": 0}, ["--rows", "'0'"]),
        ({"--rows": 129}, ["--rows: 129", "the 128 of --context-length"]),
        ({"--context-length": 100_000}, ["--dataset", "at least 100000 tokens"]),
        ({"--sparse-attention": '{"seeed": 4}'}, ["--sparse-attention", "seeed"]),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, changes, words):
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert not arguments["--output"].exists()
