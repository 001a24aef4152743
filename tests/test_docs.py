"""The Python blocks of pages of docs/, run in the order in which they stand."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ["module.md"]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page):
    names = {}
    text = (DOCS / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        line = text[: block.start(1)].count("\n")  # so that errors name the page's own line
        exec(compile("\n" * line + block[1], page, "exec"), names)
