"""MkDocs' hook: README.md is the front page, and files outside docs/ that pages link to come along under files/.

Markdown stays as it is, a notebook becomes a page, other files are shown as code, and a directory as a list of links.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FIRST = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/notebooks")
LINK = re.compile(r"(?<=\]\()(?!\w+:|[#/])[^)#\s]+")  # of [text](target#anchor) the target, unless it is an URL
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json"}


def page_of(path: str) -> str:
    """The site's source for a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def text_of(path: str) -> str:
    """The page that shows a file or a directory of the repository."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if not entry.name.startswith((".", "_")))
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(source if kind == "markdown" else _code(source, "python") for kind, source in cells)
    return text if file.suffix == ".md" else f"# {path}\n\n{_code(text, LANGUAGES.get(file.suffix, 'text'))}"


def _code(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````\n"


def targets(path: str, text: str) -> Iterator[tuple[re.Match[str], str]]:
    """The links of a page to what the repository has, with its path there."""
    if not path.endswith((".md", ".ipynb")) and not (ROOT / path).is_dir():
        return
    base = path if (ROOT / path).is_dir() else posixpath.dirname(path)
    for link in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(base, link[0]))
        if not target.startswith("..") and (ROOT / target).exists():
            yield link, target


def on_files(files: Any, config: Any) -> Any:
    """Add what is linked to, and what that links to."""
    sources = {page_of(path): path for path in (f"docs/{page.src_uri}" for page in files.documentation_pages())}
    waiting = [*sources.values(), *FIRST]
    while waiting:
        path = waiting.pop()
        text = text_of(path)
        waiting += [to for _, to in targets(path, text) if page_of(to) not in sources and not to.startswith("docs/")]
        if not path.startswith("docs/") and page_of(path) not in sources:
            files.append(File.generated(config, page_of(path), content=text))
        sources[page_of(path)] = path
    config.extra["sources"] = sources
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to the repository's files into links to their pages."""
    here, done, stop = posixpath.dirname(page.file.src_uri), [], 0
    for link, target in targets(config.extra["sources"][page.file.src_uri], markdown):
        done += [markdown[stop : link.start()], posixpath.relpath(page_of(target), here or ".")]
        stop = link.end()
    return "".join([*done, markdown[stop:]])
