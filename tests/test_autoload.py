"""hf-sparse-attn-autoload in programs that do not know of it, each in a process of its own."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

FOLDER = ROOT / "hf-sparse-attn-autoload"
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sparse"))
assert model(torch.arange(40)[None]).logits.isfinite().all()
assert "_hf_sparse_attn_pattern" in vars(model.model.layers[0].self_attn)
"""
WAITS = "any(type(finder).__module__ == 'hf_sparse_attn_autoload' for finder in sys.meta_path)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which the package is installed: its module, and its metadata as in pyproject.toml."""
    project = pytest.importorskip("tomllib").loads((FOLDER / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    (site / "hf_sparse_attn_autoload.py").write_bytes((FOLDER / "hf_sparse_attn_autoload.py").read_bytes())
    metadata = site / f"hf_sparse_attn_autoload-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(points))
    return site


@pytest.fixture
def run(site, tmp_path):
    """Run a program with the package installed, and with the stubs of `tmp_path` before everything else."""

    def run(program, **environment):
        (tmp_path / "program.py").write_text(f"import sys\n{program}")
        path = os.pathsep.join([str(tmp_path), str(site), os.environ.get("PYTHONPATH", "")])
        finished = subprocess.run(
            [sys.executable, str(tmp_path / "program.py")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stderr

    return run


def stub(folder, name, text):
    """A package or module of this text."""
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(text)


def test_importing_torch_and_then_transformers(run):
    run(f"""
import torch
assert {WAITS}
assert not [name for name in ("transformers", "hf_sparse_attn") if name in sys.modules]
{MODEL}
assert not {WAITS}
""")


def test_transformers_models_import_torch(run):
    """The module that is waited for has begun when PyTorch calls the package."""
    run(f"""
assert "torch" not in sys.modules
import transformers.modeling_utils
assert {WAITS}
import torch
{MODEL}
assert not {WAITS}
""")


@pytest.mark.parametrize("switch", ["HF_SPARSE_ATTN_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_off(switch, run):
    program = f"import torch\nassert not {WAITS}\nfrom transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS"
    run(f"{program}\nassert 'sparse' not in ALL_ATTENTION_FUNCTIONS", **{switch: "0"})


def test_a_package_that_cannot_be_imported(run, tmp_path):
    stub(tmp_path, "hf_sparse_attn", "import nothing_of_that_name")
    told = run(f"""
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
assert "sparse" not in ALL_ATTENTION_FUNCTIONS
assert not {WAITS}
""")
    assert told.count("is not registered: ModuleNotFoundError: No module named 'nothing_of_that_name'") == 1


# What follows needs neither PyTorch nor Transformers themselves.
REGISTRY = "transformers.modeling_utils"
IS_REGISTERED = "'hf_sparse_attn' in sys.modules"


@pytest.fixture
def stubs(tmp_path):
    stub(tmp_path, "hf_sparse_attn", "from transformers.modeling_utils import registry")
    stub(tmp_path, "transformers", "")
    stub(tmp_path, REGISTRY, "registry = {}")
    return tmp_path


def test_registered_at_once_where_transformers_is_there(run, stubs):
    run(f"""
import {REGISTRY}
import hf_sparse_attn_autoload as auto
auto.install()
assert {IS_REGISTERED}
assert not {WAITS}
""")


def test_installed_twice(run, stubs):
    run(f"""
import hf_sparse_attn_autoload as auto
before = len(sys.meta_path)
auto.install()
auto.install()
assert len(sys.meta_path) == before + 1
import {REGISTRY}
assert {IS_REGISTERED}
assert len(sys.meta_path) == before
""")


def test_imported_by_the_program_itself(run, stubs):
    run(f"""
import hf_sparse_attn_autoload as auto
auto.install()
import hf_sparse_attn
assert hf_sparse_attn.registry == {{}}
assert not {WAITS}
""")


def test_transformers_that_fail_once(run, stubs):
    """The error is Transformers' own, and the next attempt registers."""
    path = stubs.joinpath(*REGISTRY.split("."), "__init__.py")
    path.write_text("import sys\nsys.attempts = getattr(sys, 'attempts', -1) + 1\nregistry = 1 // sys.attempts")
    run(f"""
import hf_sparse_attn_autoload as auto
auto.install()
try:
    import {REGISTRY}
except ZeroDivisionError:
    assert not {IS_REGISTERED}
    assert {WAITS}
import {REGISTRY}
assert {IS_REGISTERED}
""")


def test_no_other_finder_is_passed_over(run, stubs):
    """The import at which the waiting ends is of a module that only the next finder finds."""
    text = "import hf_sparse_attn_autoload as auto\nauto.install()\nregistry = {}"
    stubs.joinpath(*REGISTRY.split("."), "__init__.py").write_text(text)
    (stubs / "elsewhere").mkdir()
    (stubs / "elsewhere" / "only_here.py").touch()
    run(f"""
from importlib.machinery import PathFinder
import {REGISTRY}
assert {WAITS}

class Finder:
    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(stubs / "elsewhere")!r}])

sys.meta_path.insert(1, Finder())
import only_here
assert {IS_REGISTERED}
assert not {WAITS}
""")
