import json
import subprocess
import sys

import pytest
from helpers.paths import SCRIPTS, script_module

ALWAYS_INSTALLED = {"trust_remote_code=True", "torchrun -m hf_sparse_attn run, two processes"}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, and a way to run it with given checks: its exit status and what it wrote."""
    module = script_module("check_integrations")

    def run(*checks, arguments=()):
        output = tmp_path / "found.json"
        monkeypatch.setattr(module, "CHECKS", [module.Check(*each) for each in checks])
        monkeypatch.setattr(sys, "argv", ["check_integrations.py", "--output", str(output), *arguments])
        with pytest.raises(SystemExit) as ended:
            module.main()
        return ended.value.code, json.loads(output.read_text())["checks"] if output.exists() else None

    return run


def fails(directory):
    raise AssertionError("no sparse attention ran")


def test_what_is_not_installed_is_told_and_no_failure(script, capsys):
    status, found = script(("this", None, lambda directory: "seen"), ("that", "no-such-package", fails))
    assert status == 0
    assert [(each["name"], each["result"], each["detail"]) for each in found] == [
        ("this", "passed", "seen"),
        ("that", "not installed", "pip install no-such-package"),
    ]
    printed = capsys.readouterr().out
    assert "no-such-package" in printed
    assert "passed" in printed


def test_a_failure_is_told_and_the_others_run(script):
    status, found = script(("this", "torch", fails), ("that", None, lambda directory: "seen"))
    assert status == 1
    assert [each["result"] for each in found] == ["failed", "passed"]
    assert found[0]["detail"] == "AssertionError: no sparse attention ran"


def test_some_checks(script, capsys):
    checks = [("TRL SFT", None, lambda directory: "seen"), ("peft", None, fails)]
    status, found = script(*checks, arguments=["--only", "TRL"])
    assert status == 0
    assert [each["name"] for each in found] == ["TRL SFT"]
    assert script(*checks, arguments=["--only", "vLLM"])[0] == 2
    assert "argument --only: no check has such a word; there are TRL SFT; peft" in capsys.readouterr().err


def test_dense_attention_is_found_out(tmp_path):
    tiny = script_module("tiny_sparse_model")
    tiny.save_tiny_model(tmp_path)
    for name, config in (("sdpa", {}), ("sparse", {"dense_below": 1000})):
        model = tiny.load(tmp_path, name)
        model.config.sparse_attention |= config
        with pytest.raises(AssertionError, match="no sparse attention ran"), tiny.sparse_forwards(model, []):
            tiny.logits(model)
        with pytest.raises(AssertionError, match="the result is that of dense attention"):
            tiny.assert_other(tiny.logits(model), tiny.logits(tiny.load(tmp_path, "sdpa")))


@pytest.mark.nightly
def test_what_is_installed_works(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPTS / "check_integrations.py"), "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = {each["name"]: each["result"] for each in json.loads(output.read_text())["checks"]}
    assert {name for name, result in found.items() if result == "passed"} >= ALWAYS_INSTALLED
    assert "failed" not in found.values()
