"""The comparison with SDPA notices what it is there to notice; no test of Transformers itself is run here."""

import copy

import pytest
import run
from replacement import BROKEN, EVERYTHING

PASSED = {"outcome": "passed", "attention_calls": 2, "output_attentions": False}
SDPA = {
    "A::test_attention": PASSED,
    "A::test_config": {**PASSED, "attention_calls": 0},
    "A::test_gpu": {**PASSED, "outcome": "skipped", "attention_calls": 0},
    "A::test_broken_upstream": {**PASSED, "outcome": "failed"},
}
FAILED = {**PASSED, "outcome": "failed", "reason": "not close"}


def compared(**changed):
    """The result where `changed` tells what the tests of one run became; the others end as with SDPA."""

    def outcomes(title, attention, broken=None, tests=()):
        fails = {"A::test_attention": FAILED} if broken else {}
        tests = {**copy.deepcopy(SDPA), **fails, **changed.get(broken or attention, {})}
        return {"versions": {"torch": "1", "transformers": "2"}, "tests": tests}

    return run.compare(outcomes)


def test_no_difference(capsys):
    result = compared()
    assert run.report(result) == 0
    assert result["sdpa"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert set(result["sparse"]) == set(EVERYTHING)
    assert result["broken"] == {name: {"noticed_by": 1} for name in BROKEN}
    assert "NOT NOTICED" not in capsys.readouterr().out


@pytest.mark.parametrize("coverage", EVERYTHING)
@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("A::test_attention", FAILED),
        ("A::test_attention", {**PASSED, "outcome": "skipped"}),
        ("A::test_attention", {**PASSED, "attention_calls": 0}),
        ("A::test_config", FAILED),
    ],
    ids=["failed", "skipped", "attention not called", "failed without attention"],
)
def test_worse_than_sdpa(coverage, name, outcome, capsys):
    result = compared(**{coverage: {name: outcome}})
    assert [test["test"] for test in result["sparse"][coverage]["differences"]] == [name]
    assert run.report(result) == 1
    assert f"sparse, {coverage}: {name} {outcome['outcome']}" in capsys.readouterr().out


def test_missing():
    assert [test["outcome"] for test in run.differences(SDPA, {})] == ["missing", "missing"]


@pytest.mark.parametrize("broken", BROKEN)
def test_not_noticed(broken, capsys):
    assert run.report(compared(**{broken: SDPA})) == 1
    assert capsys.readouterr().out.count("NOT NOTICED") == 1


@pytest.mark.parametrize(
    "arguments", [["--outptu", "f"], ["--output", "nowhere/f"], ["--cache", __file__]], ids=["typo", "output", "cache"]
)
def test_bad_arguments(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run.parse_arguments()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("test_upstream.sh: error: ")
    assert error.count("\n") == 1
