import pytest
import yaml

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.calibration.budget_allocation import Allocation
from hf_sparse_attn.calibration.convert import Conversion
from hf_sparse_attn.calibration.model_card import describe_budgets, write_model_card
from hf_sparse_attn.calibration.refit import MovedLayer, Refit

CHOICE = Allocation(((64, 0), (512, 128)), ((0.0,) * 4,) * 2, (), 176.0, 0.1914, 0.00123)
TRADE = [
    Allocation(((0, 0), (0, 0)), ((0.0,) * 4,) * 2, (), 0.0, 0.0737, 0.25),
    Allocation(((8, 8), (8, 8)), ((0.0,) * 4,) * 2, (1,), 4.0, 0.4996, 0.0),
]
RESULT = {
    "context_length": 8192,
    "tokens": 16382,
    "dense": {"perplexity": 9.87654, "nll": 2.29, "seconds": 1.0},
    "sparse": {"perplexity": 10.12345, "nll": 2.31, "seconds": 1.0, "density": 0.18765, "scored_density": 0.22222},
    "perplexity_ratio": 1.025,
    "delta_nll": {"mean": 0.0247, "ci95": [-0.001, 0.05], "method": "bootstrap over 2 documents"},
    "kl": {"mean": 0.00345, "median": 0.000456, "p99": 0.0567, "p99.9": 0.678},
    "top1_agreement": 0.98765,
    "by_position": [{"start": 1, "end": 4097, "dense_nll": 2.3, "sparse_nll": 2.2, "ratio": 0.99}],
    "documents": [
        {"name": "whale", "tokens": 8191, "dense_nll": 2.1, "sparse_nll": 2.2, "perplexity_ratio": 1.1052},
        {"name": "ghost", "tokens": 8191, "dense_nll": 2.5, "sparse_nll": 2.4, "perplexity_ratio": 0.9048},
    ],
    "worst_document": "whale",
}


def card(path, **changes):
    """Front matter and the text, its lines joined."""
    conversion = Conversion(
        output=path,
        config=changes.pop("config", SparseAttentionConfig(dense_below=1000, key_budget=CHOICE.key_budget)),
        trade=TRADE,
        choice=CHOICE,
        evaluation=changes.pop("result", RESULT),
        local_layers=changes.pop("local_layers", ()),
        refit=changes.pop("refit", None),
    )
    arguments = {
        "source": "someone/model",
        "calibration": ["emma", "ulysses"],
        "environment": {"date": "2026-01-02", "device": "a machine", "torch": "2.0", "transformers": "5.0"},
    }
    write_model_card(path / "README.md", conversion=conversion, **arguments | changes)
    text = (path / "README.md").read_text()
    assert "{{" not in text
    assert "{%" not in text
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_what_is_read(tmp_path):
    _, body = card(tmp_path)
    words = " ".join(body.split())
    assert "window of 256 keys, 16 global tokens and, of on average 176 keys" in words
    assert "(0 to 512, fitted for each KV head)" in words
    assert "Queries at positions under 1000 read everything." in words


def test_local_layers_are_told_apart_from_dense_ones(tmp_path):
    config = SparseAttentionConfig(dense_below=1000, dense_layers=(0, 2, 3), key_budget=CHOICE.key_budget)
    _, body = card(tmp_path, config=config, local_layers=(0, 3))
    words = " ".join(body.split())
    assert "as do all queries of the layers 2." in words
    assert "sliding window of the layers 0, 3 is small and is read whole" in words


def test_dense_layers(tmp_path):
    _, body = card(
        tmp_path, config=SparseAttentionConfig(dense_below=1000, dense_layers=(0, 3), key_budget=CHOICE.key_budget)
    )
    assert "read everything, as do all queries of the layers 0, 3." in " ".join(body.split())


def test_measured_figures(tmp_path):
    _, body = card(tmp_path)
    for row in (
        "| perplexity | 9.8765 | 10.1235 |",
        "| density (attended / admissible pairs) | 1 | 0.1877 |",
        "| scored / admissible pairs | 1 | 0.2222 |",
        "| 0.00345 | 0.000456 | 0.0567 | 0.678 | 98.77% |",
        "| whale | 2.1000 | 2.2000 | 1.1052 |",
        "| ghost | 2.5000 | 2.4000 | 0.9048 |",
        "| 1 to 4096 | 2.3000 | 2.2000 | 0.9900 |",
    ):
        assert row in body.splitlines()
    words = " ".join(body.split())
    assert "2 document(s) of 8192 tokens that calibrated nothing (whale, ghost)" in words
    assert "+0.02470 nats, 95% interval -0.00100 to +0.05000 (bootstrap over 2 documents)." in words
    assert "Worst document: whale." in words
    assert "Calibrated on 2 document(s): emma, ulysses. 2026-01-02, a machine, torch 2.0, transformers 5.0." in words


@pytest.mark.parametrize(
    "result",
    [None, RESULT | {"delta_nll": RESULT["delta_nll"] | {"mean": -0.01}}],
    ids=["not measured", "no rise was measured"],
)
def test_trade_table(tmp_path, result):
    lines = card(tmp_path, result=result)[1].splitlines()
    first = lines.index("| density | predicted rise of the loss, nats per token | candidates per row |")
    assert lines[first + 1 : first + 6] == [
        "|---|---|---|",
        "| 0.074 | 0.25000 | 0 |",
        "| 0.500 | 0.00000 | 4 |",
        "| 0.191 (chosen) | 0.00123 | 176 |",
        "",
    ]
    assert [line.partition("](")[2] for line in lines if line.startswith("![")] == ["trade.png)", "heads.png)"]


def test_trade_table_with_the_factor_that_was_measured(tmp_path):
    lines = card(tmp_path)[1].splitlines()
    first = lines.index("| density | predicted rise of the loss, nats per token | expected | candidates per row |")
    factor = 0.0247 / 0.00123
    assert f"measured {factor:.2f} times the predicted rise" in " ".join(lines)
    assert lines[first + 1 : first + 5] == [
        "|---|---|---|---|",
        f"| 0.074 | 0.25000 | {0.25 * factor:.5f} | 0 |",
        "| 0.500 | 0.00000 | 0.00000 | 4 |",
        "| 0.191 (chosen) | 0.00123 | 0.02470 | 176 |",
    ]


def test_what_a_refit_moved(tmp_path):
    layers = MovedLayer(0, 0.004, 0.003, False, False, 3, 4), MovedLayer(2, 0.001, 0.0, False, True, 0, 4)
    _, body = card(tmp_path, refit=Refit(TRADE[0], TRADE[1], CHOICE, layers))
    section = body.split("## What the refit moved\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ") and "predicted rise" not in line] == [
        "| old hash, old choice | 0.25 | 0.074 | 0 |",
        "| new hash, old choice | 0 | 0.500 | 4 |",
        "| new hash, new choice | 0.00123 | 0.191 | 176 |",
        "| 0 | 0.004 | 0.003 | 3 of 4 heads |",
        "| 2 | 0.001 | 0 | became dense |",
    ]


def test_a_first_conversion_has_no_such_section(tmp_path):
    assert "refit" not in card(tmp_path)[1]


def test_nothing_measured(tmp_path):
    _, body = card(tmp_path, result=None)
    assert "Not measured. Run `scripts/eval_perplexity.py`" in body
    assert "perplexity |" not in body


@pytest.mark.parametrize(
    ("source", "title", "base_model"),
    [("someone/model", "someone/model", "someone/model"), ("demo", "SmolLM2-135M-Instruct", None)],
)
def test_source(tmp_path, source, title, base_model):
    front, body = card(tmp_path, source=source)
    assert f"# {title}, converted" in body
    assert front.get("base_model") == base_model
    assert "sparse-attention" in front["tags"]


def test_a_local_source_does_not_tell_where_it_was(tmp_path):
    (tmp_path / "mine").mkdir()
    front, body = card(tmp_path, source=str(tmp_path / "mine"))
    assert "# mine, converted" in body
    assert "base_model" not in front
    assert str(tmp_path) not in body


def test_source_given_as_a_dot_or_from_home(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (".", "~/mine"):
        front, body = card(tmp_path, source=source)
        assert "# mine, converted" in body
        assert "base_model" not in front


HOSTILE = {
    "a|b": r"a\|b",
    "a\nb\r\n\n# c": "a b # c",
    "<script>alert(1)</script>": r"&lt;script&gt;alert\(1\)&lt;/script&gt;",
    "`code`": r"\`code\`",
    "[x](javascript:alert)": r"\[x\]\(javascript:alert\)",
    "![x](http://y)": r"!\[x\]\(http://y\)",
    "&lt; *b* __i__ ~s~ $$m$$ \\": r"&amp;lt; \*b\* \_\_i\_\_ \~s\~ \$\$m\$\$ \\",
    "---\nbase_model: other": r"--- base\_model: other",
    "\u202e\x00\x1b[31m": r"\[31m",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_mere_text(tmp_path, name):
    document = RESULT["documents"][0] | {"name": name}
    result = RESULT | {"documents": [document], "worst_document": name}
    front, body = card(tmp_path, calibration=[name], result=result, source=name)
    safe = HOSTILE[name]
    assert f"| {safe} | 2.1000 | 2.2000 | 1.1052 |" in body.splitlines()
    assert f"# {safe}, converted to sparse attention" in body.splitlines()
    words = " ".join(body.split())
    assert f"calibrated nothing ({safe})" in words
    assert f"Worst document: {safe}." in words
    assert f"document(s): {safe}. 2026" in words
    assert "base_model" not in front
    assert name not in body.replace(safe, "")


def test_described_budgets_are_those_of_sparse_layers():
    config = SparseAttentionConfig(key_budget=((8, 16), (40, 40), (0, 0)), dense_layers=(1,))
    assert describe_budgets(config) == {"mean": 6, "min": 0, "max": 16}


def test_described_budgets_of_a_dense_model():
    config = SparseAttentionConfig(key_budget=((8,),), dense_layers=(0,))
    assert describe_budgets(config) == {"mean": 0, "min": 0, "max": 0}
