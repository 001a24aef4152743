import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_attn  # noqa: F401

SCRIPT = "convert.py"
FIELDS = {"window_size": 16, "num_global_tokens": 2, "dense_below": 32}


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return {
        "--model": tiny_model_path,
        "--calibration-dataset": text_directory,
        "--context-length": 200,
        "--num-calibration-documents": 2,
        "--key-budget": 64,
        "--sparse-attention": json.dumps(FIELDS),
        "--output": tmp_path / "converted",
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def logits(path, input_ids):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse", dtype=torch.float64)
    with torch.no_grad():
        return model, model(input_ids).logits


def test_writes_a_checkpoint_that_stock_code_carries_on(run_script, arguments, tmp_path):
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 0, finished.stderr
    output = arguments["--output"]
    input_ids = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))
    model, first = logits(output, input_ids)
    sparse = model.config.sparse_attention
    assert sparse["hash"] == "calibrated"
    assert {name: sparse[name] for name in FIELDS} == FIELDS
    assert [len(layer) for layer in sparse["key_budget"]] == [4, 4]
    AutoTokenizer.from_pretrained(output)
    card = (output / "README.md").read_text()
    assert "Perplexity ratio" in card
    assert "0.txt, 1.txt" in card
    assert "2.txt" in card.split("How it was made")[0]  # evaluated on the document that calibrated nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "documents"]

    # Saved again without a forward in between, by a model that was loaded dense.
    AutoModelForCausalLM.from_pretrained(output).save_pretrained(tmp_path / "copy")
    copied, second = logits(tmp_path / "copy", input_ids)
    assert copied.config.sparse_attention == sparse
    assert torch.equal(first, second)


def test_damaged_hash_is_one_clear_line(run_script, assert_refused, arguments, text_directory, tmp_path):
    assert run_script(SCRIPT, *flat(arguments), "--num-evaluation-documents", 0).status == 0
    path = arguments["--output"] / "config.json"
    config = json.loads(path.read_text())
    config["sparse_attention"]["calibrated_hash"] = config["sparse_attention"]["calibrated_hash"][:1000]
    path.write_text(json.dumps(config))
    finished = run_script(
        "eval_perplexity.py", "--model", arguments["--output"], "--dataset", text_directory, "--context-length", 128
    )
    assert_refused(finished, "--model", "calibrated_hash is damaged")


def test_without_evaluation_the_card_says_so(run_script, arguments):
    finished = run_script(SCRIPT, *flat(arguments), "--num-evaluation-documents", 0)
    assert finished.status == 0, finished.stderr
    assert "Not measured" in (arguments["--output"] / "README.md").read_text()


def test_dense_below_auto_writes_a_number(run_script, arguments, monkeypatch):
    from hf_sparse_attn.evaluation import speed

    monkeypatch.setattr(speed, "measure_dense_below", lambda *_: 40)
    finished = run_script(SCRIPT, *flat(arguments), "--dense-below", "auto", "--num-evaluation-documents", 0)
    assert finished.status == 0, finished.stderr
    config = json.loads((arguments["--output"] / "config.json").read_text())
    assert config["sparse_attention"]["dense_below"] == 40


def test_a_failure_leaves_nothing_behind(run_script, arguments, monkeypatch, tmp_path):
    from hf_sparse_attn import model_card

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_card, "write_model_card", interrupt)
    assert run_script(SCRIPT, *flat(arguments), "--num-evaluation-documents", 0).status == 130
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "./missing"}, ["--model", "no such directory"]),
        ({"--calibration-dataset": "missing.txt"}, ["--calibration-dataset", "missing.txt"]),
        ({"--context-length": 100_000}, ["--calibration-dataset", "at least 100000 tokens"]),
        ({"--context-length": 90}, ["--context-length", "at least 160"]),
        ({"--key-budget": 0}, ["--key-budget", "'0'"]),
        ({"--sparse-attention": '{"key_budget": 4}'}, ["--sparse-attention", "--key-budget"]),
        ({"--sparse-attention": '{"windw_size": 4}'}, ["--sparse-attention", "windw_size"]),
        ({"--dense-below": "soon"}, ["--dense-below", "soon"]),
        ({"--num-evaluation-documents": -1}, ["--num-evaluation-documents", "-1"]),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, tmp_path, changes, words):
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_output_is_refused(run_script, assert_refused, arguments):
    arguments["--output"].mkdir()
    (arguments["--output"] / "precious").write_text("kept")
    assert_refused(run_script(SCRIPT, *flat(arguments)), "--output", "already holds something")
    assert (arguments["--output"] / "precious").read_text() == "kept"
