"""A kernel's files are the package's, with relative imports that mean the same."""

import ast
import json
import subprocess
import sys
from importlib.util import resolve_name

import pytest
from helpers.paths import ROOT, SCRIPTS, script_module

import hf_sparse_attn

script = script_module("build_hub_kernel")


@pytest.fixture(scope="module")
def files():
    return script.kernel_files()


CHANGED = {
    "from hf_sparse_attn.config import A": "from .config import A",
    "from hf_sparse_attn import ops": "from . import ops",
    "from hf_sparse_attn import ops as _ops": "from . import ops as _ops",
    "from hf_sparse_attn.ops import (\n    a,  # why\n    b,\n)": "from .ops import (\n    a,  # why\n    b,\n)",
    "def f():\n    from hf_sparse_attn.ops import a": "def f():\n    from .ops import a",
    "from  hf_sparse_attn.ops  import a": "from .ops  import a",
    "from hf_sparse_attn.a import b; from hf_sparse_attn.c import d": "from .a import b; from .c import d",
    "x = 'äö'; from hf_sparse_attn.a import b": "x = 'äö'; from .a import b",
}
UNCHANGED = [
    "import torch\r\nfrom torch import nn\r\n",
    "from hf_sparse_attn_command import main",
    '"""\nfrom hf_sparse_attn.config import A\n"""',
    "x = 1  # from hf_sparse_attn.config import A",
    "from .config import A",
    "getLogger('hf_sparse_attn')",
]


@pytest.mark.parametrize(("source", "expected"), CHANGED.items(), ids=range(len(CHANGED)))
def test_imports_that_change(source, expected):
    assert script.with_relative_imports(source, "hf_sparse_attn") == expected


@pytest.mark.parametrize("source", UNCHANGED, ids=range(len(UNCHANGED)))
def test_what_stays(source):
    assert script.with_relative_imports(source, "hf_sparse_attn") == source


@pytest.mark.parametrize(
    ("module", "package", "expected"),
    [
        ("hf_sparse_attn.ops.common.call", "hf_sparse_attn.ops.numba", "..common.call"),
        ("hf_sparse_attn.ops.numba.simd", "hf_sparse_attn.ops.numba", ".simd"),
        ("hf_sparse_attn.ops", "hf_sparse_attn.ops", "."),
        ("hf_sparse_attn.config", "hf_sparse_attn.ops.numba", "...config"),
        ("hf_sparse_attn", "hf_sparse_attn.ops", ".."),
    ],
)
def test_levels(module, package, expected):
    name = "ops" if module == "hf_sparse_attn" else "name"
    found = script.with_relative_imports(f"from {module} import {name}", package)
    assert found == f"from {expected} import {name}"
    assert resolve_name(expected, package) == module


REFUSED = {
    "import hf_sparse_attn": "has no relative form",
    "import torch, hf_sparse_attn.ops as o": "has no relative form",
    "from hf_sparse_attn import __version__": "__version__ is no module",
    "from \\\n hf_sparse_attn.config import A": "must stand on one line",
    "import_module('hf_sparse_attn.ops.torch')": "must begin with __package__",
    "importlib.import_module(f'hf_sparse_attn.ops.{name}')": "must begin with __package__",
    "find_spec('hf_sparse_attn')": "must begin with __package__",
}


@pytest.mark.parametrize(("source", "message"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_cannot_be_relative(source, message):
    with pytest.raises(script.BuildError, match=rf"^here\.py:2: .*{message}"):
        script.with_relative_imports(f"\n{source}", "hf_sparse_attn", "here.py")


def resolved(source, package):
    """A module's tree, without positions, whose relative imports are made absolute again."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            node.module = resolve_name("." * node.level + (node.module or ""), package)
            node.level = 0
    return ast.dump(tree)


def test_every_module_means_the_same(files):
    for path, data in files.items():
        original = "hub_kernel.py" if path == "__init__.py" else path
        package = ".".join(["hf_sparse_attn", *original.split("/")[:-1]])
        source = (ROOT / "hf_sparse_attn" / original).read_text()
        assert resolved(data.decode(), package) == resolved(source, package), path
        assert len(data.decode().splitlines()) == len(source.splitlines())


def test_what_is_in_a_kernel(files):
    assert {"integration.py", "ops/numba/kernels.py", "ops/triton/forward.py", "cache/policies.py"} <= files.keys()
    assert not [path for path in files if path.startswith(("cli/", "calibration/", "training/", "hub_kernel"))]


def test_a_module_that_is_missing(tmp_path):
    (tmp_path / "hf_sparse_attn" / "ops").mkdir(parents=True)
    (tmp_path / "hf_sparse_attn" / "hub_kernel.py").write_text("from hf_sparse_attn.nothing import a\n")
    with pytest.raises(script.BuildError, match=r"hf_sparse_attn\.nothing is imported and does not exist"):
        script.kernel_files(tmp_path)


def test_metadata(files):
    described = script.metadata(files, "cpu")
    assert described["name"] == "hf-sparse-attn"
    assert described["version"] == 1
    assert described["id"].isidentifier()
    assert described == script.metadata(dict(reversed(files.items())), "cpu")
    assert described["id"] != script.metadata({**files, "config.py": b""}, "cpu")["id"]
    assert described["id"] != script.metadata(files, "cuda")["id"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "new" / "kernel"
    command = [sys.executable, SCRIPTS / "build_hub_kernel.py", "--output", output, "--backends", "cpu", "cuda"]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return output


def test_layout(built, files):
    assert sorted(path.name for path in (built / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    assert [path.name for path in built.parent.iterdir()] == ["kernel"]
    for backend in ("cpu", "cuda"):
        variant = built / "build" / f"torch-{backend}"
        assert json.loads((variant / "metadata.json").read_text()) == script.metadata(files, backend)
        assert {path.relative_to(variant).as_posix() for path in variant.rglob("*.*")} == {*files, "metadata.json"}
    assert hf_sparse_attn.__version__ in (built / "README.md").read_text()


def test_metadata_as_kernels_reads_it(built):
    """Its own parser takes it, and its own digest of the files is the one that stands there."""
    native = pytest.importorskip("kernels._rust", reason="pip install kernels")
    variant = built / "build" / "torch-cpu"
    described = native.Metadata.read_from_file(variant / "metadata.json")
    assert str(described.name) == "hf-sparse-attn"
    described.digest.validate(native.Digest.hash_variant(native.DigestAlgorithm.SHA256, variant))


def test_an_output_that_exists(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build_hub_kernel.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        script.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        f"build_hub_kernel.py: error: argument --output: {str(tmp_path)!r} exists already\n"
    )


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CARD", "{nothing}")
    with pytest.raises(KeyError):
        script.build(tmp_path / "kernel")
    assert not list(tmp_path.iterdir())
