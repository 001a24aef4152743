"""Each file of examples/ runs as it stands, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse_attn.calibration import budget_allocation

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Run `examples/NAME` with arguments in this process; what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_each_is_tested():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == [
        "convert_and_compare.py",
        "finetune.py",
        "long_decode.py",
        "sparse_transformer.py",
    ]


def test_convert_and_compare(run_example, monkeypatch, tiny_model_path, text_directory, tmp_path):
    monkeypatch.setattr(budget_allocation, "BUDGETS", (0, 8, 16, 32))
    monkeypatch.setattr(budget_allocation, "MIN_WEIGHTS", (0.0, 1e-2))
    output = tmp_path / "converted"
    fields = {"window_size": 16, "num_global_tokens": 2, "dense_below": 32}
    out = run_example(
        *("convert_and_compare.py", "--model", tiny_model_path, "--dataset", text_directory, "--output", output),
        *("--context-length", 200, "--target-density", 0.3, "--sparse-attention", json.dumps(fields)),
    )
    assert f"{output}: expected density 0." in out
    assert "ratio " in out
    model = AutoModelForCausalLM.from_pretrained(output, attn_implementation="sparse")
    assert model.config.sparse_attention["hash"] == "calibrated"


def test_finetune(run_example, tiny_model_path, text_directory, tmp_path):
    output = tmp_path / "tuned"
    out = run_example(
        *("finetune.py", "--model", tiny_model_path, "--dataset", text_directory),
        *("--context-length", 48, "--output", output, "--max-steps", 2),
    )
    assert "loss " in out
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 2
    AutoModelForCausalLM.from_pretrained(output, attn_implementation="sparse")


def test_long_decode(run_example, tiny_model_path, text_directory):
    document = text_directory / "0.txt"
    out = run_example(
        *("long_decode.py", "--model", tiny_model_path, "--document", document),
        *("--budget", 96, "--max-new-tokens", 4),
    )
    full, small = (int(line.split()[2]) for line in out.splitlines() if " bytes at most" in line)
    assert small < full


@pytest.mark.nightly
def test_sparse_transformer(run_example, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of this text is followed by line {number + 1}\n" for number in range(200)))
    out = run_example(
        *("sparse_transformer.py", "--text", text, "--context-length", 96, "--max-steps", 40),
        *("--num-layers", 2, "--hidden-size", 32, "--window-size", 8, "--key-budget", 8),
    )
    before, after = (float(line.split()[2]) for line in out.splitlines() if line.startswith("loss "))
    assert before > 5
    assert after < before - 1
    assert "AttentionStatistics(density=0." in out
