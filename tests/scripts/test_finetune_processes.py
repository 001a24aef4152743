"""`finetune` in two processes that a launcher starts: as one process that accumulates two batches, told once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.paths import SCRIPTS
from safetensors.torch import load_file

ROOT = SCRIPTS.parent
CONFIGS = ROOT / "examples" / "accelerate"
PROGRAM = ROOT / "tests" / "helpers" / "launched.py"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture
def arguments(tiny_model_path, text_directory):
    return {
        "--model": tiny_model_path,
        "--dataset": text_directory,
        "--context-length": 48,
        "--rows": "packed",  # of nearly as many targets each: an evaluation takes the mean over rows
        "--max-steps": 3,
        "--logging-steps": 1,
        "--learning-rate": 0.3,
        "--optim": "sgd",
        "--max-grad-norm": 1e9,
        "--disable-tqdm": "true",
    }


def flat(arguments):
    return [str(part) for pair in arguments.items() for part in pair]


def launch(launcher, kind, arguments, tmp_path):
    """Run the command in two processes."""
    folder = tmp_path / "temporary"
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TMPDIR": str(folder)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MASTER_PORT": "0"}
    command = [sys.executable, "-W", "ignore", "-m", *launcher, str(PROGRAM), kind, "finetune", *flat(arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert not list(folder.glob("hf_sparse_attn-*")), "temporary rows are removed"
    return finished


def torchrun(kind, arguments, tmp_path):
    return launch(["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], kind, arguments, tmp_path)


def trained(directory):
    state, results = (json.loads((directory / f"{name}.json").read_text()) for name in ("trainer_state", "all_results"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses, [results.get("eval_loss_before"), results.get("eval_loss_after")]


def assert_trained_alike(found, expected):
    for some, wanted in zip(trained(found), trained(expected), strict=True):
        assert some == pytest.approx(wanted, abs=1e-5)
    weights = [load_file(directory / "model.safetensors") for directory in (found, expected)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


@pytest.fixture
def in_one_process(run_script, arguments, tmp_path):
    def run(**changes):
        changes = {"--output": tmp_path / "one", "--use_cpu": "true", **changes}
        finished = run_script("finetune.py", *flat(arguments | changes))
        assert finished.status == 0, finished.stderr
        return tmp_path / "one"

    return run


def test_ddp_after_an_evaluation(arguments, in_one_process, tmp_path):
    arguments |= {"--eval-dataset": arguments["--dataset"], "--eval-rows": 4}
    finished = torchrun("plain", arguments | {"--output": tmp_path / "two", "--use_cpu": "true"}, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Saved to") == finished.stdout.count("rows of 48") == 1
    assert_trained_alike(tmp_path / "two", in_one_process(**{"--gradient-accumulation-steps": 2}))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--rows": "loose"}, "argument --rows"),
        ({"--context-length": 100_000}, "argument --dataset: dataset has"),
        ({"--output": "."}, "argument --output"),
    ],
    ids=["an option", "rows", "output"],
)
def test_errors_are_told_once_and_end_all(changes, message, arguments, tmp_path):
    finished = torchrun("plain", arguments | {"--output": tmp_path / "two", "--use_cpu": "true"} | changes, tmp_path)
    assert finished.returncode != 0
    told = [line for line in finished.stderr.splitlines() if "finetune: error" in line]
    assert len(told) == 1
    assert message in told[0]


@pytest.mark.nightly
def test_a_loss_that_is_not_finite_in_one_process_ends_all(arguments, tmp_path):
    finished = torchrun("nan", arguments | {"--output": tmp_path / "two", "--use_cpu": "true"}, tmp_path)
    assert finished.returncode != 0
    told = [line for line in finished.stderr.splitlines() if "finetune: error" in line]
    assert len(told) == 1
    assert "the loss of step 2 is nan" in told[0]


def accelerate(config, kind, arguments, tmp_path, **changes):
    """With the example's config file, of which entries of its deepspeed_config are changed."""
    settings = yaml.safe_load((CONFIGS / config).read_text())
    if changes:
        settings["deepspeed_config"] |= changes
    (tmp_path / config).write_text(yaml.safe_dump(settings))
    launcher = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(tmp_path / config)]
    finished = launch(launcher, kind, arguments, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Saved to") == 1
    return tmp_path / "two"


@pytest.mark.nightly
@pytest.mark.parametrize(("config", "kind"), [("ddp.yaml", "plain"), ("fsdp2.yaml", "fsdp")])
def test_rows_of_its_own_for_each_process(config, kind, arguments, in_one_process, tmp_path):
    arguments |= {"--eval-dataset": arguments["--dataset"], "--eval-rows": 4, "--save-steps": 2}
    given = {"--output": tmp_path / "two", "--use_cpu": "true"}
    accelerate(config, kind, arguments | given, tmp_path)
    one = in_one_process(**{"--gradient-accumulation-steps": 2})
    assert_trained_alike(tmp_path / "two", one)

    del arguments["--eval-dataset"]  # a sharded model is evaluated with the checkpoint's weights
    resumed = {"--max-steps": 5, "--resume_from_checkpoint": "last"}
    accelerate(config, kind, arguments | given | resumed, tmp_path)
    assert_trained_alike(tmp_path / "two", in_one_process(**{"--gradient-accumulation-steps": 2, **resumed}))


@pytest.mark.nightly
@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ulysses(stage, arguments, in_one_process, tmp_path):
    arguments |= {"--save-strategy": "no"}
    if stage == 3:  # before that, an evaluation
        arguments |= {"--eval-dataset": arguments["--dataset"], "--eval-rows": 4}
    accelerate("ulysses.yaml", "deepspeed", arguments | {"--output": tmp_path / "two"}, tmp_path, zero_stage=stage)
    assert_trained_alike(tmp_path / "two", in_one_process())
