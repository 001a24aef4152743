import json

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model
from helpers.specification import TOLERANCE

from hf_sparse_attn import SparseCache
from hf_sparse_attn.cache.policies import AdaptiveBudget, HeavyHitters
from hf_sparse_attn.evaluation.cache_policies import (
    PEAK_OVER_BUDGET,
    budget_tokens,
    cached_nll,
    compare_policies,
    make_cache,
)
from hf_sparse_attn.evaluation.perplexity import token_nll

SCRIPT = "eval_cache_policies.py"
LENGTH = 700
POLICIES = ["streaming_llm", "h2o", "key_norm", "recent_heavy_adaptive"]


@pytest.fixture
def arguments(tiny_model_path, tmp_path):
    directory = tmp_path / "long"
    directory.mkdir()
    for index in range(2):
        (directory / f"{index}.txt").write_text(" ".join(f"document {index} says {number}." for number in range(60)))
    return {
        "--model": [tiny_model_path],
        "--dataset": [directory],
        "--context-length": [300],
        "--chunk-size": [16],
        "--sparse-attention": ['{"dense_below": 200}'],
        "--policies": POLICIES,
        "--needle-context-lengths": [LENGTH],
        "--depths": [0, 1],
        "--needles-per-depth": [1],
        "--output": [tmp_path / "result.json"],
    }


def flat(arguments):
    return [part for name, values in arguments.items() for part in (name, *values)]


def test_writes_the_report_and_prints_the_table(run_script, arguments):
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 0, finished.stderr
    result = json.loads(arguments["--output"][0].read_text())
    assert [row["name"] for row in result["rows"]] == ["dense", "sparse", *POLICIES]
    assert result["documents"] == ["0.txt", "1.txt"]
    assert result["full_bytes"] == 2 * 2 * 300 * 2 * 8 * 4
    assert (result["context_length"], result["chunk_size"], result["share"]) == (300, 16, 0.25)
    dense, sparse, *policies = result["rows"]
    assert dense["peak_share"] == dense["ratio_to_dense"] == sparse["ratio_to_sparse"] == 1
    assert sparse["peak_share"] > 1
    for row in policies:
        assert 0.2 < row["peak_share"] <= 0.25 * PEAK_OVER_BUDGET
        assert row["peak_bytes"] <= 0.25 * PEAK_OVER_BUDGET * result["full_bytes"]
        assert row["ratio_to_dense"] == pytest.approx(row["perplexity"] / dense["perplexity"])
        assert row["ratio_to_sparse"] == pytest.approx(row["perplexity"] / sparse["perplexity"])
        assert row["needle"]["samples"] == 2
        assert [(c["context_length"], c["depth"], c["samples"]) for c in row["needle"]["cells"]] == [
            (LENGTH, 0, 1),
            (LENGTH, 1, 1),
        ]
        assert row["name"] in finished.stdout
    assert len({row["perplexity"] for row in result["rows"]}) == len(result["rows"])
    assert policies[-1]["budget"] == "AdaptiveBudget"


def test_without_needles(run_script, arguments):
    del arguments["--needle-context-lengths"]
    finished = run_script(SCRIPT, *flat(arguments | {"--policies": ["h2o"], "--max-documents": [1]}))
    assert finished.status == 0, finished.stderr
    rows = json.loads(arguments["--output"][0].read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "sparse", "h2o"]
    assert all("needle" not in row for row in rows)
    assert "needles" not in finished.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": ["./missing"]}, ["--model", "'./missing'", "no such directory"]),
        ({"--dataset": ["missing.txt"]}, ["--dataset", "missing.txt"]),
        ({"--context-length": [1]}, ["--context-length", "at least 2"]),
        ({"--context-length": [100_000]}, ["--dataset", "at least 100000 tokens"]),
        ({"--policies": ["h2o", "h3o"]}, ["--policies", "'h3o' is none of streaming_llm"]),
        ({"--budget": [1.5]}, ["--budget", "'1.5'"]),
        ({"--budget": [0]}, ["--budget", "no room for chunks of 16"]),
        ({"--chunk-size": [90]}, ["--budget", "0.25 of 300 tokens", "smaller chunks"]),
        ({"--budget": [0.066]}, ["--budget", "at least 4", "Sinks(tokens=4)"]),
        ({"--chunk-size": [0]}, ["--chunk-size", "'0'"]),
        ({"--needle-context-lengths": [200]}, ["--needle-context-lengths 200", "too short"]),
        ({"--needle-context-lengths": [50_000]}, ["--dataset", "at least 50000 tokens"]),
        ({"--needles-per-depth": [40]}, ["--needles-per-depth", "at most 38 facts"]),
        ({"--depths": [2]}, ["--depths", "'2'"]),
        ({"--sparse-attention": ['{"windw_size": 4}']}, ["--sparse-attention", "windw_size"]),
        ({"--device": ["gpu"]}, ["--device", "'gpu'"]),
        ({"--dtype": ["float33"]}, ["--dtype", "'float33'"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, tmp_path, changes, words):
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_is_a_directory_is_refused(run_script, assert_refused, arguments, tmp_path):
    assert_refused(run_script(SCRIPT, *flat(arguments | {"--output": [tmp_path]})), "--output", "is a directory")


def test_losses_through_a_cache_are_those_of_one_forward():
    model, ids = tiny_model(), tokens(40)
    expected = token_nll(model, ids)
    for chunk_size in (7, 13, 40, 64):
        found = cached_nll(model, ids, SparseCache(model.config), chunk_size)
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


def test_a_policy_that_keeps_everything_is_the_sparse_cache():
    model, ids = tiny_model(), tokens(40)
    expected = cached_nll(model, ids, SparseCache(model.config), 8)
    cache = SparseCache(model.config, policy=HeavyHitters(), budget=40)
    torch.testing.assert_close(cached_nll(model, ids, cache, 8), expected, **TOLERANCE)


@pytest.mark.parametrize("length", [700, 4096, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget_tokens_are_the_share_or_what_fits(length, dtype):
    model = tiny_model(dtype=dtype)
    count = budget_tokens(model.config, dtype, 0.25, length, 64)
    key_bytes = 2 * 8 * dtype.itemsize
    held = (count + 64) * (key_bytes + 8)
    assert count <= length // 4
    assert held <= 0.27 * length * key_bytes
    assert count == length // 4 or held + key_bytes + 8 > 0.27 * length * key_bytes
    cache = make_cache(model, "recent_heavy_adaptive", count, 64)
    budget = cache.layers[0].kept.budget
    assert budget == AdaptiveBudget(count, slack=64)


def test_a_loss_that_is_not_finite_is_an_error_and_the_model_stays_sparse():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    documents = [{"name": "book", "input_ids": tokens(40)[0].tolist()}]
    with pytest.raises(ValueError, match="'book' is not finite with dense"):
        compare_policies(model, documents, [], ["h2o"], 0.5, 4)
    assert model.config._attn_implementation == "sparse"
