"""What a release promises about itself; scripts/check_release.sh runs this in the sdist, on the installed wheel."""

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT

import hf_sparse_attn

VERSION = hf_sparse_attn.__version__
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def project():
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def site():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def test_the_version_stands_in_one_place(project):
    assert project["project"]["dynamic"] == ["version"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(.+)"$', source, re.M) == [VERSION]
    assert VERSION not in (ROOT / "CITATION.cff").read_text() + (ROOT / "mkdocs.yml").read_text()


def test_the_changelog_tells_of_the_version():
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[0] == "Unreleased"
    assert sections[1] == VERSION


def test_types_are_for_others_too(project):
    assert (Path(hf_sparse_attn.__file__).parent / "py.typed").is_file()
    assert "hf_sparse_attn" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]


def test_citation(project):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"].partition(":")[0] == project["project"]["name"]
    assert citation["license"] == project["project"]["license"]


def test_tests_run_on_what_the_package_says_to_support(project):
    matrix = workflow("tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: "
    named = [name.removeprefix(prefix) for name in project["project"]["classifiers"] if name.startswith(prefix)]
    assert matrix["python"] == [name for name in named if "." in name]
    assert project["project"]["requires-python"] == f">={matrix['python'][0]}"
    (transformers,) = (name for name in project["project"]["dependencies"] if name.startswith("transformers"))
    assert matrix["transformers"] == [re.search(r">=([\d.]+)", transformers)[1] + ".0", "newest"]


def pages(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_every_page_is_in_the_navigation(site):
    found = pages(site["nav"])
    assert len(found) == len(set(found))
    inside = {page for page in found if not page.startswith("files/")} - {"index.md"}  # which is README.md
    assert inside == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    for page in set(found) - inside - {"index.md"}:
        path = ROOT / page.removeprefix("files/")
        assert path.is_file() or path.with_suffix("").is_file(), page  # only what is no Markdown has a suffix more
    assert {f"files/examples/notebooks/{path.name}.md" for path in NOTEBOOKS} <= set(found)


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: hf_sparse_attn\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(hf_sparse_attn.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
