import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_attn
from hf_sparse_attn.calibration import budget_allocation as allocation
from hf_sparse_attn.calibration import calibrate
from hf_sparse_attn.calibration import convert as conversion

SCRIPT = "convert.py"
FIELDS = {"window_size": 16, "num_global_tokens": 2, "dense_below": 32}
LENGTH = 200


@pytest.fixture(autouse=True)
def small_choices(monkeypatch):
    monkeypatch.setattr(allocation, "BUDGETS", (0, 8, 16, 32))
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0, 1e-2))


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return {
        "--model": tiny_model_path,
        "--calibration-dataset": text_directory,
        "--context-length": LENGTH,
        "--num-calibration-documents": 2,
        "--target-density": 0.3,
        "--key-budget": 64,
        "--sparse-attention": json.dumps(FIELDS),
        "--num-evaluation-documents": 0,
        "--output": tmp_path / "converted",
    }


def flat(arguments):
    return [part for pair in arguments.items() if pair[1] is not None for part in pair]


@pytest.fixture
def convert(run_script, arguments):
    """Run the script with some arguments changed (None: left out); the configuration it wrote and the card."""

    def run(**changes):
        changes = {"--" + name.replace("_", "-"): value for name, value in changes.items()}
        finished = run_script(SCRIPT, *flat(arguments | changes))
        assert finished.status == 0, finished.stderr
        output = arguments["--output"]
        config = json.loads((output / "config.json").read_text())["sparse_attention"]
        return config, (output / "README.md").read_text(), finished.stdout

    return run


def logits(path, input_ids):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse", dtype=torch.float64)
    with torch.no_grad():
        return model, model(input_ids).logits


def density(path):
    """What the checkpoint really reads of a document."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse")
    with torch.no_grad(), hf_sparse_attn.record_density(model) as recorder:
        model(torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0)))
    return recorder.density


def trade_table(card):
    """Rows (density, rise of the loss, keys found) of the card's table, and the chosen one."""
    row = r"^\| (0\.\d{3}|1\.000)( \(chosen\))? \| (\d\.\d{5}) \|(?: [\d.]+ \|)? (\d+) \|$"
    rows = re.findall(row, card, re.MULTILINE)
    points = [(float(row[0]), float(row[2]), int(row[3])) for row in rows]
    (chosen,) = [point for point, row in zip(points, rows, strict=True) if row[1]]
    return points, chosen


def test_writes_a_checkpoint_that_stock_code_carries_on(convert, arguments, tmp_path):
    sparse, _, printed = convert(num_evaluation_documents=1)
    output = arguments["--output"]
    input_ids = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    model, first = logits(output, input_ids)
    assert model.config.sparse_attention == sparse
    assert sparse["hash"] == "calibrated"
    assert {name: sparse[name] for name in FIELDS} == FIELDS
    assert [len(layer) for layer in sparse["key_budget"]] == [2, 2]
    assert [len(layer) for layer in sparse["min_weight"]] == [4, 4]
    AutoTokenizer.from_pretrained(output)
    for picture in ("trade.png", "heads.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "documents"]
    assert "perplexity" in printed
    assert "(chosen)" in printed

    # Saved again without a forward in between, by a model that was loaded dense.
    AutoModelForCausalLM.from_pretrained(output).save_pretrained(tmp_path / "copy")
    copied, second = logits(tmp_path / "copy", input_ids)
    assert copied.config.sparse_attention == sparse
    assert torch.equal(first, second)


def test_card_tells_what_was_measured(convert):
    _, card, _ = convert(num_evaluation_documents=1)
    measured, made = card.split("How it was made")
    assert "Perplexity ratio" in measured
    assert "0.txt, 1.txt" in made
    assert "2.txt" in measured  # evaluated on the document that calibrated nothing
    assert "Worst document: 2.txt." in measured
    assert "bootstrap over 1 documents" in measured
    assert re.search(r"^\| scored / admissible pairs \| 1 \| 0\.\d{4} \|$", measured, re.MULTILINE)


def test_card_tells_what_other_densities_would_cost(convert):
    _, card, printed = convert()
    assert "](trade.png)" in card
    points, chosen = trade_table(card)
    assert len(points) == 11
    assert chosen[0] <= 0.3
    others = points[:-1]
    assert others == sorted(others)
    assert [loss for _, loss, _ in others] == sorted((loss for _, loss, _ in others), reverse=True)
    for share, loss, _ in points:
        assert f"{share:.3f}" in printed
        assert f"{loss:.5f}" in printed


def test_several_datasets_give_documents_in_turns(run_script, arguments, text_directory, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    for index in range(4):
        (others / f"other {index}.txt").write_text(" ".join(f"and {number}" for number in range(60)))
    changes = {"--num-calibration-documents": 3, "--num-evaluation-documents": 2, "--calibration-dataset": None}
    finished = run_script(SCRIPT, *flat(arguments | changes), "--calibration-dataset", text_directory, others)
    assert finished.status == 0, finished.stderr
    measured, made = (arguments["--output"] / "README.md").read_text().split("How it was made")
    assert "3 document(s): 0.txt, other 0.txt, 1.txt." in " ".join(made.split())
    assert "(2.txt, other 1.txt)" in " ".join(measured.split())


def test_fewer_documents_than_datasets_are_refused(run_script, assert_refused, arguments, text_directory, tmp_path):
    changes = {"--num-calibration-documents": 1, "--calibration-dataset": None}
    finished = run_script(SCRIPT, *flat(arguments | changes), "--calibration-dataset", text_directory, tmp_path)
    assert_refused(finished, "--num-calibration-documents", "at least 2, one of each dataset, got 1")


def test_density_of_a_hybrid_model_is_that_of_its_global_layers(convert, hybrid_path):
    sparse, card, printed = convert(model=hybrid_path, num_evaluation_documents=1)
    assert sparse["dense_layers"] == [0]
    assert "sliding window of the layers 0 is small and is read whole" in " ".join(card.split())
    assert "counted in no density: layers 0\n" in printed
    measured = float(re.search(r"density \(attended / admissible pairs\) \| 1 \| ([0-9.]+)", card)[1])
    assert 0.2 < trade_table(card)[1][0] <= 0.3
    assert 0.2 < measured < 0.5  # flat weights of a random model grow where few keys share them


def test_a_hybrid_whose_windows_are_larger_than_dense_below_is_sparse_in_all_layers(convert, hybrid_path):
    fields = json.dumps({"window_size": 8, "num_global_tokens": 2, "dense_below": 12})
    _, card, printed = convert(model=hybrid_path, sparse_attention=fields, target_density=0.4)
    assert "read whole" not in card
    assert "read whole" not in printed


def test_a_model_of_local_layers_alone_is_refused(run_script, assert_refused, arguments, hybrid_path, monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.calibration.prepare.load_model", None)  # before it is loaded
    config = json.loads((hybrid_path / "config.json").read_text())
    (hybrid_path / "config.json").write_text(json.dumps(config | {"layer_types": ["sliding_attention"] * 2}))
    finished = run_script(SCRIPT, *flat(arguments | {"--model": hybrid_path}))
    assert_refused(finished, "--model", "sliding window of at most dense_below=32 keys", "nothing to make sparse")


class TestInterrupted:
    """What was measured stays, and the same command goes on from there."""

    STEPS = ("_gradient_moments", "_read", "_fitted", "_document_costs")

    @pytest.fixture
    def interrupt(self, run_script, arguments, monkeypatch):
        """Run the script until it calls a function for the nth time; the directory with what was measured."""

        def run(module, name, number, error=KeyboardInterrupt, **changes):
            calls = []
            original = getattr(module, name)

            def fail(*args, **kwargs):
                calls.append(name)
                if len(calls) == number:
                    raise error
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(module, name, fail)
                finished = run_script(SCRIPT, *flat(arguments | changes))
            assert finished.status != 0
            (directory,) = arguments["--output"].parent.glob(".converted.calibration-*")
            assert f"what was measured is in {str(directory)!r}: the same command goes on from there" in finished.stderr
            assert not arguments["--output"].exists()
            return directory

        return run

    @pytest.fixture
    def counted(self, monkeypatch):
        """How often each step is computed."""
        counts = dict.fromkeys(self.STEPS, 0)

        def counting(name, original):
            def count(*args, **kwargs):
                counts[name] += 1
                return original(*args, **kwargs)

            return count

        for name in self.STEPS:
            monkeypatch.setattr(calibrate, name, counting(name, getattr(calibrate, name)))
        return counts

    @pytest.mark.parametrize(
        ("name", "number", "left"),
        [
            ("_gradient_moments", 2, (1, 2, 2, 2)),
            ("_read", 2, (0, 1, 2, 2)),
            ("_fitted", 2, (0, 0, 2, 2)),
            ("_document_costs", 2, (0, 0, 0, 1)),
        ],
    )
    def test_goes_on_and_gives_the_same(self, convert, interrupt, counted, arguments, name, number, left, tmp_path):
        whole, _, _ = convert()
        shutil.rmtree(arguments["--output"])
        interrupt(calibrate, name, number)
        counted.update(dict.fromkeys(self.STEPS, 0))
        sparse, _, _ = convert()
        assert sparse == whole
        assert tuple(counted.values()) == left
        assert not [*tmp_path.glob(".converted*")]

    def test_another_aim_measures_nothing_again(self, convert, interrupt, counted):
        interrupt(conversion, "_choose", 1)
        counted.update(dict.fromkeys(self.STEPS, 0))
        convert(target_density=0.4, key_budget=32)
        assert set(counted.values()) == {0}

    @pytest.mark.parametrize(
        "changes",
        [
            {"sparse_attention": json.dumps(FIELDS | {"window_size": 17})},
            {"context_length": LENGTH + 1},
            {"num_calibration_documents": 1},
        ],
        ids=str,
    )
    def test_another_calibration_begins_anew(self, convert, interrupt, counted, changes):
        directory = interrupt(conversion, "_choose", 1)
        counted.update(dict.fromkeys(self.STEPS, 0))
        convert(**changes)
        assert 0 not in counted.values()
        assert directory.exists()  # of the other one

    def test_damaged_files_are_measured_again(self, convert, interrupt, counted):
        directory = interrupt(conversion, "_choose", 1)
        for file in directory.iterdir():
            file.write_bytes(file.read_bytes()[:100])
        counted.update(dict.fromkeys(self.STEPS, 0))
        convert()
        assert 0 not in counted.values()

    def test_where_nothing_can_be_kept_the_conversion_goes_on(self, convert, monkeypatch, caplog):
        def full(*_):
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

        monkeypatch.setattr("hf_sparse_attn.calibration.kept_results.torch.save", full)
        convert()
        assert "cannot keep what is measured" in caplog.text


def test_card_names_dense_layers(convert):
    sparse, card, _ = convert(target_density=1.0)
    assert sparse["dense_layers"] == [0, 1]
    assert "as do all queries of the layers 0, 1." in card
    assert trade_table(card)[1] == (1, 0, 0)


@pytest.mark.parametrize("target", [0.2, 0.25, 0.32])
def test_target_density_is_kept(convert, arguments, monkeypatch, target):
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", (0.0,))  # others are predicted with dense weights, a little off
    _, card, _ = convert(target_density=target)
    chosen = trade_table(card)[1]
    assert target - 0.1 < chosen[0] <= target
    # The first sparse rows, which are not among the sampled ones, find fewer keys than their budget.
    assert chosen[0] * 0.95 < density(arguments["--output"]) <= chosen[0]


def test_more_density_costs_less(convert, arguments, tmp_path):
    chosen = []
    for target in (0.2, 0.32):
        arguments["--output"] = tmp_path / str(target)
        chosen.append(trade_table(convert(target_density=target)[1])[1])
    assert chosen[0][0] < chosen[1][0]
    assert chosen[0][1] > chosen[1][1]


def test_key_budget_limits_the_mean(convert):
    sparse, card, _ = convert(key_budget=8)
    budgets = [budget for layer in sparse["key_budget"] for budget in layer]
    assert 0 < sum(budgets) / 4 <= 8
    assert trade_table(card)[1][2] == round(sum(budgets) / 4)
    assert f"({min(budgets)} to {max(budgets)}, fitted for" in card.replace("\n", " ")


def test_max_loss_is_kept_on_the_last_calibration_document(convert, arguments, monkeypatch):
    from hf_sparse_attn import linear_layers
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.evaluation.perplexity import compare_perplexity
    from hf_sparse_attn.loading import load_sparse_model

    monkeypatch.setattr(linear_layers, "_has_bfloat16", lambda: False)  # the choice is to be the same on every CPU
    _, _, printed = convert(target_density=None, max_loss=0.05)
    assert "measuring the loss at density" in printed
    tokenizer = AutoTokenizer.from_pretrained(arguments["--model"])
    texts = load_documents(str(arguments["--calibration-dataset"]), "train")
    documents = long_documents(texts, tokenizer, LENGTH, max_documents=2)
    model = load_sparse_model(str(arguments["--output"]))
    result = compare_perplexity(model, documents[1:])
    assert result["documents"][0]["name"] == "1.txt"
    assert result["delta_nll"]["mean"] <= 0.05
    assert result["sparse"]["density"] < 1


def test_impossible_max_loss(run_script, arguments, monkeypatch, tmp_path):
    from hf_sparse_attn.calibration import calibrate as conversion

    monkeypatch.setattr(conversion, "compare_perplexity", lambda *_, **__: {"delta_nll": {"mean": 1.0}})
    finished = run_script(SCRIPT, *flat(arguments | {"--target-density": None, "--max-loss": 0.01}))
    assert finished.status == 2
    assert "argument --max-loss: a rise of the loss by at most 0.01 was not reached" in finished.stderr
    assert kept_file(finished, tmp_path)


def test_damaged_hash_is_one_clear_line(convert, run_script, assert_refused, arguments, text_directory):
    convert()
    path = arguments["--output"] / "config.json"
    config = json.loads(path.read_text())
    config["sparse_attention"]["calibrated_hash"] = config["sparse_attention"]["calibrated_hash"][:1000]
    path.write_text(json.dumps(config))
    finished = run_script(
        "eval_perplexity.py", "--model", arguments["--output"], "--dataset", text_directory, "--context-length", 128
    )
    assert_refused(finished, "--model", "calibrated_hash is damaged")


def test_without_evaluation_the_card_says_so(convert):
    _, card, printed = convert()
    assert "Not measured" in card
    assert "not evaluated" in printed


def test_nothing_to_evaluate_on(convert):
    """All long documents calibrated."""
    _, card, _ = convert(num_calibration_documents=3, num_evaluation_documents=1)
    assert "Not measured" in card


def test_dense_below_auto_writes_a_number(convert, monkeypatch):
    from hf_sparse_attn.calibration import prepare

    monkeypatch.setattr(prepare, "measure_dense_below", lambda *_: 40)
    sparse, card, _ = convert(dense_below="auto")
    assert sparse["dense_below"] == 40
    assert "positions under 40 read everything" in card


def test_dense_below_follows_from_the_density_unless_it_is_given(convert, arguments):
    fields = json.dumps({"window_size": 16, "num_global_tokens": 2})
    sparse, card, printed = convert(sparse_attention=fields, target_density=0.4)
    assert sparse["dense_below"] == 32
    assert "positions under 32 read everything, not under 2048: that would take too much of density 0.4" in printed
    assert "positions under 32 read everything" in card
    shutil.rmtree(arguments["--output"])
    for given in ({"dense_below": 40}, {"sparse_attention": json.dumps(json.loads(fields) | {"dense_below": 40})}):
        sparse, _, printed = convert(**{"sparse_attention": fields, "target_density": 0.4} | given)
        assert sparse["dense_below"] == 40
        assert "not under" not in printed
        shutil.rmtree(arguments["--output"])


def kept_file(finished, tmp_path):
    """The one file that a failed conversion left, and told of in the last line; no weights."""
    last = finished.stderr.splitlines()[-1]
    kept = Path(re.search(r"what was fitted, for --sparse-attention @FILE, is in '(.*?)'", last)[1])
    (measured,) = tmp_path.glob(".converted.calibration-*")
    assert str(measured) in last
    left = {tmp_path / "documents", measured} | ({kept} if kept.parent == tmp_path else set())
    assert set(tmp_path.iterdir()) == left
    assert json.loads(kept.read_text())["hash"] == "calibrated"
    return kept


def failing(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("function", "error", "status", "words"),
    [
        ("model_card.write_model_card", KeyboardInterrupt(), 130, "interrupted; "),
        ("evaluation.perplexity.compare_perplexity", KeyboardInterrupt(), 130, "interrupted; "),
        ("visualization.plot_trade", OSError(28, os.strerror(28)), 1, ": No space left on device; "),
        ("model_card.write_model_card", MemoryError(), 1, "error: there is too little memory: MemoryError; "),
    ],
    ids=["interrupted", "interrupted in evaluation", "full disk", "memory"],
)
def test_what_was_fitted_is_kept(
    run_script, arguments, monkeypatch, tmp_path, text_directory, function, error, status, words
):
    monkeypatch.setattr(f"hf_sparse_attn.{function}", failing(error))
    finished = run_script(SCRIPT, *flat(arguments | {"--num-evaluation-documents": 1}))
    assert finished.status == status
    assert words in finished.stderr.splitlines()[-1]
    kept = kept_file(finished, tmp_path)

    monkeypatch.undo()
    fields = ("--sparse-attention", f"@{kept}", "--context-length", 128)
    finished = run_script("eval_perplexity.py", "--model", arguments["--model"], "--dataset", text_directory, *fields)
    assert finished.status == 0, finished.stderr


def test_what_was_fitted_is_kept_where_the_disk_is_full(run_script, arguments, monkeypatch, tmp_path):
    """The disk of the output, that is."""
    from hf_sparse_attn.calibration import calibrate as conversion

    calibrate = conversion.calibrate

    def fill_the_disk(*args):
        result = calibrate(*args)
        shutil.rmtree(tmp_path / "deep")  # what was measured is there already
        (tmp_path / "deep").write_text("in the way")
        return result

    monkeypatch.setattr(conversion, "calibrate", fill_the_disk)
    finished = run_script(SCRIPT, *flat(arguments | {"--output": tmp_path / "deep" / "converted"}))
    assert finished.status == 1
    told = re.search(r"error: cannot write '.*': Not a directory; what was fitted, .* is in '(.*)'$", finished.stderr)
    kept = Path(told[1])
    assert json.loads(kept.read_text())["hash"] == "calibrated"
    kept.unlink()


def test_evaluation_that_fails_costs_its_figures_alone(run_script, arguments, monkeypatch):
    failure = failing(ValueError("the loss of document '2.txt' is not finite with sparse attention"))
    monkeypatch.setattr("hf_sparse_attn.evaluation.perplexity.compare_perplexity", failure)
    finished = run_script(SCRIPT, *flat(arguments | {"--num-evaluation-documents": 1}))
    assert finished.status == 0, finished.stderr
    assert "warning: not evaluated: the loss of document '2.txt' is not finite" in finished.stderr
    assert "Not measured" in (arguments["--output"] / "README.md").read_text()


def test_output_that_was_filled_meanwhile(run_script, arguments, monkeypatch, tmp_path):
    from hf_sparse_attn.calibration import model_card

    write = model_card.write_model_card

    def fill(*args, **kwargs):
        write(*args, **kwargs)
        arguments["--output"].mkdir()
        (arguments["--output"] / "precious").write_text("kept")

    monkeypatch.setattr(model_card, "write_model_card", fill)
    finished = run_script(SCRIPT, *flat(arguments))
    assert finished.status == 1
    told = re.search(r"error: cannot write to '.*converted': .*; the finished model is in '(.*)'$", finished.stderr)
    AutoModelForCausalLM.from_pretrained(told[1], attn_implementation="sparse")
    assert (Path(told[1]) / "README.md").is_file()
    assert [path.name for path in arguments["--output"].iterdir()] == ["precious"]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("given", [".", "link", "dangling", "deep/er"])
def test_output_that_is_no_plain_new_directory(run_script, arguments, monkeypatch, tmp_path, given):
    """Files are written into a directory that is there, and a link goes on leading to it."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link").symlink_to(place)
    (tmp_path / "links" / "dangling").symlink_to(tmp_path / "absent")
    output = {"link": tmp_path / "links" / "link", "dangling": tmp_path / "links" / "dangling"}.get(given, given)
    inode = place.stat().st_ino
    finished = run_script(SCRIPT, *flat(arguments | {"--output": output}))
    assert finished.status == 0, finished.stderr
    written = {"dangling": tmp_path / "absent", "deep/er": place / "deep" / "er"}.get(given, place)
    AutoModelForCausalLM.from_pretrained(written, attn_implementation="sparse")
    assert not any(path.name.startswith(".") for path in written.iterdir())
    assert place.stat().st_ino == inode
    assert Path(output).exists()


@pytest.mark.parametrize("given", ["..", "/", "loop"])
def test_output_that_cannot_be_filled_is_refused(run_script, assert_refused, arguments, monkeypatch, tmp_path, given):
    place = tmp_path / "place"
    place.mkdir()
    (place / "loop").symlink_to(place / "loop")
    monkeypatch.chdir(place)
    assert_refused(run_script(SCRIPT, *flat(arguments | {"--output": given})), "--output")


def test_names_cannot_inject_anything_into_the_card(convert, text_directory):
    (text_directory / "0.txt").rename(text_directory / "0 <b> [x](javascript:alert) `c` a|b.txt")
    _, card, _ = convert()
    assert (
        r"Calibrated on 2 document\(s\): 0 &lt;b&gt; \[x\]\(javascript:alert\) \`c\` a\|b.txt, 1.txt."
        in card.replace("document(s)", r"document\(s\)").replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "./missing"}, ["--model", "no such directory"]),
        ({"--calibration-dataset": "missing.txt"}, ["--calibration-dataset", "missing.txt"]),
        ({"--context-length": 100_000}, ["--calibration-dataset", "at least 100000 tokens"]),
        ({"--context-length": 90}, ["--context-length", "at least 160"]),
        ({"--key-budget": 0}, ["--key-budget", "'0'"]),
        ({"--target-density": 0}, ["--target-density", "greater than 0 and at most 1"]),
        ({"--target-density": 1.5}, ["--target-density", "greater than 0 and at most 1"]),
        ({"--target-density": "nan"}, ["--target-density", "greater than 0 and at most 1"]),
        ({"--target-density": 0.1}, ["--target-density", "at least 0.1767 at 200 tokens"]),
        ({"--target-density": "much"}, ["--target-density", "much"]),
        ({"--max-loss": 0.01}, ["--max-loss", "--target-density", "not allowed with"]),
        ({"--target-density": None, "--max-loss": 0}, ["--max-loss", "greater than 0"]),
        ({"--target-density": None, "--max-loss": "nan"}, ["--max-loss", "greater than 0"]),
        ({"--sparse-attention": '{"key_budget": 4}'}, ["--sparse-attention", "--key-budget"]),
        ({"--sparse-attention": '{"min_weight": 0.1}'}, ["--sparse-attention", "min_weight"]),
        ({"--sparse-attention": '{"windw_size": 4}'}, ["--sparse-attention", "windw_size"]),
        ({"--dense-below": "soon"}, ["--dense-below", "soon"]),
        ({"--dense-below": 10**30}, ["--dense-below", "at most"]),
        ({"--num-evaluation-documents": -1}, ["--num-evaluation-documents", "-1"]),
        ({"--output": ""}, ["--output", "''"]),
        ({"--model": ""}, ["--model", "''"]),
        ({"--device": "meta"}, ["--device", "'meta'"]),
        ({"--target-density": None, "--max-loss": "inf"}, ["--max-loss", "greater than 0"]),
        ({"--sparse-attention": "[" * 100_000}, ["--sparse-attention", "nested too deeply"]),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) and len(value) == 1 else None,
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, monkeypatch, tmp_path, changes, words):
    """Before any long work, with nothing written."""
    from hf_sparse_attn.calibration import calibrate as conversion

    monkeypatch.setattr(conversion, "calibrate", None)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_max_loss_needs_no_reachable_default_density(convert):
    convert(target_density=None, max_loss=1.0, dense_below=60)


@pytest.mark.parametrize(
    ("fields", "target"),
    [({"dense_below": 0}, 0.175), ({"stride": 5}, 0.25)],
    ids=["short rows", "stride"],
)
def test_a_density_near_the_least_one_is_kept_or_refused(run_script, arguments, fields, target):
    changes = {"--sparse-attention": json.dumps(FIELDS | fields), "--target-density": target}
    finished = run_script(SCRIPT, *flat(arguments | changes))
    assert finished.status == 0 or "argument --target-density: must be at least" in finished.stderr


@pytest.mark.parametrize(
    ("fields", "target"),
    [({"dense_layers": [0]}, 0.45), ({"num_random_keys": 8}, 0.27)],
    ids=["dense layers", "random keys"],
)
def test_target_density_counts_what_is_read_anyway(run_script, arguments, fields, target):
    changes = {"--sparse-attention": json.dumps(FIELDS | fields), "--target-density": target}
    finished = run_script(SCRIPT, *flat(arguments | changes))
    refused = "argument --target-density: must be at least" in finished.stderr
    assert refused or density(arguments["--output"]) <= target * 1.02


def test_existing_output_is_refused(run_script, assert_refused, arguments):
    arguments["--output"].mkdir()
    (arguments["--output"] / "precious").write_text("kept")
    assert_refused(run_script(SCRIPT, *flat(arguments)), "--output", "already holds something")
    assert (arguments["--output"] / "precious").read_text() == "kept"
