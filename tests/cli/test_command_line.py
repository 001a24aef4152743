import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import SCRIPTS
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sparse_attn import loading, output_files
from hf_sparse_attn.cli import argument_types
from hf_sparse_attn.cli import arguments as command_line
from hf_sparse_attn.cli.arguments import OneLineErrors, UserError, argument
from hf_sparse_attn.errors import ArgumentError, RunError


def exit_status(main):
    with pytest.raises(SystemExit) as exit_:
        command_line.run(main)
    return exit_.value.code


def raising(error):
    def main():
        raise error

    return main


def test_run_reports_a_user_error_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/convert.py"])
    assert exit_status(raising(UserError("argument --model: no such directory"))) == 2
    assert capsys.readouterr().err == "convert.py: error: argument --model: no such directory\n"


def test_run_ends_quietly_when_interrupted(capsys):
    assert exit_status(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_run_shows_the_traceback_of_a_bug():
    with pytest.raises(ZeroDivisionError):
        command_line.run(raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RunError("the disk is gone"), "the disk is gone"),
        (MemoryError(), "there is too little memory: MemoryError"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "there is too little memory: CUDA out of memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.bin"), "No space left on device: 'x.bin'"),
        (Exception("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), "No module named 'rich'; pip install"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_run_tells_what_no_argument_is_to_blame_for_in_one_line(capsys, monkeypatch, error, line):
    monkeypatch.setattr(sys, "argv", ["convert.py"])
    output_files.add_note(error, "the rest is kept")

    def main():
        with argument("--model"):
            raise error

    assert exit_status(main) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("convert.py: error: ")
    assert line in told
    assert told.endswith("; the rest is kept")
    assert "--model" not in told


def test_a_package_that_cannot_be_imported_is_not_blamed_on_an_argument(capsys, monkeypatch, tmp_path):
    (tmp_path / "outer_package.py").write_text("import inner_package")
    (tmp_path / "inner_package.py").write_text("raise OSError('libinner.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)

    def main():
        with argument("--model"):
            import outer_package  # noqa: F401

    assert exit_status(main) == 1
    told = capsys.readouterr().err
    assert told.endswith("error: cannot import inner_package: libinner.so: cannot open shared object file\n")


@pytest.mark.parametrize(("where", "unbuffered"), [("/dev/full", "1"), ("closed pipe", "")])
def test_standard_output_that_cannot_be_written_to_is_one_line(tmp_path, where, unbuffered):
    script = "from hf_sparse_attn.cli.arguments import print_table, run\nrun(lambda: print_table('t', ['a'], [['b']]))"
    with open("/dev/full", "w") as full:
        reading, writing = os.pipe()
        os.close(reading)
        finished = subprocess.run(
            [sys.executable, "-c", script],
            stdout=full if where == "/dev/full" else writing,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(SCRIPTS.parent)},
        )
        os.close(writing)
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1
    assert "error: cannot write to standard output: " in finished.stderr


def test_argument_names_itself_and_joins_lines():
    with pytest.raises(UserError, match=r"^argument --dataset: first second$"), argument("--dataset"):
        raise FileNotFoundError("first\n   second")


def test_parser_errors_are_user_errors():
    parser = command_line.OneLineErrors()
    parser.add_argument("--count", type=argument_types.positive_int)
    with pytest.raises(UserError, match="argument --count: expected a positive integer, got '0'"):
        parser.parse_args(["--count", "0"])
    with pytest.raises(UserError, match="unrecognized arguments: --cuont"):
        parser.parse_args(["--cuont", "1"])


def test_parser_refuses_values_that_no_argument_can_have():
    parser = OneLineErrors()
    for name, kind in (("--text", None), ("--integer", int), ("--number", float)):
        parser.add_argument(name, type=kind, default="")
    for given, message in (
        (["--text", " "], "argument --text: expected a value, got ''"),
        (["--integer", ""], "argument --integer: expected a value, got ''"),
        (["--integer", "1e400"], "argument --integer: expected an integer, got '1e400'"),
        (["--integer", str(10**30)], "argument --integer: expected an integer of at most 9223372036854775807, got"),
        (["--integer", "9" * 9999], "argument --integer: expected an integer"),
        (["--number", "nan"], "argument --number: expected a number, got 'nan'"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")) as refused:
            parser.parse_args(given)
        assert len(str(refused.value)) < 200
    assert parser.parse_args(["--integer", "-3", "--number", "inf"]).integer == -3


def test_no_output_is_another_arguments_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("precious")
    (tmp_path / "link.txt").symlink_to("book.txt")
    parser = OneLineErrors()
    for name, kind in (
        ("--document", None),
        ("--output", argument_types.output_file),
        ("--picture-file", argument_types.output_file),
    ):
        parser.add_argument(name, type=kind)
    for given in (
        ["--document", "book.txt", "--output", str(tmp_path / "book.txt")],
        ["--document", "book.txt", "--output", "link.txt"],
        ["--output", "new.png", "--picture-file", "./new.png"],
    ):
        with pytest.raises(UserError, match=r"argument --output: .* is the file of --(document|picture-file), too"):
            parser.parse_args(given)
    parser.parse_args(["--document", "book.txt", "--output", "new.json", "--picture-file", "new.png"])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (argument_types.positive_int, {"1": 1}, ["0", "-1", "1.5", "nan", "1e400", str(10**30)]),
        (argument_types.count, {"0": 0}, ["-1", "x", str(10**30)]),
        (argument_types.fraction, {"0": 0, "1": 1}, ["-0.1", "1.1", "nan", "inf"]),
        (argument_types.share, {"1": 1, "1e-9": 1e-9}, ["0", "1.1", "nan", "-1"]),
        (argument_types.positive_number, {"0.1": 0.1}, ["0", "-1", "nan", "inf", "1e400"]),
    ],
)
def test_numbers(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected .* got "):
            kind(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "3",
        "null",
        "[" * 100_000,
        '{"seed": 1, "seed": 2}',
        '{"min_weight": NaN}',
        '{"min_weight": 1e400}',
        '{"seed": 1000000000000000000000000000000}',
        "@nowhere.json",
    ],
    ids=lambda text: text[:40],
)
def test_json_object_refuses_what_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        argument_types.json_object(text)
    assert len(str(refused.value)) < 300


def test_json_object_reads_one(tmp_path):
    assert argument_types.json_object('{"window_size": 4}') == {"window_size": 4}
    (tmp_path / "fields.json").write_text('{"window_size": 5}')
    assert argument_types.json_object(f"@{tmp_path / 'fields.json'}") == {"window_size": 5}


@pytest.mark.parametrize("device", ["meta", "gpu", "hpu", "cuda:99"])
def test_device_that_does_not_compute(device):
    with pytest.raises(ArgumentError, match=f"device: '{device}' is not a device of this machine"):
        loading.parse_device(device)
    assert loading.parse_device("cpu") == torch.device("cpu")


def test_dtype_that_no_model_computes_in():
    with pytest.raises(ArgumentError, match="dtype: no model computes in 'float8_e4m3fn'"):
        loading.parse_dtype("float8_e4m3fn")
    assert loading.parse_dtype("bfloat16") == torch.bfloat16
    assert loading.parse_dtype("auto") == "auto"


def test_table_shows_texts_as_they_are(capsys):
    command_line.print_table("t", ["[red]"], [["[/closed] :smile:"]])
    assert "[red]" in (printed := capsys.readouterr().out)
    assert "[/closed] :smile:" in printed


def test_result_that_cannot_be_shown_is_kept(capsys):
    def show(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as failure:
        command_line.report({"loss": 1.5}, None, show)
    (note,) = failure.value.__notes__
    kept = Path(note.split("'")[1])
    found = json.loads(kept.read_text())
    assert found.pop("command").startswith("hf-sparse-attn test-command-line")
    assert found == {"loss": 1.5}
    kept.unlink()


def damaged(path, **changes):
    """Change files of a checkpoint: bytes, fields of a JSON file, None to remove."""
    for name, content in changes.items():
        file = path / name.replace("__", ".")
        if content is None:
            file.unlink()
        elif isinstance(content, dict):
            file.write_text(json.dumps(json.loads(file.read_text()) | content))
        else:
            file.write_bytes(content)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__safetensors": b""}, "its weights cannot be read"),
        ({"model__safetensors": b"\xff" * 5000}, "its weights cannot be read"),
        ({"model__safetensors": None}, "model.safetensors"),
        ({"model__safetensors": None, "pytorch_model__bin": b"no zip"}, "its weights cannot be read"),
        ({"model__safetensors": None, "pytorch_model__bin": b""}, "its weights cannot be read"),
        ({"model__safetensors": None, "model__safetensors__index__json": b"{}"}, "its weights cannot be read"),
        (
            {
                "model__safetensors": None,
                "model__safetensors__index__json": b'{"metadata": {}, "weight_map": {"a": "part.safetensors"}}',
            },
            "part.safetensors",
        ),
        ({"config__json": {"intermediate_size": 48}}, "other shapes than its config.json says"),
        ({"config__json": {"num_hidden_layers": 3}}, "no weights for 9 parameters"),
        ({"config__json": {"num_hidden_layers": 0}}, "num_hidden_layers in its config.json must be at least 1"),
        ({"config__json": {"num_key_value_heads": 0}}, "num_key_value_heads in its config.json must be at least 1"),
        ({"config__json": {"num_key_value_heads": 3}}, "4 query heads, 3 KV heads"),
        ({"config__json": {"num_attention_heads": 0}}, "its config.json cannot be read"),
        ({"config__json": {"hidden_size": "big"}}, "hidden_size"),
        ({"config__json": {"hidden_size": -32}}, "hidden_size"),
        ({"config__json": {"hidden_act": "nope"}}, "nope"),
        ({"config__json": {"dtype": "float99"}}, "float99"),
        (
            {"config__json": {"sparse_attention": [1]}},
            "sparse_attention in its config.json must be an object, got list",
        ),
        ({"config__json": {"sparse_attention": 0}}, "sparse_attention in its config.json must be an object, got int"),
        ({"config__json": b"[" * 100_000}, "its config.json cannot be read"),
        ({"tokenizer__json": b"[]"}, "its tokenizer cannot be read"),
        ({"tokenizer_config__json": b"[]"}, "its tokenizer cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value[:30],
)
def test_damaged_checkpoint_is_one_line(tiny_model_path, tmp_path, capfd, changes, words):
    path = tmp_path / "model"
    shutil.copytree(tiny_model_path, path)
    damaged(path, **changes)
    with pytest.raises(ArgumentError, match=f"^model {path}: ") as refused:
        loading.load_model(str(path), loading.read_checkpoint(str(path), {})[0])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert capfd.readouterr().err == ""


def test_truncated_weights(tiny_model_path, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_model_path, path)
    whole = (path / "model.safetensors").read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        (path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ArgumentError, match="its weights cannot be read"):
            loading.load_model(str(path), str(path))


def test_weights_that_are_not_finite(tiny_model_path, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_model_path, path)
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(
        ArgumentError, match=r"its weights are damaged: model\.norm\.weight has numbers that are not finite"
    ):
        loading.load_model(str(path), str(path))


def test_tokenizer_of_another_model(tiny_model_path, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_model_path, path)
    damaged(path, config__json={"vocab_size": 100})
    with pytest.raises(ArgumentError, match=r"its tokenizer has 256 tokens, but its config\.json a vocab_size of 100"):
        loading.read_checkpoint(str(path), {})


def test_weights_that_are_not_used_are_told_in_one_line(tiny_model_path, tmp_path, caplog):
    path = tmp_path / "model"
    shutil.copytree(tiny_model_path, path)
    save_file(load_file(path / "model.safetensors") | {"further.weight": torch.zeros(2)}, path / "model.safetensors")
    loading.load_model(str(path), str(path))
    assert "1 weights that the model has no use for, such as further.weight" in caplog.text


def test_bugs_of_our_own_are_not_blamed_on_the_model(tiny_model_path, monkeypatch):
    monkeypatch.setattr(loading, "check_model", lambda model: model.no_such_attribute)
    with pytest.raises(AttributeError):
        loading.load_model("tiny", str(tiny_model_path))


def test_more_tokens_than_the_model_was_made_for_are_told_once(tiny_model_path, caplog):
    loading.load_model("tiny", str(tiny_model_path), num_tokens=512)
    assert caplog.text == ""
    loading.load_model("tiny", str(tiny_model_path), num_tokens=513)
    (record,) = caplog.records
    assert "513 tokens are more than the 512 that the model was made for" in record.getMessage()


def test_more_tokens_than_there_are_learned_positions_are_refused(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    loading.load_model("gpt2", str(tmp_path), num_tokens=32)
    with pytest.raises(ArgumentError, match="model gpt2: it has learned 32 positions and cannot read 33 tokens"):
        loading.load_model("gpt2", str(tmp_path), num_tokens=33)
