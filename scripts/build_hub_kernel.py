"""Write this package as a kernel for the Hugging Face Hub, which needs no installation:

    python scripts/build_hub_kernel.py --output build/hub_kernel

docs/hub_kernel.md says how it is used and uploaded. The kernel holds the modules that the attention needs, in the
layout of kernels without compiled parts: build/torch-BACKEND/ with an `__init__.py` and a metadata.json. A kernel is
imported under a name of its own, so imports of the package become relative ones.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_sparse_attn"
NAME = "hf-sparse-attn"
VERSION = 1  # the one that Transformers asks for; its files belong on the branch v1
BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")
ENTRY = f"{PACKAGE}.hub_kernel"  # becomes the kernel's `__init__`
BY_NAME = ("import_module", "find_spec", "__import__")

CARD = """\
---
library_name: kernels
license: apache-2.0
tags: [kernels, sparse-attention]
---

# hf-sparse-attn

Sparse window + global + LSH attention for Transformers, built from hf_sparse_attn {version}. Load a model with
`from_pretrained(..., attn_implementation="ORG/hf-sparse-attn", allow_all_kernels=True)`, ORG being the owner of this
repository. It needs Transformers 5.17 or later and `kernels`; on CPUs, Numba makes it several times faster.
"""


class BuildError(Exception):
    """The source cannot be made a kernel; the message names the file and the line."""


def file_of(module: str, root: Path = ROOT) -> Path | None:
    """The source of a module or package; None if there is none."""
    path = root.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def needed_modules(root: Path = ROOT) -> set[str]:
    """What `ENTRY` imports, directly or not, at once or later; implementations of `ops` are imported by their names."""
    waiting = [ENTRY, *(_module_of(path, root) for path in sorted((root / PACKAGE / "ops").rglob("*.py")))]
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module == PACKAGE or module in found:
            continue
        found.add(module)
        waiting += [module.rpartition(".")[0], *_imported(module, root)]
    return found


def _module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(module: str, root: Path) -> Iterator[str]:
    for node in _own_imports(ast.parse(_source(module, root))):
        assert node.module is not None
        yield node.module
        yield from (name for alias in node.names if file_of(name := f"{node.module}.{alias.name}", root))


def _own_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_own(node.module or ""):
            yield node


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _source(module: str, root: Path) -> str:
    file = file_of(module, root)
    if file is None:
        raise BuildError(f"{module} is imported and does not exist")
    return file.read_text(encoding="utf-8")


def with_relative_imports(source: str, package: str, file: str = "source") -> str:
    """A module's source, with every `from hf_sparse_attn.a import b` made relative and all else as it is.

    Args:
        source: text of a module.
        package: the package that the module is in, such as hf_sparse_attn.ops; of a package's `__init__`, it itself.
        file: what errors call it.

    Raises:
        BuildError: the package is imported in a way that has no relative form.
    """
    tree = ast.parse(source)
    _refuse_what_stays_absolute(tree, file)
    lines = source.encode().splitlines(keepends=True)  # columns of a tree count bytes
    for node in sorted(_own_imports(tree), key=lambda node: -node.col_offset):  # several on a line: from its end
        line, start = lines[node.lineno - 1], node.col_offset
        old = re.match(rb"from\s+([\w.]+)(?=\s+import\b)", line[start:])
        if old is None or old[1].decode() != node.module:
            raise BuildError(f"{file}:{node.lineno}: `from {node.module} import` must stand on one line")
        new = f"from {_relative(node.module, package)}".encode()
        lines[node.lineno - 1] = line[:start] + new + line[start + old.end() :]
    return b"".join(lines).decode()


def _relative(module: str, package: str) -> str:
    here, there = package.split("."), module.split(".")
    common = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    return "." * (len(here) - common + 1) + ".".join(there[common:])


def _refuse_what_stays_absolute(tree: ast.AST, file: str) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_is_own(alias.name) for alias in node.names):
            raise BuildError(f"{file}:{node.lineno}: `import {PACKAGE}...` has no relative form; use `from ... import`")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == PACKAGE:
            other = next((alias.name for alias in node.names if file_of(f"{PACKAGE}.{alias.name}") is None), None)
            if other is not None:
                raise BuildError(f"{file}:{node.lineno}: {other} is no module, and a kernel has another __init__")
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(isinstance(text, str) and _is_own(text) for text in texts):
                raise BuildError(f"{file}:{node.lineno}: `{ast.unparse(node)}` must begin with __package__")


def kernel_files(root: Path = ROOT) -> dict[str, bytes]:
    """The kernel's Python files by their paths in it."""
    files = {}
    for module in sorted(needed_modules(root)):
        file = file_of(module, root)
        assert file is not None
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        path = file.relative_to(root / PACKAGE).as_posix()
        text = with_relative_imports(_source(module, root), package, path)
        files["__init__.py" if module == ENTRY else path] = text.encode()
    return files


def metadata(files: dict[str, bytes], backend: str) -> dict[str, object]:
    """A variant's metadata.json. Its `id`, as which it is imported, is another one for other files."""
    digests = {path: hashlib.sha256(data).digest() for path, data in files.items()}
    whole = hashlib.sha256(b"".join(path.encode() + digest for path, digest in sorted(digests.items()))).hexdigest()
    return {
        "name": NAME,
        "id": f"_{PACKAGE}_{backend}_{whole[:12]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(digest).decode() for path, digest in digests.items()},
        },
    }


def build(output: Path, backends: Iterable[str] = BACKENDS, root: Path = ROOT) -> None:
    """Write the kernel to a directory that does not exist yet, whole or not at all.

    Raises:
        BuildError: the source cannot be made a kernel.
        OSError: it cannot be written.
    """
    files = kernel_files(root)
    (version,) = re.findall(r'^__version__ = "(.+)"$', (root / PACKAGE / "__init__.py").read_text(), re.M)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.unfinished-") as temporary:
        finished = Path(temporary, "kernel")
        for backend in backends:
            variant = finished / "build" / f"torch-{backend}"
            described = json.dumps(metadata(files, backend), indent=2).encode() + b"\n"
            for path, data in {**files, "metadata.json": described}.items():
                (variant / path).parent.mkdir(parents=True, exist_ok=True)
                (variant / path).write_bytes(data)
        (finished / "README.md").write_text(CARD.format(version=version), encoding="utf-8")
        finished.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="Where to write the kernel.")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="Devices it is for (default: all)."
    )
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.exit(2, f"build_hub_kernel.py: error: argument --output: {str(arguments.output)!r} exists already\n")
    try:
        build(arguments.output, arguments.backends)
    except (BuildError, OSError) as error:
        parser.exit(2, f"build_hub_kernel.py: error: {error}\n")
    print(f"{arguments.output}: kernel {NAME}, version {VERSION}, for {', '.join(arguments.backends)}")


if __name__ == "__main__":
    main()
