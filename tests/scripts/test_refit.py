"""convert.py --refit: a converted model whose weights were trained since."""

import json
import re

import pytest
from helpers.families import move_queries_and_keys
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_attn
from hf_sparse_attn.calibration import budget_allocation as allocation
from hf_sparse_attn.calibration import calibrate, prepare
from hf_sparse_attn.calibration import convert as conversion

SCRIPT = "convert.py"
FIELDS = {"window_size": 16, "num_global_tokens": 2, "dense_below": 60, "seed": 3, "page_size": 32}
FITTED = ("key_budget", "min_weight", "dense_layers", "calibrated_hash")
LENGTH = 220


@pytest.fixture(autouse=True)
def small_choices(monkeypatch):
    monkeypatch.setattr(allocation, "BUDGETS", (0, 8, 16, 32))
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-3, 1e-2))


@pytest.fixture
def convert(run_script, text_directory, tmp_path):
    """Run the script on a model; what it wrote into config.json, the card and standard output."""

    def run(model, output, *options):
        finished = run_script(
            *(SCRIPT, "--model", model, "--output", tmp_path / output, "--calibration-dataset", text_directory),
            *("--context-length", LENGTH, "--num-calibration-documents", 2, "--num-evaluation-documents", 0),
            *options,
        )
        assert finished.status == 0, finished.stderr
        config = json.loads((tmp_path / output / "config.json").read_text())["sparse_attention"]
        return config, (tmp_path / output / "README.md").read_text(), finished.stdout

    return run


def train(path, output):
    """Write a model whose queries and keys have moved."""
    model = AutoModelForCausalLM.from_pretrained(path)
    move_queries_and_keys(model)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(path).save_pretrained(output)
    return output


@pytest.fixture
def converted(convert, tiny_model_path, tmp_path):
    """Its configuration; the model itself is in "converted"."""
    return convert(tiny_model_path, "converted", "--target-density", 0.55, "--sparse-attention", json.dumps(FIELDS))[0]


@pytest.fixture
def tuned(converted, tmp_path):
    return train(tmp_path / "converted", tmp_path / "tuned")


def steps(card):
    """Predicted loss and density of each row of the card's comparison."""
    row = r"^\| (old|new) hash, (old|new) choice \| ([\d.e-]+) \| (\d\.\d{3}) \| \d+ \|$"
    return [(float(loss), float(density)) for _, _, loss, density in re.findall(row, card, re.MULTILINE)]


def test_a_trained_model_is_fitted_anew_and_keeps_the_rest(convert, converted, tuned):
    sparse, card, printed = convert(tuned, "refitted", "--refit")
    assert sparse["calibrated_hash"] != converted["calibrated_hash"]
    assert {name: value for name, value in sparse.items() if name not in FITTED} == {
        name: value for name, value in converted.items() if name not in FITTED
    }
    assert {name: sparse[name] for name in FIELDS} == FIELDS
    (old_loss, old_density), (hashed_loss, _), (loss, density) = steps(card)
    assert density <= old_density
    assert min(loss, hashed_loss) < old_loss
    for words in ("What the refit moved", "new hash, old choice", f"{old_loss:.3g}", f"{loss:.3g}", "By layer"):
        assert words in printed
    section = card.split("## What the refit moved")[1].split("##")[0]
    assert len(re.findall(r"^\| [01] \| [\d.e-]+ \| [\d.e-]+ \| [^|]+ \|$", section, re.MULTILINE)) == 2


def test_nothing_moves_in_a_model_that_was_not_trained(convert, converted, tmp_path):
    sparse, card, printed = convert(tmp_path / "converted", "refitted", "--refit")
    assert sparse == converted
    assert len(set(steps(card))) == 1
    assert "0 of 4 heads" in printed


def test_a_first_conversion_tells_of_no_refit(convert, tiny_model_path):
    fields = json.dumps(FIELDS)
    _, card, printed = convert(tiny_model_path, "converted", "--target-density", 0.55, "--sparse-attention", fields)
    assert "refit" not in card + printed


def test_given_fields_and_aims_count(convert, tuned):
    fields = json.dumps({"window_size": 12, "dense_layers": [1]})
    options = ("--sparse-attention", fields, "--dense-below", 50, "--target-density", 0.75, "--key-budget", 20)
    sparse, card, _ = convert(tuned, "refitted", "--refit", *options)
    changed = {"window_size": 12, "dense_below": 50}
    assert {name: sparse[name] for name in FIELDS} == FIELDS | changed
    assert 1 in sparse["dense_layers"]
    assert steps(card)[2][1] <= 0.75


def test_dense_layers_are_chosen_anew(convert, tiny_model_path, tmp_path):
    fields = json.dumps(FIELDS)
    dense, _, _ = convert(tiny_model_path, "dense", "--target-density", 1, "--sparse-attention", fields)
    assert dense["dense_layers"] == [0, 1]
    sparse, card, printed = convert(tmp_path / "dense", "refitted", "--refit", "--target-density", 0.4)
    assert sparse["dense_layers"] == []
    assert steps(card)[0] == (0, 1)
    assert "became sparse" in card
    assert "became sparse" in printed


def test_max_loss(convert, tuned):
    _, _, printed = convert(tuned, "refitted", "--refit", "--max-loss", 0.5)
    assert "measuring the loss at density" in printed


def test_a_hybrid_model_with_one_kv_head(convert, hybrid_path, tmp_path):
    before, _, _ = convert(hybrid_path, "converted", "--target-density", 0.6, "--sparse-attention", json.dumps(FIELDS))
    sparse, card, printed = convert(train(tmp_path / "converted", tmp_path / "tuned"), "refitted", "--refit")
    assert before["dense_layers"] == sparse["dense_layers"] == [0]
    assert [len(layer) for layer in sparse["key_budget"]] == [1, 1]
    assert "layers 0 is small and is read whole" in " ".join(card.split())
    assert "counted in no density: layers 0\n" in printed
    section = card.split("## What the refit moved")[1].split("##")[0]
    assert re.findall(r"^\| (\d) \| \d", section, re.MULTILINE) == ["1"]


def test_from_python(converted, tuned, text_directory, tmp_path):
    result = hf_sparse_attn.convert(
        str(tuned),
        tmp_path / "refitted",
        calibration_dataset=str(text_directory),
        num_calibration_documents=2,
        context_length=LENGTH,
        num_evaluation_documents=0,
        refit=True,
    )
    assert result["refit"].new.loss == result["predicted_loss"]
    assert result["density"] <= result["refit"].old.density
    assert [layer.layer for layer in result["refit"].layers] == [0, 1]


def test_a_model_that_was_not_converted_is_refused(
    run_script, assert_refused, monkeypatch, tiny_model_path, text_directory, tmp_path
):
    monkeypatch.setattr(prepare, "load_model", None)  # before it is loaded
    arguments = ("--model", tiny_model_path, "--output", tmp_path / "refitted", "--calibration-dataset", text_directory)
    finished = run_script(SCRIPT, *arguments, "--refit")
    assert_refused(finished, f"--model {tiny_model_path}", "it was not converted", "leave out --refit")
    assert not (tmp_path / "refitted").exists()


@pytest.mark.parametrize("field", ['"key_budget": 8', '"hash": "random"', '"min_weight": 0.1'])
def test_fields_that_are_fitted_are_refused(run_script, assert_refused, tuned, tmp_path, field):
    finished = run_script(
        *(SCRIPT, "--model", tuned, "--output", tmp_path / "refitted", "--refit"),
        *("--sparse-attention", f"{{{field}}}"),
    )
    told = ["or a min_weight of 0"] if "min_weight" in field else []
    assert_refused(finished, "--sparse-attention", "is what the conversion fits", *told)


def test_an_interrupted_refit_goes_on(convert, run_script, tuned, text_directory, tmp_path, monkeypatch):
    whole, _, _ = convert(tuned, "whole", "--refit")
    original, calls = calibrate._document_costs, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 4:  # the second document with the old hash
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_document_costs", fail)
        with pytest.raises(AssertionError, match="the same command goes on from there"):
            convert(tuned, "refitted", "--refit")
    (left,) = tmp_path.glob(".refitted.calibration-*")
    assert {file.stem for file in left.iterdir()} >= {"costs-0", "costs-1", "old-costs-0"}
    monkeypatch.setattr(calibrate, "_document_costs", lambda *args: calls.append(args) or original(*args))
    sparse, _, _ = convert(tuned, "refitted", "--refit")
    assert sparse == whole
    assert len(calls) == 5
    assert not [*tmp_path.glob(".refitted*")]


def test_a_conversion_does_not_go_on_from_a_refit(convert, tuned, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_choose", None)
        with pytest.raises(TypeError):
            convert(tuned, "refitted", "--refit")
    (left,) = tmp_path.glob(".refitted.calibration-*")
    convert(tuned, "refitted", "--sparse-attention", json.dumps(FIELDS), "--target-density", 0.55)
    assert left.exists()
