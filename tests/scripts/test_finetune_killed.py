"""A fine-tune that is killed at any moment and resumed ends where an uninterrupted one does."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.paths import SCRIPTS
from safetensors.torch import load_file

from hf_sparse_attn.training import checkpoints, damage

NUM_KILLS = 5


def command(model, dataset, output, num_steps, context_length, *more):
    options = {
        "--model": model,
        "--dataset": dataset,
        "--context-length": context_length,
        "--output": output,
        "--max-steps": num_steps,
        "--save-steps": 1,
        "--logging-steps": 1,
        "--learning-rate": 1e-2,
        "--distill-rows": 8,
        "--distill-layer-weight": 0.5,
        "--use_cpu": "true",
        "--disable-tqdm": "true",
    }
    given = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, str(SCRIPTS / "finetune.py"), *given, "--distill", *more]


def is_being_written(output):
    """Whether the newest checkpoint lacks its last file."""
    newest = checkpoints(output)[:1]
    return bool(newest) and not (newest[0] / "trainer_state.json").exists()


def run_and_kill(arguments, output, when):
    """Kill a run as soon as `when()` holds; whether that happened before its end."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if when():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    assert process.returncode == 0, process.stdout.read().decode()
    return False


@pytest.mark.nightly
def test_killed_at_random_moments(tiny_model_path, text_directory, tmp_path):
    """One of them while a checkpoint is being written; at least one whole checkpoint is left each time."""
    check_kills(tmp_path, tiny_model_path, text_directory, num_steps=12, context_length=48)


@pytest.mark.nightly
@pytest.mark.real_weights
def test_killed_with_real_weights(tmp_path):
    fields = '{"dense_below": 256}'
    check_kills(tmp_path, "demo", "demo", 10, 1024, "--bf16", "true", "--sparse-attention", fields)


def check_kills(tmp_path, model, dataset, num_steps, context_length, *options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    lengths = num_steps, context_length
    subprocess.run(command(model, dataset, whole, *lengths, *options), check=True, capture_output=True)

    drawn = random.Random(0)
    kills = damaged = 0
    while True:
        more = ["--resume_from_checkpoint", "last"] if checkpoints(killed) else []
        step = int(checkpoints(killed)[0].name.partition("-")[2]) if more else 0
        if kills >= NUM_KILLS:
            when = lambda: False  # noqa: E731
        elif kills % 2 == 0:
            when = lambda step=step: is_being_written(killed) and len(checkpoints(killed)) > 1  # noqa: E731
        else:
            aim, delay = step + drawn.randint(1, 2), drawn.uniform(0, 0.2)

            def when(aim=aim, delay=delay):
                if not (killed / f"checkpoint-{aim}").exists():
                    return False
                time.sleep(delay)
                return True

        if not run_and_kill(command(model, dataset, killed, *lengths, *options, *more), killed, when):
            break
        kills += 1
        found = [damage(folder) for folder in checkpoints(killed)]
        damaged += found[0] is not None
        assert None in found, "something to go on from"
    assert kills == NUM_KILLS
    assert damaged > 0, "none was killed while a checkpoint was being written"
    expected = load_file(whole / "model.safetensors")
    for name, weight in load_file(killed / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    losses = [json.loads((folder / "all_results.json").read_text())["last_loss"] for folder in (whole, killed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
