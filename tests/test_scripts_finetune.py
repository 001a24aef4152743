import json

import pytest
from transformers import AutoModelForCausalLM

SCRIPT = "finetune.py"


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return {
        "--model": tiny_model_path,
        "--dataset": text_directory,
        "--context-length": 48,
        "--output": tmp_path / "tuned",
        "--max-steps": 4,
        "--use_cpu": "true",
        "--disable-tqdm": "true",
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def test_trains_saves_and_resumes(run_script, arguments, tmp_path):
    output = arguments["--output"]
    finished = run_script(SCRIPT, *flat(arguments | {"--eval-dataset": arguments["--dataset"], "--eval-rows": 3}))
    assert finished.status == 0, finished.stderr
    assert "loss, first to last" in finished.stdout
    assert "held-out rows" in finished.stdout
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4
    AutoModelForCausalLM.from_pretrained(output, attn_implementation="sparse")

    finished = run_script(SCRIPT, *flat(arguments | {"--max-steps": 6, "--resume_from_checkpoint": "last"}))
    assert finished.status == 0, finished.stderr
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 6


def test_output_that_holds_something_is_refused(run_script, assert_refused, arguments):
    arguments["--output"].mkdir()
    (arguments["--output"] / "notes.txt").write_text("mine")
    assert_refused(run_script(SCRIPT, *flat(arguments)), "--output", "already holds something")
    assert [path.name for path in arguments["--output"].iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "./missing"}, ["--model", "no such directory"]),
        ({"--dataset": "missing.txt"}, ["--dataset", "missing.txt"]),
        ({"--context-length": 100_000}, ["--dataset", "fewer than one row of 100000"]),
        ({"--context-length": 1}, ["--context-length", "must be at least 2"]),
        ({"--rows": "loose"}, ["--rows", "loose"]),
        ({"--eval-dataset": "missing.txt"}, ["--eval-dataset", "missing.txt"]),
        ({"--eval-rows": 0}, ["--eval-rows"]),
        ({"--sparse-attention": '{"windw_size": 4}'}, ["--sparse-attention", "windw_size"]),
        ({"--dtype": "float33"}, ["--dtype", "'float33'"]),
        ({"--max-steps": "many"}, ["--max-steps", "many"]),
        ({"--warmup-steps": -1}, ["warmup_steps"]),
        ({"--resume_from_checkpoint": "last"}, ["--resume_from_checkpoint", "no checkpoint"]),
        ({"--no-such-option": 1}, ["--no-such-option"]),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, changes, words):
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert not arguments["--output"].exists()


def test_missing_output_is_refused(run_script, assert_refused, arguments):
    del arguments["--output"]
    assert_refused(run_script(SCRIPT, *flat(arguments)), "--output")


@pytest.mark.real_weights
def test_real_model_learns(run_script, tmp_path):
    finished = run_script(
        SCRIPT, "--model", "demo", "--dataset", "demo", "--context-length", 256, "--output", tmp_path / "tuned",
        "--max-steps", 6, "--eval-dataset", "demo", "--eval-rows", 4, "--save-strategy", "no",
        "--learning-rate", "1e-4", "--sparse-attention", '{"window_size": 64, "dense_below": 0, "key_budget": 32}',
    )  # fmt: skip
    assert finished.status == 0, finished.stderr
    results = json.loads((tmp_path / "tuned" / "all_results.json").read_text())
    assert results["eval_loss_after"] < results["eval_loss_before"]
