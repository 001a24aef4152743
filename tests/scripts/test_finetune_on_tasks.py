"""A model is trained on the answers of the tasks' questions alone, and saved as a dense one."""

import json

import pytest
from helpers.paths import script_module

from hf_sparse_attn.data.packing import IGNORED_LABEL
from hf_sparse_attn.evaluation.tasks import Haystack, Vocabulary, prompt_of

finetune_on_tasks = script_module("finetune_on_tasks")

SCRIPT = "finetune_on_tasks.py"
LENGTH = 8000


@pytest.fixture
def text():
    return " ".join(f"line {number} of the text." for number in range(1500))


def test_the_labels_are_the_answers(tiny_tokenizer, text):
    vocabulary, haystack = Vocabulary(tiny_tokenizer), Haystack([("text", text)])
    prompt = prompt_of("niah_multikey", 4000, 0, vocabulary, haystack)
    row = finetune_on_tasks.with_answers(prompt, vocabulary)
    assert len(row["labels"]) == len(row["input_ids"])
    whole = tiny_tokenizer.decode(row["input_ids"])
    assert whole.startswith(prompt.text)
    for question in prompt.questions:
        assert f"{question.text}{question.right[0]}\n" in whole
    taught = [label for label in row["labels"] if label != IGNORED_LABEL]
    assert taught == [token for answers in prompt.answer_ids for token in answers[0]]
    assert all(label in (IGNORED_LABEL, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_rows_fit_their_lengths(tiny_tokenizer, text):
    vocabulary, haystack = Vocabulary(tiny_tokenizer), Haystack([("text", text)])
    rows = list(finetune_on_tasks.rows(["qa1"], LENGTH, 8, vocabulary, haystack))
    lengths = [len(row["input_ids"]) for row in rows]
    for length, parts in zip(lengths, finetune_on_tasks.PARTS, strict=True):
        assert 0.9 * LENGTH / parts < length <= LENGTH / parts
    assert len({tuple(row["input_ids"][:500]) for row in rows}) == 8


def test_what_is_saved_has_no_pattern(run_script, tiny_model_path, tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    output = tmp_path / "tuned"
    given = ["--model", tiny_model_path, "--dataset", tmp_path / "text.txt", "--output", output]
    finished = run_script(SCRIPT, *given, "--tasks", "qa1", "--context-length", LENGTH, "--max-steps", 2)
    assert finished.status == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1])["steps"] == 2
    config = json.loads((output / "config.json").read_text())
    assert "sparse_attention" not in config
    assert config["model_type"] == "llama"
