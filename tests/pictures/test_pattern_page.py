import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.families import VOCABULARY, tiny_model
from helpers.pages import SCRIPT, embedded

import hf_sparse_attn
from hf_sparse_attn.integration import observe, record
from hf_sparse_attn.ops.reference import attended_keys, scored_keys
from hf_sparse_attn.patterns.seeded_random import SeededRandom
from hf_sparse_attn.pictures import (
    KINDS,
    LayerMass,
    PageDocument,
    RowKeys,
    RowReader,
    Token,
    render_page,
    spread_rows,
    write_page,
)

LENGTH = 60
FIELDS = {"dense_below": 9, "num_random_keys": 3, "stride": 13, "min_weight": 0.02}
HOSTILE = (
    "</script><script>document.title='x'</script><!-- \"quotes' & {{data}} \U0001f642 \u05e9\u05dc\u05d5\u05dd \u2028\\"
)


def read(model, rows, layers=(0, 1), heads=(0, 3), num_missed=4):
    """The reader of one document and, by layer, what the attention was given."""
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    reader = RowReader(LENGTH, rows, layers, heads, num_missed)
    given = {}

    def observer(pattern, query, key, value, scaling, output):
        given[pattern.layer_idx] = pattern, query[0], key[0], scaling

    with torch.no_grad(), record(model, reader), observe(model, reader.observe), observe(model, observer):
        model.base_model(input_ids=ids, use_cache=False)
    return reader, given


def page_of(reader):
    tokens = [Token(str(i)) for i in range(LENGTH)]
    return embedded(render_page(PageDocument("name", "model", {}, tokens), reader.layers, reader.rows))


def expected_kind(row, key, fields, is_read, is_scored, own_dense):
    if not is_read:
        return "light" if is_scored else "unscored"
    if own_dense or row < fields["dense_below"]:
        return "dense"
    if key > row - fields["window_size"]:
        return "window"
    if key < fields["num_global_tokens"] or key % fields["stride"] == 0:
        return "static"
    drawn = SeededRandom(fields["num_random_keys"], 0, None).keys(torch.tensor([row]))
    return "own" if key in drawn else "routed"


@pytest.mark.parametrize(
    ("family", "dtype", "fields"),
    [
        ("llama", torch.float64, {}),
        ("llama", torch.float32, {"implementation": "reference"}),
        ("llama", torch.float64, {"min_weight": 0.0}),
        ("llama", torch.float64, {"dense_layers": [1]}),
        ("mistral-sliding", torch.float64, {}),
        ("gemma2", torch.float64, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).removeprefix("torch."),
)
def test_numbers_are_those_of_the_specification(family, dtype, fields):
    model = tiny_model(family, dtype=dtype, **FIELDS)
    model.config.sparse_attention |= fields
    fields = model.config.sparse_attention
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    rows = range(LENGTH)
    reader, given = read(model, rows)
    page = page_of(reader)
    assert page["rows"] == list(rows)
    assert set(page["pictures"]) == {(layer, head) for layer in (0, 1) for head in (0, 3)}
    for layer, (pattern, query, key, scaling) in given.items():
        attended = attended_keys(query, key, pattern, 0, scaling=scaling, softcap=softcap)
        scored, _ = scored_keys(query, key, pattern, 0)
        position = torch.arange(LENGTH)
        admissible = position <= position[:, None]
        if pattern.sliding_window is not None:
            admissible &= position > position[:, None] - pattern.sliding_window
        group = len(query) // len(key)
        logits = query @ key.repeat_interleave(group, 0).transpose(-1, -2) * scaling
        weights = logits.masked_fill(~admissible, -torch.inf).softmax(-1)

        overview = page["layers"][layer]
        share = attended.sum((-1, -2)) / admissible.sum()
        torch.testing.assert_close(torch.tensor(overview["density"]), share, atol=1e-5, rtol=0)
        kept = (weights * attended).sum(-1)
        torch.testing.assert_close(
            torch.tensor(overview["mass"], dtype=torch.float64).sum(-1), kept.double().mean(-1), atol=5e-5, rtol=0
        )
        for head in (0, 3):
            for row, found in enumerate(page["pictures"][layer, head]):
                sets = admissible[row], scored[head, row], attended[head, row]
                assert [found[name] for name in ("admissible", "scored", "read")] == [int(x.sum()) for x in sets]
                assert found["kept"] == pytest.approx(kept[head, row].item(), abs=1e-6)
                keys, kinds = found["keys"].tolist(), [KINDS[kind] for kind in found["kinds"]]
                for key_position, kind in zip(keys, kinds, strict=True):
                    assert kind == expected_kind(
                        row,
                        key_position,
                        fields,
                        attended[head, row, key_position],
                        scored[head, row, key_position],
                        layer in fields.get("dense_layers", ()),
                    ), (layer, head, row, key_position)
                own = weights[head, row].double()
                torch.testing.assert_close(torch.from_numpy(found["weights"]), own[keys], rtol=2e-4, atol=1e-9)
                is_shown = torch.zeros(LENGTH, dtype=torch.bool)
                is_shown[keys] = True
                assert bool(is_shown[attended[head, row]].all())
                missed = admissible[row] & ~attended[head, row]
                assert int((is_shown & missed).sum()) == min(4, int(missed.sum()))
                if (missed & ~is_shown).any():
                    assert own[missed & is_shown].min() >= own[missed & ~is_shown].max()


def test_mass_by_kind_is_the_mean_over_the_sampled_rows():
    reader, _ = read(tiny_model(**FIELDS), rows=[5, 30, 59])
    for (layer, head), rows in reader.rows.items():
        sums = torch.stack([torch.bincount(row.kinds.long(), row.weights, minlength=len(KINDS)) for row in rows])[:, :5]
        torch.testing.assert_close(reader.layers[layer].mass[head], sums.mean(0))
        torch.testing.assert_close(
            reader.layers[layer].kept[head], torch.tensor([row.kept for row in rows]).double().mean()
        )
    assert all((mass > 0).any(0).all() for mass in [torch.cat([layer.mass for layer in reader.layers.values()])])


def test_every_kind_occurs():
    """Or else the test against the specification would say little."""
    reader, _ = read(tiny_model(**FIELDS), rows=range(LENGTH))
    assert {KINDS[kind] for rows in reader.rows.values() for row in rows for kind in row.kinds.tolist()} == set(KINDS)


def test_heads_do_not_depend_on_which_are_chosen():
    few, _ = read(tiny_model(**FIELDS), [20, 59], layers=[1], heads=[3])
    many, _ = read(tiny_model(**FIELDS), range(LENGTH))
    assert set(few.rows) == {(1, 3)}
    for found, expected in zip(few.rows[1, 3], [many.rows[1, 3][row] for row in (20, 59)], strict=True):
        assert found.position == expected.position
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found.kinds, expected.kinds)
        torch.testing.assert_close(found.weights, expected.weights)
    assert torch.equal(few.layers[0].density, many.layers[0].density)


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(10, 1), (10, 3), (10, 10), (1000, 256)])
def test_spread_rows(num_tokens, num_rows):
    rows = spread_rows(num_tokens, num_rows)
    assert len(set(rows)) == num_rows
    assert rows[-1] == num_tokens - 1
    steps = {b - a for a, b in zip([-1, *rows], rows, strict=False)}
    assert max(steps) - min(steps) <= 1


def one_row(position=0, keys=(0,), weights=(1.0,)):
    return RowKeys(
        position, 1, 1, 1, 1.0, torch.tensor(keys), torch.zeros(len(keys), dtype=torch.uint8), torch.tensor(weights)
    )


LAYERS = {0: LayerMass(torch.ones(1).double(), torch.ones(1, 5).double() / 5)}


def test_any_text_stays_text():
    document = PageDocument(HOSTILE, HOSTILE, {HOSTILE: HOSTILE[:20]}, [Token(HOSTILE), Token("\ud800")])
    page = render_page(document, LAYERS, {(0, 0): [one_row()]})
    assert page.isascii()
    assert page.count("</script>") == page.count("<script") == 2
    assert "<!--" not in page
    data = embedded(page)
    assert data["tokens"] == [HOSTILE, "\ud800"]
    assert data["name"] == data["model"] == next(iter(data["fields"])) == HOSTILE


def test_nothing_comes_from_elsewhere():
    page = render_page(PageDocument("name", "model", {}, [Token("x")]), LAYERS, {(0, 0): [one_row()]})
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\"'\s]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=|@import|url\(", page)


def test_large_distances_and_small_weights_are_kept():
    keys, weights = (0, 1, 130, 20_000, 5_000_000), (1.0, 0.5, 1e-9, 1e-30, 0.0)
    page = render_page(
        PageDocument("name", "model", {}, [Token("x")]), LAYERS, {(0, 0): [one_row(7, keys, weights), one_row(8)]}
    )
    first, second = embedded(page)["pictures"][0, 0]
    assert first["keys"].tolist() == list(keys)
    assert first["weights"] == pytest.approx(weights, rel=2e-4, abs=2**-31)
    assert second["keys"].tolist() == [0]


@pytest.mark.parametrize(("num_rows", "kept"), [(8, [1, 3, 5, 7]), (7, [0, 2, 4, 6])])
def test_rows_are_left_out_of_a_page_that_would_be_too_large(tmp_path, num_rows, kept):
    document = PageDocument("name", "model", {}, [Token("x")])
    rows = [one_row(position, range(3000), [1e-3] * 3000) for position in range(num_rows)]
    reader = SimpleNamespace(layers=LAYERS, rows={(0, 0): rows})
    write_page(document, reader, tmp_path / "all.html")
    size = (tmp_path / "all.html").stat().st_size
    assert embedded((tmp_path / "all.html").read_text())["rows"] == list(range(num_rows))
    write_page(document, reader, tmp_path / "fitting.html", most_bytes=size - 1)
    assert embedded((tmp_path / "fitting.html").read_text())["rows"] == kept
    write_page(document, reader, tmp_path / "one.html", most_bytes=1)
    assert embedded((tmp_path / "one.html").read_text())["rows"] == [num_rows - 1]


def test_plot_pattern_writes_the_same_page_again(tiny_model_path, text_directory, tmp_path):
    pages = []
    for name in ("a.html", "b.html"):
        line = hf_sparse_attn.plot_pattern(
            str(tiny_model_path),
            tmp_path / name,
            dataset=str(text_directory),
            context_length=100,
            layers=[1],
            heads=[2, 0],
            rows=10,
            device="cpu",
        )
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    data = embedded(pages[0].decode())
    assert "".join(data["tokens"]) == (text_directory / "0.txt").read_text()[:100]
    assert data["rows"] == list(range(9, 100, 10))
    assert list(data["pictures"]) == [(1, 0), (1, 2)]
    assert len(data["layers"]) == 2
    assert json.loads(data["fields"]["window_size"]) == 8
    # 92 rows of 8 keys and two globals, and the first ones.
    pairs = sum(min(row + 1, 8) + min(max(row - 7, 0), 2) for row in range(100))
    assert f"density {pairs / 5050:.3f}" in line
    assert len(SCRIPT.findall(pages[0].decode())) == 2


@pytest.mark.parametrize("min_weight", [0.0, 0.02])
def test_patterns_by_head(min_weight):
    parts = [{"block_size": 6}, {"stride": 7, "window_size": 2}]
    reader, given = read(tiny_model(**(FIELDS | {"min_weight": min_weight, "by_kv_head": parts})), range(LENGTH))
    for layer, (pattern, query, key, scaling) in given.items():
        attended = attended_keys(query, key, pattern, 0, scaling=scaling)
        scored, _ = scored_keys(query, key, pattern, 0)
        density = attended.sum((1, 2)) / torch.ones(LENGTH, LENGTH).tril().sum()
        torch.testing.assert_close(reader.layers[layer].density, density.double(), rtol=1e-6, atol=0)
        for head in (0, 3):
            for row, found in enumerate(reader.rows[layer, head]):
                read_keys = found.keys[found.kinds < KINDS.index("light")]
                assert torch.equal(read_keys, attended[head, row].nonzero().flatten())
                assert found.num_scored == scored[head, row].sum()
    is_static = torch.tensor([kind == KINDS.index("static") for kind in reader.rows[0, 3][-1].kinds])
    assert 35 in reader.rows[0, 3][-1].keys[is_static]  # a key of the stride that head 0 has not


def test_statistics_beside_another_recorder():
    model, alone, beside = tiny_model(), hf_sparse_attn.AttentionStatistics(), hf_sparse_attn.AttentionStatistics()
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with record(model, alone):
            model.base_model(input_ids=ids)
        with record(model, beside), hf_sparse_attn.record_density(model):
            model.base_model(input_ids=ids)
    assert torch.equal(beside.kept_mass, alone.kept_mass)
    assert torch.equal(beside.keys_per_row, alone.keys_per_row)
