"""Conversion, evaluation and training with `global_token_ids`, and what refuses them before a model is loaded."""

import json

import pytest
from transformers import AutoTokenizer

from hf_sparse_attn.calibration import budget_allocation as allocation

FIELDS = {"window_size": 16, "num_global_tokens": 2, "dense_below": 32}


@pytest.fixture
def fields(tiny_model_path):
    """With a token that stands all over the documents."""
    ids = sorted(set(AutoTokenizer.from_pretrained(tiny_model_path)("The of a")["input_ids"]))
    return FIELDS | {"global_token_ids": ids}


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def test_convert_evaluate_and_train(run_script, tiny_model_path, text_directory, tmp_path, fields, monkeypatch):
    monkeypatch.setattr(allocation, "BUDGETS", (0, 8, 16, 32))
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-2))
    converted, tuned, written = tmp_path / "converted", tmp_path / "tuned", tmp_path / "perplexity.json"
    steps = {
        "convert.py": {
            "--model": tiny_model_path,
            "--calibration-dataset": text_directory,
            "--context-length": 200,
            "--num-calibration-documents": 2,
            "--target-density": 0.6,
            "--key-budget": 64,
            "--sparse-attention": json.dumps(fields),
            "--num-evaluation-documents": 0,
            "--output": converted,
        },
        "finetune.py": {
            "--model": converted,
            "--dataset": text_directory,
            "--context-length": 48,
            "--output": tuned,
            "--max-steps": 2,
            "--use_cpu": "true",
            "--gradient-checkpointing": "true",
            "--disable-tqdm": "true",
        },
        "eval_perplexity.py": {
            "--model": tuned,
            "--dataset": text_directory,
            "--context-length": 200,
            "--max-documents": 1,
            "--output": written,
        },
    }
    for script, arguments in steps.items():
        finished = run_script(script, *flat(arguments))
        assert finished.status == 0, finished.stderr
    config = json.loads((tuned / "config.json").read_text())["sparse_attention"]
    assert config["global_token_ids"] == fields["global_token_ids"]
    assert 0 < json.loads(written.read_text())["sparse"]["density"] < 1


@pytest.mark.parametrize(
    ("script", "changes", "words"),
    [
        ("eval_perplexity.py", {"global_token_ids": [10**6]}, "global_token_ids must be below the model's vocab_size"),
        ("eval_perplexity.py", {"global_token_ids": [4, 4]}, "global_token_ids must not name a token twice, got 4"),
        ("eval_cache_policies.py", {}, "a policy cannot go with global_token_ids"),
        ("benchmark.py", {}, "name positions by global_token_indices"),
    ],
)
def test_refused_before_a_model_is_loaded(
    run_script, assert_refused, tiny_model_path, text_directory, fields, monkeypatch, script, changes, words
):
    monkeypatch.setattr("hf_sparse_attn.loading.load_sparse_model", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"--model": tiny_model_path, "--sparse-attention": json.dumps(fields | changes)}
    if script == "benchmark.py":
        given["--seq-lens"] = 64
    else:
        given |= {"--dataset": text_directory, "--context-length": 100}
    assert_refused(run_script(script, *flat(given)), "--sparse-attention", words)


def test_ulysses(run_script, assert_refused, tiny_model_path, text_directory, fields, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_sparse_attn.cli.finetune.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # as `accelerate launch` tells it
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    given = {
        "--model": tiny_model_path,
        "--dataset": text_directory,
        "--context-length": 48,
        "--output": tmp_path / "tuned",
        "--use_cpu": "true",
        "--sparse-attention": json.dumps(fields),
    }
    words = "--parallelism-config: sp_size=2 (Ulysses) cannot go with global_token_ids"
    assert_refused(run_script("finetune.py", *flat(given)), words)
