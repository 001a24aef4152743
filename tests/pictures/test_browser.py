"""The page in a real browser: needs Playwright's package and a Chromium (see CONTRIBUTING.md), or else is skipped."""

import shutil

import pytest
from helpers.pages import embedded

import hf_sparse_attn
from hf_sparse_attn.pictures import KINDS

LENGTH = 150
TEXT = (
    "<b>bold</b> </script><script>window.broken = 1</script>\n\n\t\U0001f642 \u05e9\u05dc\u05d5\u05dd "
    "\u202e &amp; 'q' \"q\" "
) * 3
READ_KINDS = KINDS[:5]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("needs a Chromium on the PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tiny_model_path, tmp_path_factory):
    """The page of a document of hostile text."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    fields = {"key_budget": 6, "min_weight": 0.02, "num_hash_bits": 2, "page_size": 4, "dense_below": 9}
    hf_sparse_attn.plot_pattern(
        str(tiny_model_path),
        directory / "page.html",
        dataset=str(directory / "text.txt"),
        context_length=LENGTH,
        layers=[0, 1],
        heads=[0, 3],
        rows=LENGTH // 2,
        sparse_attention=fields,
        device="cpu",
    )
    return directory / "page.html"


@pytest.fixture
def opened(browser, page_file):
    """The page, open, and what it embeds; at the end, it must have met no error and asked for nothing."""
    page = browser.new_page()
    met = []
    page.on("pageerror", lambda error: met.append(str(error)))
    page.on("console", lambda message: met.append(message.text))
    page.on("request", lambda request: met.append(request.url))
    page.goto(page_file.as_uri())
    yield page, embedded(page_file.read_text())
    assert met == [page_file.as_uri()]
    assert page.evaluate("window.broken") is None
    page.close()


def highlighted(page):
    """{token: kind} of what is highlighted in the text."""
    found = page.eval_on_selector_all(
        "#text .t[data-kind]", "spans => spans.map(span => [Number(span.dataset.i), span.dataset.kind])"
    )
    return dict(found)


def stored(data, layer, head, row):
    found = data["pictures"][layer, head][data["rows"].index(row)]
    return {key: KINDS[kind] for key, kind in zip(found["keys"].tolist(), found["kinds"].tolist(), strict=True)}, found


def test_a_click_on_a_token_shows_the_keys_of_its_row(opened):
    page, data = opened
    for row in (41, 107, 5):
        page.locator(f"#text .t[data-i='{row}']").click()
        keys, found = stored(data, 0, 0, row)
        assert highlighted(page) == keys
        assert {key for key, kind in keys.items() if kind in READ_KINDS} >= {row}
        assert page.locator("#text .t.row").get_attribute("data-i") == str(row)
        assert page.locator("#admissible").inner_text() == str(row + 1)
        assert page.locator("#scored").inner_text() == str(found["scored"])
        assert page.locator("#read").inner_text().split()[0] == str(found["read"])
        assert float(page.locator("#kept").inner_text().rstrip("%")) == pytest.approx(100 * found["kept"], abs=0.06)
        assert page.locator("#text .t.off").count() == LENGTH - row - 1
        missed = [(w, -k) for k, kind, w in zip(keys, keys.values(), found["weights"], strict=True) if kind[0] in "lu"]
        expected = f"{-max(missed)[1]}, " if missed else "none"
        assert page.locator("#missed").inner_text().startswith(expected)


def test_strength_grows_with_the_weight(opened):
    page, data = opened
    page.locator("#text .t[data-i='107']").click()
    _, found = stored(data, 0, 0, 107)
    alphas = page.eval_on_selector_all(
        "#text .t[data-kind]", "spans => spans.map(span => Number(span.style.getPropertyValue('--a')))"
    )
    for weight, alpha in zip(found["weights"].tolist(), alphas, strict=True):
        assert (weight > 0.1) == (alpha > 0.06 + 0.84 * 0.8)
    assert len(set(alphas)) > 3


def test_arrow_keys_and_numbers_move_the_row(opened):
    page, data = opened
    assert data["rows"] == list(range(1, LENGTH, 2))
    page.locator("#text .t[data-i='41']").click()
    page.keyboard.press("ArrowRight")
    assert highlighted(page) == stored(data, 0, 0, 43)[0]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert highlighted(page) == stored(data, 0, 0, 39)[0]
    page.fill("#row", "101")
    page.keyboard.press("Enter")
    assert highlighted(page) == stored(data, 0, 0, 101)[0]
    assert page.locator("#text .t.row").is_visible()


def test_a_token_that_is_no_sampled_row_gives_the_nearest(opened):
    page, _ = opened
    page.locator("#text .t[data-i='60']").click()
    assert page.input_value("#row") in ("59", "61")


def test_layers_and_heads(opened):
    page, data = opened
    page.locator("#text .t[data-i='107']").click()
    page.select_option("#layer", "1")
    page.select_option("#head", "3")
    assert highlighted(page) == stored(data, 1, 3, 107)[0]
    assert page.locator("#heading").inner_text() == "Row 107, layer 1, head 3"
    page.locator("#by-layer .pick").first.click()
    assert highlighted(page) == stored(data, 0, 3, 107)[0]
    assert page.locator("#by-layer .bars").count() == 2
    assert page.locator("#by-head .bars").count() == 4


def test_the_text_is_readable(opened):
    page, _ = opened
    shown = page.eval_on_selector_all("#text .t", "spans => spans.map(span => span.textContent)")
    assert len(shown) == LENGTH
    text = "".join(shown)
    assert text.startswith(
        "<b>bold</b> </script><script>window.broken = 1</script>\u21b5\n\u21b5\n\u2192\t\U0001f642\u00b7\u00b7\u00b7 "
    )
    assert "<U+202E>" in text
    assert "\u202e" not in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overlaps_and_the_page_does_not_scroll_sideways(opened, scheme, width):
    page, _ = opened
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [box.bounding_box() for box in page.locator("header, .controls, .strip, .card, #chart-note").all()]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            apart = (
                a["x"] + a["width"] <= b["x"]
                or b["x"] + b["width"] <= a["x"]
                or a["y"] + a["height"] <= b["y"]
                or b["y"] + b["height"] <= a["y"]
            )
            assert apart, (a, b)
