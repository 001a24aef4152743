"""Every preset at the same density on one model."""

import json
import math

import pytest
from matplotlib.figure import Figure

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.calibration import budget_allocation as allocation
from hf_sparse_attn.calibration import convert as conversion
from hf_sparse_attn.cli import compare_patterns
from hf_sparse_attn.errors import RunError
from hf_sparse_attn.evaluation import pattern_comparison
from hf_sparse_attn.evaluation.pattern_comparison import (
    BLOCK_VOTES,
    CHOOSERS,
    KNOBS,
    expected_density,
    pattern_at,
    plot_comparison,
)
from hf_sparse_attn.presets import PRESETS

SCRIPT = "compare_patterns.py"


@pytest.fixture
def arguments(tiny_model_path, tmp_path):
    directory = tmp_path / "long"
    directory.mkdir()
    for index in range(2):
        (directory / f"{index}.txt").write_text(" ".join(f"document {index} says {number}." for number in range(250)))
    return {
        "--model": [tiny_model_path],
        "--dataset": [directory],
        "--context-lengths": [900],
        "--densities": [0.5],
        "--patterns": ["streaming-llm", "minference-like"],
        "--tasks": ["qa1"],
        "--num-rows": [8],
        "--output": [tmp_path / "result.json"],
        "--picture": [tmp_path / "picture.png"],
    }


def flat(arguments):
    return [part for name, values in arguments.items() for part in (name, *values)]


def test_every_preset_has_a_number_that_sets_its_density():
    assert set(KNOBS) == {*PRESETS, BLOCK_VOTES, *CHOOSERS}
    assert set(compare_patterns.NAMES) == {"converted", *KNOBS}


@pytest.mark.parametrize("name", KNOBS)
def test_patterns_have_the_density_that_is_asked_for(name):
    """The largest number of at most that density."""
    config = pattern_at(name, 0.5, 1200, 2)
    preset, (fields, _, most) = "minference-like" if name == BLOCK_VOTES else name, KNOBS[name]
    preset = "ssa" if name in CHOOSERS else preset
    number = getattr(config, next(iter(fields(0)))) - (name == "sparse-transformer-strided")
    assert config == SparseAttentionConfig.preset(preset, **fields(number))
    choose = CHOOSERS.get(name)
    assert 0.38 < expected_density(config, 1200, 2, choose) <= 0.5
    if number != most:
        assert expected_density(SparseAttentionConfig.preset(preset, **fields(number + 1)), 1200, 2, choose) > 0.5


def test_expected_density_is_the_share_of_pairs():
    config = SparseAttentionConfig.preset("streaming-llm", window_size=10)
    pairs = sum(min(p + 1, 10) + max(min(p - 9, 4), 0) for p in range(100))
    assert expected_density(config, 100, 1) == pairs / 5050


def test_writes_the_report_the_table_and_the_picture(run_script, arguments, monkeypatch):
    monkeypatch.setattr(allocation, "BUDGETS", (0, 16, 64, 256))
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-2))
    arguments["--patterns"] = ["converted", "streaming-llm", "minference-like", "ssa-votes", "oracle", "ssa"]
    arguments["--calibration-dataset"] = arguments["--dataset"]
    arguments["--sparse-attention"] = ['{"window_size": 16, "num_global_tokens": 2, "dense_below": 32}']
    arguments["--densities"] = [0.6]
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 0, finished.stderr
    result = json.loads(arguments["--output"][0].read_text())
    results = result["results"]["900"]
    assert set(results) == {"dense", *(f"{name} 0.6" for name in arguments["--patterns"])}
    assert result["documents"] == {"900": ["0.txt", "1.txt"]}
    assert {name for name, found in results.items() if found.get("is_causal") is False} == {
        "minference-like 0.6",
        "ssa-votes 0.6",
    }
    dense = results.pop("dense")
    assert len(dense["nll"]) == 2
    assert results["ssa 0.6"]["density"] == pytest.approx(results["oracle 0.6"]["density"], abs=1e-4)
    assert results["ssa 0.6"]["kept_mass"] < results["oracle 0.6"]["kept_mass"]
    assert results["oracle 0.6"]["seconds"] is None
    assert results.keys() == {
        name for name, found in results.items() if found["density"] == pytest.approx(0.6, abs=0.15)
    }
    for found in results.values():
        assert found["density"] < found["kept_mass"] < 1
        assert found["ratio"] == pytest.approx(math.exp((sum(found["nll"]) - sum(dense["nll"])) / 2))
        assert 0 < found["kl"]["median"] < found["kl"]["p99"]
        assert 0.2 < found["top1_agreement"] <= 1
        (cell,) = found["tasks"]["cells"]
        assert (cell["task"], cell["samples"], cell["context_length"]) == ("qa1", 8, 900)
        assert 0.2 < found["tasks"]["density"] < 0.9
        assert min(found["seconds"] or 1, found["dense_seconds"]) > 0
    assert finished.stdout.count("(not") == 2  # the table marks what looks at later tokens
    assert arguments["--picture"][0].stat().st_size > 5000


def test_goes_on_where_it_was_interrupted(run_script, arguments):
    """What is in the file is kept; with other options it is not."""
    output = arguments["--output"][0]
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    whole = json.loads(output.read_text())
    left = json.loads(output.read_text())
    assert list(whole) == ["settings", "results", "documents", "environment", "command"]
    del left["results"]["900"]["minference-like 0.5"]
    left["results"]["900"]["streaming-llm 0.5"]["density"] = 0.123
    output.write_text(json.dumps(left))
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    found = json.loads(output.read_text())["results"]["900"]
    assert found["streaming-llm 0.5"]["density"] == 0.123
    assert found["minference-like 0.5"]["nll"] == pytest.approx(whole["results"]["900"]["minference-like 0.5"]["nll"])
    assert run_script(SCRIPT, *flat(arguments | {"--num-rows": [9]})).status == 0
    assert json.loads(output.read_text())["results"]["900"]["streaming-llm 0.5"]["density"] != 0.123


def test_a_pattern_that_the_model_cannot_have(run_script, arguments, hybrid_path):
    """One KV head cannot be in two parts: by name it is refused, else left out."""
    arguments |= {"--model": [hybrid_path], "--patterns": ["longlora"]}
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 2
    assert "argument --patterns longlora: by_kv_head must list at most as many parts" in finished.stderr
    assert not arguments["--output"][0].exists()


def test_several_lengths_and_densities(run_script, arguments, monkeypatch):
    """One calibration for every length; what a pattern or a conversion cannot have is left out, with the reason."""
    monkeypatch.setattr(allocation, "BUDGETS", (0, 16, 32, 64, 128, 256))
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-3))
    calibrations = []
    measured = conversion.calibrate._gradient_moments

    def counted(model, part, seed):
        calibrations.append(len(part))
        return measured(model, part, seed)

    monkeypatch.setattr(conversion.calibrate, "_gradient_moments", counted)
    arguments |= {
        "--context-lengths": [600, 300],
        "--densities": [0.17, 0.14, 0.03],
        "--patterns": ["converted", "bigbird"],
        "--tasks": [],
        "--calibration-dataset": arguments["--dataset"],
        "--sparse-attention": ['{"window_size": 16, "num_global_tokens": 2, "dense_below": 32, "page_size": 4}'],
    }
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 0, finished.stderr
    result = json.loads(arguments["--output"][0].read_text())
    assert list(result["results"]) == ["300", "600"]
    for length in ("300", "600"):
        found = result["results"][length]
        assert {name for name in found if "converted" in name} == {"converted 0.17", "converted 0.14"}
        assert found["converted 0.14"]["density"] < found["converted 0.17"]["density"] <= 0.18
        assert found["converted 0.14"]["tasks"] is None
        assert f"converted 0.03 is left out at {length} tokens: target_density: must be at least" in finished.stdout
        assert f"bigbird 0.03 is left out at {length} tokens: it reads at least" in finished.stdout
    assert calibrations == [300, 300, 600, 600]
    assert arguments["--picture"][0].stat().st_size > 5000


def test_a_conversion_is_kept(run_script, arguments, monkeypatch):
    """Interrupted after it, nothing is converted again."""
    arguments |= {"--patterns": ["converted"], "--sparse-attention": ['{"dense_below": 32, "window_size": 16}']}
    fitted = SparseAttentionConfig(window_size=9, dense_below=0, key_budget=0).to_dict()
    calls = []

    def fit(model, settings, calibrations, **told):
        calls.append((settings.context_length, settings.target_density))
        return SparseAttentionConfig.from_dict(fitted)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "fit", fit)
    with monkeypatch.context() as patch:
        patch.setattr(pattern_comparison, "compare_patterns", interrupted)
        assert run_script(SCRIPT, *flat(arguments)).status == 130
    assert json.loads(arguments["--output"][0].read_text())["fitted"] == {"900": {"converted 0.5": fitted}}
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    assert calls == [(900, 0.5)]
    result = json.loads(arguments["--output"][0].read_text())
    assert result["results"]["900"]["converted 0.5"]["density"] < 0.1
    assert "fitted" not in result


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--densities", "1.5", "argument --densities: "),
        ("--patterns", "bert", "argument --patterns: invalid choice: 'bert'"),
        ("--context-lengths", "99999", "argument --dataset"),
        ("--sparse-attention", '{"stride": -1}', "argument --sparse-attention: stride must be"),
    ],
)
def test_bad_input(run_script, arguments, option, value, told):
    finished = run_script(SCRIPT, *flat(arguments | {option: [value]}))
    assert finished.status == 2
    assert told in finished.stderr
    assert finished.stderr.count("\n") <= 2


def test_every_point_is_in_the_picture(monkeypatch, tmp_path):
    """Panels share their axes, and the first one may have the best points."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))

    def point(density, ratio):
        return {"density": density, "ratio": ratio, "is_causal": True}

    results = {2048: {"ssa": [point(0.3, 1.0001)]}, 4096: {"ssa": [point(0.13, 1.16), point(0.3, 0.99)]}}
    plot_comparison(results, tmp_path / "picture.png")
    (figure,) = figures
    for panel in figure.axes:
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        for x, y in panel.lines[0].get_xydata():
            assert left < x < right
            assert bottom < y < top


@pytest.mark.parametrize("name", ["streaming-llm", "minference-like"])
def test_without_a_leak_test_the_pattern_says_what_it_is(run_script, arguments, monkeypatch, name):
    """Where forwards do not repeat, as on some GPUs."""

    def does_not_repeat(*_, **__):
        raise RunError("logits of the same input differ")

    monkeypatch.setattr(pattern_comparison, "find_leaks", does_not_repeat)
    del arguments["--picture"]
    finished = run_script(SCRIPT, *flat(arguments | {"--patterns": [name], "--tasks": []}))
    assert finished.status == 0, finished.stderr
    found = json.loads(arguments["--output"][0].read_text())["results"]["900"][f"{name} 0.5"]
    assert found["leak"] is None
    assert found["is_causal"] == (name == "streaming-llm")
