"""Every model family on every path, against the specification or the error that is declared for it.

`python -m pytest tests/test_matrix.py -k test_cell --write-support-table` writes docs/support.md, if all cells pass.
"""

import inspect
import re

import pytest
import torch
from helpers.batches import tokens
from helpers.families import FAMILIES, tiny_model
from helpers.specification import dense_logits, logits
from matrix import DECLARED, EVERY_FAMILY, PATHS, Outcome, declared, table

CELLS = [(family, path) for path in PATHS for family in FAMILIES]


@pytest.fixture(scope="session")
def passed(request):
    """The cells that passed; at the end the table is written, if that was asked for and none is missing."""
    cells = set()
    yield cells
    if request.config.getoption("--write-support-table"):
        assert cells == set(CELLS), "docs/support.md is not written: some cells failed or did not run"
        table.write()


@pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "path"), CELLS, ids=lambda value: value.replace(" ", "_"))
def test_cell(family, path, passed):
    check, outcome = PATHS[path], declared(family, path)
    if outcome.symbol == "yes":
        check(family)
    else:
        options = [{}] if outcome.symbol == "refused" else [{}, {"implementation": "eager"}]
        for implementation in options:
            with pytest.raises(outcome.error, match=f"^{re.escape(outcome.message)}$"):
                check(family, **implementation)
    passed.add((family, path))


def test_only_existing_cells_are_declared():
    for family, path in DECLARED:
        assert path in PATHS
        assert family in (*FAMILIES, EVERY_FAMILY)


@pytest.mark.parametrize("path", PATHS)
def test_each_path_says_what_it_means(path):
    assert inspect.getdoc(PATHS[path]).endswith(".")


def test_the_support_table_agrees_with_the_cells():
    assert table.without_versions(table.FILE.read_text()) == table.without_versions(table.render()), (
        "docs/support.md is out of date: python -m pytest tests/test_matrix.py -k test_cell --write-support-table"
    )


def test_the_support_table_names_each_path_once():
    text = table.render()
    for path in PATHS:
        assert text.count(f"**{path}**") == 1


def test_an_exception_comes_first(monkeypatch):
    works, fails = "## What works with every family", Outcome("refused", "no beams for you")
    assert table.render().index(works) < table.render().index("**beam search**")
    monkeypatch.setitem(DECLARED, ("gemma2", "beam search"), fails)
    monkeypatch.setitem(DECLARED, ("gpt_oss", "beam search"), fails)
    text = table.render()
    [row] = [line for line in text.splitlines() if "**beam search**" in line]
    assert row.endswith("| gemma2, gpt_oss | `ValueError: no beams for you` |")
    assert text.index(row) < text.index(works)


FULL_ROTATION = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral-sliding", {"sliding_window": None}),
        ("qwen2-mixed", {"sliding_window": 99}),
        ("phi3-sliding", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 99}),
        ("gemma3", {"sliding_window": 99}),
        ("gpt_oss", {"sliding_window": 99}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("gemma3", {"query_pre_attn_scalar": 8}),
        ("phi3", FULL_ROTATION),
        ("gpt_oss", FULL_ROTATION),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_sets_a_family_apart_shows(family, change, monkeypatch):
    """A path that ignored it would be noticed."""
    ids = tokens(40, 2)
    before = dense_logits(family, ids)
    config_class, model_class, fields = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (config_class, model_class, {**fields, **change}))
    assert (dense_logits(family, ids) - before)[:, 20:].abs().amax() > 0.1


def test_sinks_show():
    ids, model = tokens(40, 2), tiny_model("gpt_oss", "eager")
    before = logits(model, ids)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-torch.inf)
    assert (logits(model, ids) - before)[:, 20:].abs().amax() > 0.1
