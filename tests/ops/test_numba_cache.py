"""What Numba compiles is kept for the next process; if that or Numba itself fails, there is an answer all the same."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from hf_sparse_attn.ops.common import threads
from hf_sparse_attn.ops.numba import compiled_files as numba_cache
from hf_sparse_attn.ops.numba.kernels import compiled


def double(x):
    return 2 * x


def half(x):
    return x / 2


def add(x, y):
    return x + y


def hits(function=double):
    """Whether the next process finds a function's code. It gives the right answer in any case."""
    dispatcher = compiled(function)
    assert dispatcher(3.0) == function(3.0)
    return sum(dispatcher.stats.cache_hits.values())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    numba_cache._warn.cache_clear()
    return tmp_path


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_code_is_kept(folder):
    assert not hits()
    assert hits()
    assert compiled(double)(3) == 6  # another signature
    assert len(files(folder)) == 2


def test_constants_need_no_code_of_their_own(folder):
    inner = compiled(add)

    @numba.njit
    def outer(x):
        return inner(x, 1) + inner(x, 2) + inner(x, x)

    assert outer(3) == 15
    assert len(inner.signatures) == 1


DAMAGES = {
    "empty": lambda data: b"",
    "cut in the digest": lambda data: data[:10],
    "cut": lambda data: data[:-1],
    "garbage": lambda data: bytes(range(256)),
    "a wrong byte": lambda data: data[:-500] + bytes([data[-500] ^ 1]) + data[-499:],
    "never written": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_damaged_is_compiled_again(damage, folder):
    hits()
    (path,) = files(folder)
    path.write_bytes(damage(path.read_bytes()))
    assert not hits()
    assert hits()
    assert files(folder) == [path]


def refuse(monkeypatch, code=errno.ENOSPC):
    """A disk that takes half of what is written to it; root may write to a folder whatever its permissions are."""
    write = Path.write_bytes

    def write_bytes(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS], ids=os.strerror)
def test_where_nothing_can_be_written_one_warning_says_so(code, folder, monkeypatch, caplog):
    refuse(monkeypatch, code)
    assert not hits(double)
    assert not hits(half)
    (warning,) = caplog.messages
    for part in ("NUMBA_CACHE_DIR", str(folder), os.strerror(code)):
        assert part in warning
    assert not files(folder)


def test_what_is_kept_is_read_where_nothing_can_be_written(folder, monkeypatch, caplog):
    hits()
    refuse(monkeypatch)
    assert hits()
    assert not caplog.messages


def test_a_file_where_the_folder_should_be(folder, monkeypatch, caplog):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder / "file"))
    (folder / "file").touch()
    assert not hits()
    assert "NUMBA_CACHE_DIR" in caplog.text


@pytest.fixture
def no_wish(folder, monkeypatch):
    """A source in `folder` and a home in it, and no NUMBA_CACHE_DIR."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(numba_cache, "__file__", str(folder / "source" / "compiled_files.py"))
    monkeypatch.setattr(numba_cache, "AppDirs", lambda *_, **__: type("", (), {"user_cache_dir": str(folder / "home")}))
    (folder / "source").mkdir()
    return folder


def test_beside_the_source(no_wish):
    assert not hits()
    assert hits()
    (path,) = files(no_wish)
    assert path.parent == no_wish / "source" / "__pycache__"


def test_with_the_user_where_the_source_is_read_only(no_wish):
    (no_wish / "source" / "__pycache__").touch()
    assert not hits()
    assert hits()
    assert len(files(no_wish / "home")) == 1


def test_without_a_home(no_wish, monkeypatch, tmp_path, caplog):
    (no_wish / "source" / "__pycache__").touch()
    monkeypatch.setattr(numba_cache, "AppDirs", lambda *_, **__: type("", (), {"user_cache_dir": "~/.cache/numba"}))
    monkeypatch.chdir(tmp_path)
    assert not hits()
    assert "NUMBA_CACHE_DIR" in caplog.text
    assert not (tmp_path / "~").exists()


KERNEL = """

@compiled
def combine(a, b):
    store(a, 0, add(load(a, 0), load(b, 0)))
"""
COMBINE = """
import numpy as np
from hf_sparse_attn.ops.numba.kernels import combine
a, b = np.full(16, 5.0, np.float32), np.full(16, 3.0, np.float32)
combine(a, b)
print(a[0], sum(combine.stats.cache_hits.values()))
"""


@pytest.fixture
def sources(tmp_path):
    """A copy of what is compiled, with one function more, and nothing else of the package."""
    ops = tmp_path / "hf_sparse_attn" / "ops" / "numba"
    ops.mkdir(parents=True)
    common = ops.with_name("common")  # how its threads are found
    common.mkdir()
    for package in (ops, common, *list(ops.parents)[:2]):
        (package / "__init__.py").touch()
    for name in (*numba_cache._SOURCES, "compiled_files"):
        shutil.copy(Path(numba_cache.__file__).with_name(f"{name}.py"), ops)
    shutil.copy(threads.__file__, common)
    edit(ops / "kernels.py", "", KERNEL)
    return ops


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else text + new)


def start(sources):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command, folder = [sys.executable, "-c", COMBINE], sources.parents[2]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def combined(sources):
    with start(sources) as process:
        return process.communicate()[0].split()


def test_code_of_other_sources_is_not_run(sources):
    assert combined(sources) == ["8.0", "0"]
    assert combined(sources) == ["8.0", "1"]
    edit(sources / "simd.py", "return builder.fadd(*arguments)", "return builder.fsub(*arguments)")
    assert combined(sources) == ["2.0", "0"]
    edit(sources / "kernels.py", "add(load(a, 0), load(b, 0))", "add(load(b, 0), load(a, 0))")
    assert combined(sources) == ["-2.0", "0"]
    assert combined(sources) == ["-2.0", "1"]
    assert len(list((sources / "__pycache__").glob("*.combine.*"))) == 1


def test_processes_that_compile_at_the_same_time(sources):
    processes = [start(sources) for _ in range(3)]
    assert [process.communicate()[0].split()[0] for process in processes] == ["8.0"] * 3
    assert combined(sources) == ["8.0", "1"]


ATTEND = """
import torch
from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn import sparse_attention

def attend(implementation):
    config = SparseAttentionConfig(dense_below=0, window_size=8, key_budget=16, implementation=implementation)
    return sparse_attention(*torch.ones(3, 1, 2, 40, 8).cumsum(3), config=config)

torch.testing.assert_close(attend("auto"), attend("reference"))
attend("auto")
try:
    attend("numba")
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("fault", ["no compiler", "does not load"])
def test_a_numba_that_cannot_be_used(fault, tmp_path):
    """ "auto" means torch operations, with one warning; by name it is refused."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_DISABLE_JIT"}
    if fault == "no compiler":
        environment["NUMBA_DISABLE_JIT"], reason = "1", "NUMBA_DISABLE_JIT"
    else:
        reason = "Could not find/load shared object file"
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text(f"raise OSError({reason!r})")
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", ATTEND]
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (warning,) = [line for line in finished.stderr.splitlines() if "Numba" in line]
    (error,) = finished.stdout.splitlines()
    for message in (warning, error):
        assert "Numba is installed but cannot be used here" in message
        assert reason in message
    assert 'implementation="numba"' in error
    assert 'choose "auto" or "torch"' in error
