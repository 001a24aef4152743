import io
import json
import shutil

import pytest
from test_conversation import TEMPLATE
from transformers import AutoTokenizer

SCRIPT = "chat.py"


@pytest.fixture
def chat_model(tiny_model_path, tmp_path):
    path = tmp_path / "chat-model"
    shutil.copytree(tiny_model_path, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def test_answers_and_says_what_it_took(run_script, chat_model, tmp_path):
    document, output = tmp_path / "document.txt", tmp_path / "chat.json"
    document.write_text("A lamp is in the attic. " * 5)
    options = ["--document", document, "--max-new-tokens", 5, "--output", output]
    finished = run_script(SCRIPT, "--model", chat_model, "--question", "Where?", "Since when?", *options)
    assert finished.status == 0, finished.stderr
    first, second = json.loads(output.read_text())["turns"]
    assert (first["question"], second["question"]) == ("Where?", "Since when?")
    assert first["read"] > 100 > second["read"]
    assert f"[{second['read']} tokens read in" in finished.stdout
    assert "> Since when?" in finished.stdout


def test_questions_from_the_terminal(run_script, chat_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Where?\nWhen?\n"))
    finished = run_script(SCRIPT, "--model", chat_model, "--max-new-tokens", 2)
    assert finished.status == 0, finished.stderr
    assert finished.stdout.count("tokens read in") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--document", "nowhere.txt"], ["--document", "nowhere.txt"]),
        (["--max-new-tokens", 0], ["--max-new-tokens", "'0'"]),
        (["--output", "."], ["--output", "directory"]),
        (["--dtype", "float3"], ["--dtype", "float3"]),
        (["--sparse-attention", '{"seeed": 4}'], ["--sparse-attention", "seeed"]),
        ([], ["--model", "chat template"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_arguments_are_refused(run_script, assert_refused, tiny_model_path, options, words):
    assert_refused(run_script(SCRIPT, "--model", tiny_model_path, "--question", "Why?", *options), *words)
