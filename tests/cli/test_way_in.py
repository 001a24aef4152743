"""What the commands' processes set before PyTorch is loaded, each in a process that ends there."""

import os
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT, SCRIPTS

VARIABLE = "OMP_WAIT_POLICY"
AT_FIRST_LIBRARY = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numba"):
            {action}
sys.meta_path.insert(0, Watch())
sys.argv = {argv!r}
"""
TELL = f"print(os.environ.get({VARIABLE!r}), flush=True); os._exit(0)"


def started(code, argv, action=TELL, **variables):
    """The process of some code whose first import of PyTorch or Numba acts so."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", AT_FIRST_LIBRARY.format(action=action, argv=argv) + code],
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def console():
    """What the installed `hf-sparse-attn` executes."""
    found = re.search(r'^hf-sparse-attn = "(\w+(?:\.\w+)*):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    return "from {} import {} as main; main()".format(*found.groups())


def script(name):
    return f"runpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')"


COMMANDS = sorted(path.name for path in SCRIPTS.glob("*.py") if "run_command" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_scripts(name):
    expected = "None" if name == "benchmark.py" else "PASSIVE"
    assert started(script(name), [name]).stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["convert"], "PASSIVE"), (["--help"], "PASSIVE"), ([], "PASSIVE"), (["benchmark"], "None"), (["run"], "None")],
    ids=str,
)
def test_console(arguments, expected):
    assert started(console(), ["hf-sparse-attn", *arguments]).stdout == f"{expected}\n"


def test_the_users_own_setting_stays():
    for code in (console(), script("convert.py")):
        assert started(code, ["hf-sparse-attn", "convert"], **{VARIABLE: "ACTIVE"}).stdout == "ACTIVE\n"


def test_the_library_sets_nothing():
    assert started("import hf_sparse_attn", [""]).stdout == "None\n"


def test_interrupted_while_loading():
    for code in (console(), script("convert.py")):
        done = started(code, ["hf-sparse-attn", "convert"], action="raise KeyboardInterrupt")
        assert (done.returncode, done.stderr) == (130, "")
