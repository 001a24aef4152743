"""The documentation site: needs the extra "docs", or else is skipped."""

import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from helpers.paths import ROOT, SCRIPTS

import hf_sparse_attn

for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package)


class Page(HTMLParser):
    """The anchors and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.text = set(), set(), text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        self.links |= {found[name] for name in ("href", "src") if found.get(name)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The built site's pages by path."""
    site = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def at(pages, name):
    (found,) = (page for path, page in pages.items() if path.as_posix().endswith(f"/{name}/index.html"))
    return found


def test_every_link_leads_somewhere(pages):
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path}: {link}"
            followed += 1
    assert followed > 500


def test_reference(pages):
    page = at(pages, "api")
    assert {f"hf_sparse_attn.{name}" for name in hf_sparse_attn.__all__} <= page.ids
    assert "Convert a dense checkpoint" in page.text
    assert ":::" not in page.text


def test_files_outside_docs(pages):
    assert "../files/examples/sparse_transformer.py/" in at(pages, "module").links
    assert "argparse" in at(pages, "examples/sparse_transformer.py").text
    assert "../../decoding/" in at(pages, "files/CHANGELOG").links
    notebook = at(pages, "examples/notebooks/finetune.ipynb")
    assert "../../../../finetuning/" in notebook.links
    assert "cell_type" not in notebook.text


class TestScript:
    def build(self, *arguments, **environment):
        return subprocess.run(
            [SCRIPTS / "build_docs.sh", *arguments],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin"} | environment,
        )

    def test_a_directory_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "notes.txt").write_text("kept")
        done = self.build(tmp_path, PYTHON=sys.executable)
        assert (done.returncode, (tmp_path / "notes.txt").read_text()) == (2, "kept")
        assert "holds something else than a site" in done.stderr

    def test_without_mkdocs(self, tmp_path):
        done = self.build(tmp_path, PYTHON="false")
        assert done.returncode == 2
        assert "pip install '.[docs]'" in done.stderr
