import json
import subprocess
import sys

import pytest
from helpers.paths import SCRIPTS

SCRIPT = "eval_perplexity.py"


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return {
        "--model": tiny_model_path,
        "--dataset": text_directory,
        "--context-length": 128,
        "--output": tmp_path / "result.json",
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def test_writes_the_report_and_prints_the_table(run_script, arguments, text_directory):
    finished = run_script(SCRIPT, *flat(arguments), "--max-documents", 2, "--sparse-attention", '{"window_size": 4}')
    assert finished.status == 0, finished.stderr
    result = json.loads(arguments["--output"].read_text())
    assert result["context_length"] == 128
    assert result["tokens"] == 2 * 127
    assert set(result["dense"]) == {"perplexity", "nll", "seconds"}
    assert set(result["sparse"]) == {"perplexity", "nll", "seconds", "density", "scored_density"}
    assert 0 < result["sparse"]["density"] < 0.1
    assert result["sparse_attention"]["window_size"] == 4
    assert [document["name"] for document in result["documents"]] == ["0.txt", "1.txt"]
    kl = result["kl"]
    assert 0 < kl["median"] < kl["p99"] < kl["p99.9"]
    worst = result["worst_tokens"][0]
    text = (text_directory / worst["document"]).read_text()
    assert len(result["worst_tokens"]) == 10
    assert text[: worst["position"]].endswith(worst["before"])  # a token a byte
    assert worst["token"] == text[worst["position"]]
    for shown in (
        f"{result['perplexity_ratio']:.4f}",
        f"{result['sparse']['density']:.4f}",
        *(f"{figure:.3g}" for figure in kl.values()),
        f"{result['top1_agreement']:.4f}",
        f"{worst['dense_logprob']:.2f}",
        f"{worst['sparse_logprob']:.2f}",
    ):
        assert shown in finished.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "./missing"}, ["--model", "'./missing'", "no such directory"]),
        ({"--model": "no-such-org/no-such-model"}, ["--model", "no-such-org/no-such-model"]),
        ({"--dataset": "missing.txt"}, ["--dataset", "missing.txt"]),
        ({"--context-length": 100_000}, ["--dataset", "at least 100000 tokens", "longest"]),
        ({"--context-length": 1}, ["--context-length", "at least 2"]),
        ({"--context-length": "many"}, ["--context-length", "'many'"]),
        ({"--max-documents": 0}, ["--max-documents", "'0'"]),
        ({"--sparse-attention": "{"}, ["--sparse-attention", "not valid JSON"]),
        ({"--sparse-attention": '{"windw_size": 4}'}, ["--sparse-attention", "windw_size"]),
        ({"--sparse-attention": '{"window_size": 0}'}, ["--sparse-attention", "window_size"]),
        ({"--device": "gpu"}, ["--device", "'gpu'"]),
        ({"--dtype": "float33"}, ["--dtype", "'float33'"]),
        ({"--no-such-option": 1}, ["--no-such-option"]),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, tmp_path, changes, words):
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_is_a_directory_is_refused(run_script, assert_refused, arguments, tmp_path):
    assert_refused(run_script(SCRIPT, *flat(arguments | {"--output": tmp_path})), "--output", "is a directory")


def test_missing_arguments_end_a_real_process_with_status_2():
    finished = subprocess.run([sys.executable, SCRIPTS / SCRIPT], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.splitlines() == [
        f"{SCRIPT}: error: the following arguments are required: --model, --dataset, --context-length"
    ]


@pytest.mark.real_weights
def test_real_model_on_its_own_documents(run_script, tmp_path):
    """Dense SmolLM2 predicts English and Python well; a sparse run that broke it would show here first."""
    output = tmp_path / "result.json"
    finished = run_script(
        SCRIPT,
        "--model",
        "demo",
        "--dataset",
        "demo",
        "--context-length",
        2048,
        "--max-documents",
        2,
        "--sparse-attention",
        '{"dense_below": 1024}',
        "--output",
        output,
    )
    assert finished.status == 0, finished.stderr
    result = json.loads(output.read_text())
    assert 2 < result["dense"]["perplexity"] < 30
    assert 0.99 < result["perplexity_ratio"] < 1.05
    assert result["sparse"]["density"] < 1
