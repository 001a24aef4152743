"""What other commands measured, on one page and in a model card."""

import json
import re

import pytest

from hf_sparse_attn.cli.report import MARKS, cell

SCRIPT = "report.py"


@pytest.fixture
def measured(run_script, tiny_model_path, text_directory, tmp_path):
    """A directory with the reports of three commands, a picture and a file that is no report."""
    folder = tmp_path / "measured"
    same = ["--model", tiny_model_path, "--dataset", text_directory, "--context-length", 64]
    for script, name in (("leak_test.py", "leak"), ("eval_perplexity.py", "perplexity")):
        finished = run_script(script, *same, "--output", folder / f"{name}.json")
        assert finished.status == 0, finished.stderr
    options = ["--model", tiny_model_path, "--seq-lens", 64, "--repeats", 1, "--output", folder / "speed.json"]
    finished = run_script("benchmark.py", *options)
    assert finished.status == 0, finished.stderr
    (folder / "trade.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "other.json").write_text('{"command": "rm -rf ."}')
    (folder / "config.json").write_text("{}")
    return folder


def test_page(run_script, measured, tmp_path):
    page = tmp_path / "report.html"
    finished = run_script(SCRIPT, measured, "--output", page, "--title", "A <model>")
    assert finished.status == 0, finished.stderr
    assert "3 reports and 1 pictures" in finished.stdout
    assert finished.stderr.count("is no report") == 1
    assert "other.json" in finished.stderr
    text = page.read_text()
    assert "<h1>A &lt;model&gt;</h1>" in text
    # In the order of the commands, not of the files.
    assert re.findall(r"<h2>([^:<]*)", text) == ["eval-perplexity", "leak-test", "benchmark", "Pictures"]
    perplexity = json.loads((measured / "perplexity.json").read_text())
    for figure in (f"{perplexity['perplexity_ratio']:.4f}", f"{perplexity['top1_agreement']:.4f}"):
        assert f"<td>{figure}</td>" in text
    assert "where sparse lost most" in text.lower()
    assert "hf-sparse-attn eval-perplexity --model" in text
    assert ">speedup<" in text
    assert "data:image/svg+xml;base64," in text
    assert not re.search(r'(src|href)="(?!#|data:)', text)  # nothing is loaded from elsewhere


def test_a_tuned_model(run_script, tiny_model_path, text_directory, tmp_path):
    """Losses before and after are shown as `finetune` tells them, also one that is not finite."""
    output, page = tmp_path / "tuned", tmp_path / "report.html"
    same = ["--model", tiny_model_path, "--dataset", text_directory, "--context-length", 64, "--eval-dataset"]
    finished = run_script("finetune.py", *same, text_directory, "--max-steps", 2, "--output", output)
    assert finished.status == 0, finished.stderr
    assert run_script(SCRIPT, output, "--output", page).status == 0
    results = json.loads((output / "all_results.json").read_text())
    text = page.read_text()
    assert f"<td>{results['eval_loss_before']:.4f} -&gt; {results['eval_loss_after']:.4f}</td>" in text
    assert "hf-sparse-attn finetune --model" in text
    (output / "all_results.json").write_text(json.dumps(results | {"eval_loss_before": None}))
    assert run_script(SCRIPT, output, "--output", page).status == 0
    assert f"<td>not logged -&gt; {results['eval_loss_after']:.4f}</td>" in page.read_text()


def test_model_card(run_script, measured, tmp_path):
    """Tables come to its end; those of an earlier report are replaced."""
    card = tmp_path / "README.md"
    card.write_text("# A model\n\nText.\n")
    given = [measured, "--output", tmp_path / "report.html", "--model-card", card]
    assert run_script(SCRIPT, *given).status == 0
    first = card.read_text()
    assert first.startswith("# A model\n\nText.\n\n")
    assert "\n| perplexity | " in first
    assert first.count("## Measured") == 1
    card.write_text(first + "\nA later line.\n")
    assert run_script(SCRIPT, *given).status == 0
    assert card.read_text() == first + "\nA later line.\n"
    assert first.index(MARKS[0]) < first.index("| perplexity") < first.index(MARKS[1])
    for line in first.splitlines():
        if line.startswith("| ---"):
            assert re.fullmatch(r"\| --- (\| ---: )*\|", line)


def test_text_of_documents_stays_in_its_cell():
    assert cell("a|b`<i>*_") == "a\\|b\\`&lt;i&gt;\\*\\_"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "argument DIR: 'nowhere' is not a directory"),
        (["empty"], "argument DIR: holds no report of a command"),
        (["empty", "--model-card", "empty/README.md"], "argument --model-card: 'empty/README.md' is not a file"),
    ],
)
def test_bad_input(run_script, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    finished = run_script(SCRIPT, *arguments, "--output", tmp_path / "report.html")
    assert finished.status == 2
    assert told in finished.stderr
    assert not (tmp_path / "report.html").exists()


def test_changed_by_hand(run_script, measured, tmp_path):
    """A report that this release cannot show is left out, not half shown."""
    for name in ("leak", "perplexity"):
        file = measured / f"{name}.json"
        report = json.loads(file.read_text())
        if name == "leak":
            del report["changes"]
        file.write_text(json.dumps(report))
    finished = run_script(SCRIPT, measured, "--output", tmp_path / "report.html")
    assert finished.status == 0
    assert "leak.json" in finished.stderr
    assert "leak-test" not in (tmp_path / "report.html").read_text()
