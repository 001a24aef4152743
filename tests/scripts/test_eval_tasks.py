import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from hf_sparse_attn.cli.eval_tasks import LM_EVAL_PATH, worst_task
from hf_sparse_attn.evaluation.tasks import TASKS

SCRIPT = "eval_tasks.py"
LENGTH = 2500


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"line {number} of the text." for number in range(500)))
    return path


@pytest.fixture
def arguments(tiny_model_path, dataset, tmp_path):
    return {
        "--model": [tiny_model_path],
        "--dataset": [dataset],
        "--tasks": ["niah_single", "qa1"],
        "--context-lengths": [LENGTH],
        "--num-samples": [2],
        "--output": [tmp_path / "result.json"],
        "--picture": [tmp_path / "tasks.png"],
    }


def flat(arguments):
    return [part for name, values in arguments.items() for part in (name, *values)]


def test_writes_the_report_and_the_picture_and_names_the_worst_task(run_script, arguments):
    finished = run_script(SCRIPT, *flat(arguments), "--sparse-attention", '{"window_size": 4}')
    assert finished.status == 0, finished.stderr
    result = json.loads(arguments["--output"][0].read_text())
    assert set(result["results"]) == {f"{task} {LENGTH} {i}" for task in ("niah_single", "qa1") for i in range(2)}
    assert result["sparse_attention"]["window_size"] == 4
    summary = result["summary"]
    assert [(cell["task"], cell["samples"]) for cell in summary["cells"]] == [("niah_single", 32), ("qa1", 16)]
    assert 0 < summary["density"] < 0.1
    assert arguments["--picture"][0].read_bytes().startswith(b"\x89PNG")
    assert "Worst task: " in finished.stdout
    for name in summary["too_hard"]:  # a model of random weights can do nothing, but by luck
        assert name in finished.stdout


def test_goes_on_where_it_was_interrupted(run_script, arguments):
    """What is in the file is kept; with other options it is not."""
    output = arguments["--output"][0]
    del arguments["--picture"]
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    whole = json.loads(output.read_text())
    left = json.loads(output.read_text())
    del left["results"][f"qa1 {LENGTH} 1"]
    left["results"][f"qa1 {LENGTH} 0"]["attended"] = 1234
    output.write_text(json.dumps(left))
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    found = json.loads(output.read_text())["results"]
    assert found[f"qa1 {LENGTH} 0"]["attended"] == 1234
    again, before = (results[f"qa1 {LENGTH} 1"]["questions"] for results in (found, whole["results"]))
    assert [q["sparse"]["margin"] for q in again] == pytest.approx([q["sparse"]["margin"] for q in before])
    more = arguments | {"--num-samples": [3], "--tasks": ["qa1"]}
    assert run_script(SCRIPT, *flat(more)).status == 0
    found = json.loads(output.read_text())
    assert set(found["results"]) == {*whole["results"], f"qa1 {LENGTH} 2"}
    assert found["results"][f"qa1 {LENGTH} 0"]["attended"] == 1234
    assert [(cell["task"], cell["prompts"]) for cell in found["summary"]["cells"]] == [("qa1", 3)]
    fields = ["--sparse-attention", '{"window_size": 9}']
    for options in (["--seed", 1], fields):
        found["results"][f"qa1 {LENGTH} 0"]["attended"] = 1234
        output.write_text(json.dumps(found))
        assert run_script(SCRIPT, *flat(arguments), *options).status == 0
        assert json.loads(output.read_text())["results"][f"qa1 {LENGTH} 0"]["attended"] != 1234
    output.write_text(json.dumps(whole | {"sparse_attention": {}}))  # the model was converted anew
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    assert json.loads(output.read_text())["sparse_attention"] == whole["sparse_attention"]
    output.write_text("[1, 2]")
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    assert run_script(SCRIPT, *flat(arguments | {"--seed": [1]})).status == 0
    assert json.loads(output.read_text())["results"][f"qa1 {LENGTH} 0"]["attended"] != 1234


@pytest.mark.parametrize(("dtype", "told"), [("float32", "own"), ("float64", "sdpa")])
def test_the_dense_side_by_loops(run_script, arguments, dtype, told):
    """The same answers; where there are no loops, a warning and SDPA."""
    pytest.importorskip("numba")
    del arguments["--picture"]
    arguments |= {"--tasks": ["qa1"], "--num-samples": [1], "--dtype": [dtype]}
    found = []
    for options in ([], ["--fast-dense"]):
        finished = run_script(SCRIPT, *flat(arguments), *options)
        assert finished.status == 0, finished.stderr
        found.append(json.loads(arguments["--output"][0].read_text()))
        assert ("--fast-dense has no effect" in finished.stderr) == bool(options and dtype == "float64")
    assert [result["dense_attention"] for result in found] == ["sdpa", told]
    margins = [[q["dense"]["margin"] for q in r["results"][f"qa1 {LENGTH} 0"]["questions"]] for r in found]
    assert margins[0] == pytest.approx(margins[1], abs=1e-3)
    assert all(result["results"][f"qa1 {LENGTH} 0"]["attended"] for result in found)


def test_the_line_of_the_worst_task():
    worst = {"task": "qa1", "context_length": 8192, "simultaneous_ci95": [-0.03, 0.01], "of": 9}
    worst["difference"] = {"accuracy": -0.0075, "ci95": [-0.02, 0.005]}
    assert worst_task(worst) == (
        "Worst task: qa1 at 8192 tokens, -0.75 points, 95% interval -2.00 .. +0.50 (-3.00 .. +1.00 for all 9 at once)"
    )
    assert "none" in worst_task(None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": ["./missing"]}, ["--model", "'./missing'", "no such directory"]),
        ({"--dataset": ["missing.txt"]}, ["--dataset", "missing.txt"]),
        ({"--tasks": ["niah"]}, ["--tasks", "'niah'"]),
        ({"--context-lengths": [LENGTH, 300]}, ["--context-lengths 300 of niah_single", "too short for"]),
        ({"--context-lengths": [100_000]}, ["--context-lengths 100000", "more than its documents have"]),
        (
            {"--context-lengths": [2060], "--sparse-attention": ['{"dense_below": 2048}']},
            ["--context-lengths 2060 of niah_single", "must be at least", "dense_below=2048"],
        ),
        ({"--num-samples": [0]}, ["--num-samples", "'0'"]),
        ({"--sparse-attention": ['{"windw_size": 4}']}, ["--sparse-attention", "windw_size"]),
        ({"--device": ["gpu"]}, ["--device", "'gpu'"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, tmp_path, changes, words):
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_path_for_lm_eval_holds_a_file_for_each_task(run_script):
    finished = run_script(SCRIPT, "--print-lm-eval-path")
    assert finished.status == 0
    assert Path(finished.stdout.strip()) == LM_EVAL_PATH
    files = {path.stem: path.read_text() for path in LM_EVAL_PATH.glob("*.yaml")}
    assert set(files) == {"hfsa", *(f"hfsa_{task}" for task in TASKS)}
    for task in TASKS:
        assert f"task: hfsa_{task}\n" in files[f"hfsa_{task}"]
        assert f"task_name: {task}\n" in files[f"hfsa_{task}"]
        assert f"  - hfsa_{task}\n" in files["hfsa"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
@pytest.mark.parametrize("implementation", ["sdpa", "sparse"])
def test_lm_evaluation_harness_gives_the_same_answers(
    run_script, arguments, tiny_model_path, tiny_tokenizer, tmp_path, implementation
):
    """Each question of the same samples: margin, whether it is right, and whether greedy decoding gives it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks, shared = (
        ["niah_single", "niah_multivalue", "qa1"],
        {"num_samples": 1, "dataset": str(arguments["--dataset"][0])},
    )
    model = str(shutil.copytree(tiny_model_path, tmp_path / "model"))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(200)  # the harness needs one
    tokenizer.save_pretrained(model)
    del arguments["--picture"]
    arguments["--model"] = [model]
    arguments |= {"--tasks": tasks, "--num-samples": [1], "--dtype": ["float64"]}
    assert run_script(SCRIPT, *flat(arguments)).status == 0
    ours = json.loads(arguments["--output"][0].read_text())["results"]
    settings = {"pretrained": model, "context_length": LENGTH, **shared}
    manager = TaskManager(include_path=str(LM_EVAL_PATH), metadata=settings)
    evaluated = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": model,
            "attn_implementation": implementation,
            "dtype": "float64",
            "max_length": LENGTH + 1,
        },
        tasks=[f"hfsa_{task}" for task in tasks],
        task_manager=manager,
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    side = "dense" if implementation == "sdpa" else "sparse"
    for task in tasks:
        theirs = sorted(evaluated["samples"][f"hfsa_{task}"], key=lambda sample: sample["doc_id"])
        questions = [question[side] for question in ours[f"{task} {LENGTH} 0"]["questions"]]
        assert [sample["margin"] for sample in theirs] == pytest.approx([q["margin"] for q in questions], abs=1e-4)
        assert [bool(sample["acc"]) for sample in theirs] == [question["right"] for question in questions]
        assert [bool(sample["generated"]) for sample in theirs] == [question["generated"] for question in questions]
