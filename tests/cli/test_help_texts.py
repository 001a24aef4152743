"""What --help says: sentences, metavars of a short list, and examples that parse."""

import argparse
import re
import shlex
from importlib import import_module

import pytest

from hf_sparse_attn.cli.main import COMMANDS
from hf_sparse_attn.cli.options import examples

METAVARS = {
    *("DATASET", "DEVICE", "DIR", "DTYPE", "FILE", "JSON", "MODEL", "N", "NAME", "NATS", "NUMBER", "SHARE", "TEXT"),
    *("VALUE", "LAYER", "BYTES", "FLOPS"),
}
MODULES = {name: module for name, (module, _) in COMMANDS.items() if name != "run"}  # it parses another program's words
SENTENCE = re.compile(r"[A-Z].*\.$", re.DOTALL)


def module_of(command):
    return import_module(f"hf_sparse_attn.cli.{MODULES[command]}")


def own_options(command):
    """The options of a command, without those of Transformers' own that a command only passes on."""
    for action in module_of(command).make_parser()._actions:
        if not isinstance(action, argparse._HelpAction):
            yield action


def test_commands_are_sentences():
    for _, purpose in COMMANDS.values():
        assert SENTENCE.match(purpose), purpose


@pytest.mark.parametrize("command", MODULES)
def test_options(command):
    for action in own_options(command):
        name = (*action.option_strings, action.dest)[0]
        assert action.help, name
        if action.nargs != 0 and action.choices is None:
            assert action.metavar in METAVARS, (name, action.metavar)
        if command != "finetune":  # most of whose options Transformers describes
            assert SENTENCE.match(action.help), (name, action.help)
            assert not re.match(r"(Of|What) ", action.help), (name, action.help)


@pytest.mark.parametrize("command", MODULES)
def test_examples(command, capsys, monkeypatch, tmp_path):
    module = module_of(command)
    monkeypatch.chdir(tmp_path)
    for name in ("fields.json", "questions.txt", "report.txt", "book.txt"):
        (tmp_path / name).write_text("{}")
    lines = examples(module.__doc__)
    assert lines
    parser = module.make_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["hf-sparse-attn", command], line
        assert line[:60] in " ".join(shown.split()), line
        parse = getattr(parser, "parse_args_into_dataclasses", None) or parser.parse_args
        parse(words[2:])
