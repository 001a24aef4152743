"""Transformers' own tests of Llama and Mistral with SDPA, then with the sparse attention in its place.

A test that passes with SDPA has to pass with the sparse attention, whose rows read everything here: through the window,
through the routed keys, or as dense rows. Then the attention is broken on purpose, and some test has to notice.
The tests come from the source distribution of the Transformers that is installed.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from replacement import BROKEN, EVERYTHING

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
NEEDED = "parameterized==0.9.0"  # by Transformers' tests alone


def main():
    arguments = parse_arguments()
    subprocess.run([REPOSITORY / "scripts" / "setup.sh"], check=True)
    # Not resolved: the link is what makes it the environment's interpreter.
    python = REPOSITORY / os.environ.get("VENV", ".venv") / "bin" / "python"
    path = fetch(python, arguments.cache)
    result = compare(lambda *args, **kwargs: run(python, path, *args, **kwargs))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(report(result))


def parse_arguments():
    parser = argparse.ArgumentParser(prog="test_upstream.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="F", help="write counts and versions as JSON")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_sparse_attn" / "upstream"
    parser.add_argument(
        "--cache", type=Path, default=default, metavar="DIR", help=f"for the tests (default: {default})"
    )
    parser.error = lambda message: parser.exit(2, f"test_upstream.sh: error: {message}\n")
    arguments = parser.parse_args()
    if arguments.output and not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output {arguments.output}: its directory does not exist")
    if arguments.cache.exists() and not arguments.cache.is_dir():
        parser.error(f"--cache {arguments.cache} is no directory")
    return arguments


def fetch(python, cache):
    """Download and unpack what is not there yet; the directories to import from."""
    find = "import importlib.metadata; print(importlib.metadata.version('transformers'))"
    version = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.strip()
    sources, packages = cache.absolute() / f"transformers-{version}", cache.absolute() / NEEDED
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if not packages.is_dir():
        subprocess.run([*pip, "install", "--no-deps", "--target", packages, NEEDED], check=True)
    if not sources.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            from_source = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
            subprocess.run([*pip, "download", *from_source, "-d", partial, f"transformers=={version}"], check=True)
            with tarfile.open(next(Path(partial).glob("*.tar.gz"))) as archive:
                tests = [member for member in archive if member.name.startswith(f"{sources.name}/tests/")]
                archive.extractall(partial, tests, filter="data")
            (Path(partial) / sources.name).rename(sources)
    return [sources, packages, HERE]


def run(python, path, title, attention, broken=None, tests=()):
    """Run Transformers' tests, all or those named, in a process of their own; what became of each, and the versions."""
    print(f"== {title}", flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HUB_OFFLINE": "1",
        "RUN_TRAINING_TESTS": "1",
    }
    # Neither the configuration nor the fixtures of this repository's own tests.
    alone = ["-c", os.devnull, "--rootdir", HERE, "--confcutdir", HERE, "-p", "no:cacheprovider"]
    quiet = ["-q", "-W", "ignore", "--tb=no", "-rN"]
    selected = [f"{HERE / 'model_tests.py'}::{test}" for test in tests] or [HERE / "model_tests.py"]
    with tempfile.TemporaryDirectory() as directory:
        outcomes = Path(directory) / "outcomes.json"
        replacement = ["-p", "replacement", "--attention", attention, "--outcomes", outcomes]
        replacement += ["--broken", broken] if broken else []
        command = [python, "-m", "pytest", *alone, *quiet, *replacement, *selected]
        status = subprocess.run(command, env=environment, cwd=directory).returncode
        if status not in (0, 1):  # 1: some test failed
            sys.exit(f"test_upstream.sh: error: pytest could not run Transformers' tests (exit status {status})")
        return json.loads(outcomes.read_text())


def compare(run):
    sdpa = run("SDPA", "sdpa")
    reached = [name for name, test in sdpa["tests"].items() if test["attention_calls"]]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        **sdpa["versions"],
        "tests_that_call_attention": len(reached),
        "tests_with_output_attentions": sum(test["output_attentions"] for test in sdpa["tests"].values()),
        "sdpa": counts(sdpa["tests"]),
        "sparse": {},
        "broken": {},
    }
    for coverage in EVERYTHING:
        ours = run(f"sparse, {coverage}", coverage)["tests"]
        result["sparse"][coverage] = {**counts(ours), "differences": differences(sdpa["tests"], ours)}
    expected = {name: sdpa["tests"][name] for name in reached}
    for broken in BROKEN:
        ours = run(f"broken: {broken}", "dense", broken, reached)["tests"]
        result["broken"][broken] = {"noticed_by": len(differences(expected, ours))}
    return result


def counts(tests):
    found = Counter(test["outcome"] for test in tests.values())
    return {outcome: found[outcome] for outcome in ("passed", "failed", "skipped")}


def differences(expected, ours):
    """Tests that pass with SDPA and do not pass here, or that do not reach the attention here."""
    found = []
    for name, test in expected.items():
        mine = ours.get(name, {"outcome": "missing", "attention_calls": 0})
        if test["outcome"] != "passed":
            continue
        if mine["outcome"] != "passed":
            found.append({"test": name, "outcome": mine["outcome"], "reason": mine.get("reason", "")})
        elif test["attention_calls"] and not mine["attention_calls"]:
            found.append({"test": name, "outcome": "passed", "reason": "without a call of the attention"})
    return found


def report(result):
    """Print the result; the exit status."""
    print(f"\nTransformers {result['transformers']}, torch {result['torch']}, its tests of Llama and Mistral")
    print(f"{result['tests_that_call_attention']} of them call the attention, ", end="")
    print(f"{result['tests_with_output_attentions']} with output_attentions, which is left out\n")
    print(f"{'':31}{'passed':>9}{'failed':>9}{'skipped':>9}{'worse than SDPA':>17}")
    rows = {"SDPA": result["sdpa"], **{f"sparse, {name}": row for name, row in result["sparse"].items()}}
    for name, row in rows.items():
        worse = len(row["differences"]) if "differences" in row else ""
        print(f"{name:31}{row['passed']:9}{row['failed']:9}{row['skipped']:9}{worse:>17}")
    for name, row in result["broken"].items():
        noticed = row["noticed_by"]
        print(f"{'broken: ' + name:31} " + (f"noticed by {noticed} tests" if noticed else "NOT NOTICED"))
    worse = {name: row["differences"] for name, row in result["sparse"].items()}
    for name, found in worse.items():
        for test in found:
            print(f"\nsparse, {name}: {test['test']} {test['outcome']}: {test['reason']}")
    return int(any(worse.values()) or not all(row["noticed_by"] for row in result["broken"].values()))


if __name__ == "__main__":
    main()
