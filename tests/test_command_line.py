import argparse
import json
import sys

import pytest

from hf_sparse_attn import command_line
from hf_sparse_attn.command_line import UserError, argument


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


def test_argument_names_itself_and_joins_lines():
    with pytest.raises(UserError, match=r"^argument --dataset: first second$"), argument("--dataset"):
        raise FileNotFoundError("first\n   second")


def test_parser_errors_are_user_errors():
    parser = command_line.OneLineErrors()
    parser.add_argument("--count", type=command_line.positive_int)
    with pytest.raises(UserError, match="argument --count: expected a positive integer, got '0'"):
        parser.parse_args(["--count", "0"])
    with pytest.raises(UserError, match="unrecognized arguments: --cuont"):
        parser.parse_args(["--cuont", "1"])


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null"])
def test_json_object_refuses_what_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        command_line.json_object(text)


def test_json_object_reads_one():
    assert command_line.json_object('{"window_size": 4}') == {"window_size": 4}


def test_output_directory_must_be_new_or_empty(tmp_path):
    assert command_line.check_output_directory(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    command_line.check_output_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="already holds something"):
        command_line.check_output_directory(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        command_line.check_output_directory(tmp_path / "file")
    assert not (tmp_path / "a").exists()


def test_output_file_must_not_be_a_directory(tmp_path):
    with pytest.raises(FileExistsError, match="is a directory"):
        command_line.check_output_file(tmp_path)


def test_output_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="cannot write"):
        command_line.check_output_file(tmp_path / "file" / "result.json")


def test_write_json_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "result.json"
    command_line.write_json(path, {"a": 1})
    command_line.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}


@pytest.mark.parametrize("value", [{"a": object()}, {"a": float("nan")}], ids=["unserialisable", "nan"])
def test_write_json_leaves_the_old_file_when_it_fails(tmp_path, value):
    path = tmp_path / "result.json"
    command_line.write_json(path, {"a": 1})
    with pytest.raises((TypeError, ValueError)):
        command_line.write_json(path, value)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
