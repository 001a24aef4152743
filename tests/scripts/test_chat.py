import io
import json
import shutil

import pytest
from helpers.chat import TEMPLATE
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


def test_answers_before_a_failure_are_written(run_script, chat_model, tmp_path, monkeypatch):
    from hf_sparse_attn.cli.conversation import Conversation

    ask, output = Conversation.ask, tmp_path / "chat.json"

    def interrupted(conversation, question, streamer):
        if question == "Since when?":
            raise KeyboardInterrupt
        return ask(conversation, question, streamer)

    monkeypatch.setattr(Conversation, "ask", interrupted)
    options = ["--max-new-tokens", 1, "--output", output]
    finished = run_script(SCRIPT, "--model", chat_model, "--question", "Where?", "Since when?", *options)
    assert finished.status == 130
    (turn,) = json.loads(output.read_text())["turns"]
    assert turn["question"] == "Where?"
    assert turn["ms_per_token"] is None  # of one token there is no pace


def test_document_longer_than_the_model_was_made_for(run_script, chat_model, tmp_path):
    (tmp_path / "document.txt").write_text("A lamp is in the attic. " * 30)
    options = ["--document", tmp_path / "document.txt", "--max-new-tokens", 1]
    finished = run_script(SCRIPT, "--model", chat_model, "--question", "Where?", "When?", *options)
    assert finished.status == 0, finished.stderr
    assert finished.stderr.count("more than the 512 that the model was made for") == 1


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
        (["--dtype", "float8_e4m3fn"], ["--dtype", "float8_e4m3fn"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--question", "Why?", ""], ["--question", "''"]),
        (["--sparse-attention", '{"seeed": 4}'], ["--sparse-attention", "seeed"]),
        ([], ["--model", "chat template"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_arguments_are_refused(run_script, assert_refused, tiny_model_path, options, words):
    assert_refused(run_script(SCRIPT, "--model", tiny_model_path, "--question", "Why?", *options), *words)
