"""The console command, and the same as functions."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.batches import tokens
from transformers import PreTrainedModel

import hf_sparse_attn
import hf_sparse_attn_command
from hf_sparse_attn.cli import main as console
from hf_sparse_attn.cli import run_program
from hf_sparse_attn.errors import ArgumentError

ROOT = Path(hf_sparse_attn.__file__).parent.parent


@pytest.fixture
def run_console(monkeypatch, capsys):
    """Run `hf-sparse-attn ARGUMENTS` in this process: status, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/bin/hf-sparse-attn", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            hf_sparse_attn_command.main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


class TestCommands:
    def test_help_lists_them(self, run_console):
        status, out, _ = run_console("--help")
        assert status == 0
        for name, (_, purpose) in console.COMMANDS.items():
            assert f"  {name} " in out
            assert purpose in out

    @pytest.mark.parametrize("name", console.COMMANDS)
    def test_each_has_help(self, run_console, name):
        status, out, err = run_console(name, "--help")
        assert (status, err) == (0, "")
        assert "usage: " in out
        assert f"hf-sparse-attn {name}" in out

    def test_version(self, run_console):
        assert run_console("--version")[:2] == (0, f"{hf_sparse_attn.__version__}\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "expected a command: convert, "),
            (("convrt",), "'convrt' is not a command; did you mean convert? Expected one of"),
            (("--modle", "x"), "'--modle' is not a command"),
        ],
    )
    def test_mistakes(self, run_console, arguments, message):
        status, out, err = run_console(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith(f"hf-sparse-attn: error: {message}")
        assert err.count("\n") == 1

    def test_a_mistake_inside_a_command_names_it(self, run_console):
        status, _, err = run_console("eval-perplexity", "--model", "demo")
        assert status == 2
        assert err.startswith("hf-sparse-attn eval-perplexity: error: the following arguments are required")

    def test_it_is_a_module_too(self):
        done = subprocess.run(
            [sys.executable, "-m", "hf_sparse_attn", "--version"], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert done.stdout == f"{hf_sparse_attn.__version__}\n"


class TestInfo:
    def test_lines(self, run_console):
        status, out, _ = run_console("info")
        assert status == 0
        for line in (f"  torch: {torch.__version__}", '  cpu: "auto" takes numba', "  numba, choice 1: "):
            assert line in out

    def test_json(self, run_console, tmp_path):
        run_console("info", "--output", tmp_path / "info.json")
        assert json.loads((tmp_path / "info.json").read_text())["packages"]["torch"] == torch.__version__

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
    def test_no_gpu_to_check(self, run_console):
        status, out, err = run_console("info", "--gpu")
        assert (status, out) == (2, "")
        expected = "argument --gpu: PyTorch sees no GPU here, so there is nothing to check"
        assert err == f"hf-sparse-attn info: error: {expected}\n"

    def test_a_gpu_that_is_checked(self, run_console, monkeypatch, tmp_path):
        from hf_sparse_attn.benchmarking import gpu_check
        from hf_sparse_attn.cli import info

        attention = {"dtype": "float16", "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "seq_len": 77}
        checked = attention | {"off": {"forward": 0.0, "backward": 0.25, "decoding": 0.0}, "problem": "25.0% are off"}
        times = {"sparse_ms": 1.5, "dense_ms": 3.0, "both_sparse_ms": 4.25, "both_dense_ms": 9.0}
        monkeypatch.setattr(info, "_gpus", lambda: [torch.device("cpu")])
        monkeypatch.setattr(gpu_check, "check_gpu", lambda *_: [checked, attention | times | {"problem": None}])
        monkeypatch.setenv("COLUMNS", "200")
        status, out, _ = run_console("info", "--gpu", "--output", tmp_path / "info.json")
        assert status == 0
        for words in ("4/2 x 8", "0.00 / 25.00 / 0.00", "25.0% are off", "1.50 (3.00)", "4.25 (9.00)", "none"):
            assert words in out
        assert [row["seq_len"] for row in json.loads((tmp_path / "info.json").read_text())["gpu"]] == [77, 77]

    def test_why_nothing_faster(self, monkeypatch):
        from hf_sparse_attn.ops import dispatch

        monkeypatch.setattr(dispatch, "_installed", lambda package: False)
        assert dispatch.explain(torch.device("cpu")) == '"auto" takes torch: numba is not installed'


PROGRAM = """
import sys
from transformers import AutoModelForCausalLM
from hf_sparse_attn import record_density
import torch
path, *rest = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse")
with torch.no_grad(), record_density(model) as density:
    model(torch.arange(100)[None])
print(__name__, sys.argv[0].rpartition("/")[2], rest, model.config.sparse_attention["window_size"])
print(density.density < 0.5)
sys.exit(int(rest[0]) if rest else 0)
"""


class TestRun:
    @pytest.fixture(autouse=True)
    def unwrapped(self, monkeypatch):
        monkeypatch.setattr(PreTrainedModel, "__init__", PreTrainedModel.__init__)

    @pytest.fixture
    def dense_path(self, tmp_path, tiny_llama_config):
        """A checkpoint that was never converted."""
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_config(copy.deepcopy(tiny_llama_config)).save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    FIELDS = json.dumps({"window_size": 7, "key_budget": 0, "dense_below": 0, "num_global_tokens": 1})

    def test_a_script(self, run_console, tmp_path, dense_path):
        (tmp_path / "program.py").write_text(PROGRAM)
        given = "--sparse-attention", self.FIELDS, tmp_path / "program.py", dense_path, "3", "--more"
        status, out, _ = run_console("run", *given)
        assert status == 3
        assert out.splitlines()[-2:] == ["__main__ program.py ['3', '--more'] 7", "True"]

    def test_a_module(self, run_console, tmp_path, dense_path, monkeypatch):
        (tmp_path / "a_program.py").write_text(PROGRAM)
        monkeypatch.chdir(tmp_path)
        status, out, _ = run_console("run", f"--sparse-attention={self.FIELDS}", "-m", "a_program", dense_path)
        assert status == 0
        assert out.splitlines()[-2:] == ["__main__ a_program.py [] 7", "True"]

    def test_in_a_process_of_its_own(self, tmp_path, dense_path):
        (tmp_path / "program.py").write_text(PROGRAM)
        command = [sys.executable, "-m", "hf_sparse_attn", "run", "--sparse-attention", self.FIELDS]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, tmp_path / "program.py", dense_path], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.splitlines()[-1] == "True"

    @pytest.mark.parametrize("error", ["ValueError('own')", "OSError('own')", "ImportError('own')", "KeyError('own')"])
    def test_its_errors_are_its_own(self, tmp_path, error):
        (tmp_path / "program.py").write_text(f"raise {error}")
        done = subprocess.run(
            [sys.executable, "-m", "hf_sparse_attn", "run", tmp_path / "program.py"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "hf-sparse-attn" not in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "expected a script, or -m and a module"),
            (("nowhere.py",), "argument SCRIPT: there is no file 'nowhere.py'"),
            (("-m",), "argument -m: expected the name of a module"),
            (("-m", "no.such.module"), "argument -m: there is no module 'no.such.module'"),
            (("--sparse-attention",), "argument --sparse-attention: expected a JSON object"),
            (("--sparse-attention", "{", "x.py"), "argument --sparse-attention: not valid JSON"),
            (
                ("--sparse-attention", '{"windw_size": 3}', "x.py"),
                "has no field 'windw_size'; did you mean window_size?",
            ),
            (("--other", "x.py"), "'--other' stands before the program"),
        ],
    )
    def test_mistakes(self, run_console, arguments, message):
        status, out, err = run_console("run", *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("hf-sparse-attn run: error: ")
        assert message in err
        assert err.count("\n") == 1

    def test_dense_models_are_left_alone(self, tiny_llama_config):
        from transformers import AutoModelForCausalLM

        run_program.set_for_new_models({"window_size": 7})
        dense = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_llama_config), attn_implementation="sdpa")
        assert not hasattr(dense.config, "sparse_attention")
        sparse = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_llama_config), attn_implementation="sparse")
        assert sparse.config.sparse_attention["window_size"] == 7


class TestFunctions:
    @pytest.mark.parametrize("name", hf_sparse_attn.__all__)
    def test_names(self, name):
        assert getattr(hf_sparse_attn, name).__doc__

    def test_other_names(self):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            hf_sparse_attn.nothing  # noqa: B018

    def test_load_model(self, tiny_model_path):
        model = hf_sparse_attn.load_model(str(tiny_model_path), {"window_size": 5}, dtype=torch.float64)
        assert model.config.sparse_attention["window_size"] == 5
        assert model(tokens(20)).logits.dtype == torch.float64

    def test_evaluate_perplexity(self, tiny_model_path, text_directory):
        found = hf_sparse_attn.evaluate_perplexity(
            str(tiny_model_path), str(text_directory), 100, max_documents=1, sparse_attention={"window_size": 5}
        )
        assert found["context_length"] == 100
        assert found["sparse_attention"]["window_size"] == 5

    def test_plot_pattern(self, tiny_model_path, text_directory, tmp_path):
        options = {"dataset": str(text_directory), "context_length": 100, "layers": [0, 1]}
        hf_sparse_attn.plot_pattern(str(tiny_model_path), tmp_path / "pattern.png", **options)
        assert (tmp_path / "pattern.png").stat().st_size > 1000

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context_length": 1}, "^context_length: must be at least 2"),
            ({"context_length": "many"}, "^context_length: must be an integer"),
            ({"device": "gpu"}, "^device: 'gpu' is not a device of this machine"),
            ({"sparse_attention": {"windw": 3}}, "no field 'windw'"),
        ],
    )
    def test_mistakes_are_value_errors(self, tiny_model_path, text_directory, options, message):
        with pytest.raises(ValueError, match=message) as error:
            hf_sparse_attn.evaluate_perplexity(str(tiny_model_path), str(text_directory), **options)
        assert isinstance(error.value, ArgumentError)
