"""Mixtures of datasets by their shares of the tokens."""

import numpy as np
import pytest
from helpers.documents import token_dataset, write

from hf_sparse_attn.data import IGNORED_LABEL, best_fit, mixed, packed, parse_mixture


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["a"], (["a"], None)),
        (["a:0.7"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        (["a:0.7", "b:3e-1"], (["a", "b"], [0.7, 0.3])),
        (["org/a:en:train:body:2", "f.jsonl:body:1"], (["org/a:en:train:body", "f.jsonl:body"], [2, 1])),
        (["org/a:2020:", "b:body"], (["org/a:2020:", "b:body"], None)),
        (["cnn:3.0.0", "b:20220301.en"], (["cnn:3.0.0", "b:20220301.en"], None)),
    ],
)
def test_share_is_a_last_part_that_is_a_number(specs, expected):
    assert parse_mixture(specs) == expected


def test_an_existing_path_goes_first(tmp_path):
    path = write(tmp_path, {"notes:0.5": "a"})
    for spec in (path, f"pg19={path}"):
        assert parse_mixture([spec, "b"]) == ([spec, "b"], None)
        assert parse_mixture([f"{spec}:2", "b:1"]) == ([spec, "b"], [2, 1])


@pytest.mark.parametrize("share", ["0", "-1", "nan", "inf", "-inf"])
def test_shares_that_are_no_shares_are_refused(share):
    message = f"^the share of 'a' must be a finite number greater than 0, got '{share}'$"
    for specs in ([f"a:{share}", "b:1"], [f"a:{share}"]):
        with pytest.raises(ValueError, match=message):
            parse_mixture(specs)


def test_some_shares_or_one_dataset_twice_are_refused():
    with pytest.raises(ValueError, match=r"either every dataset has a share .* or none has; 'b' has none$"):
        parse_mixture(["a:1", "b"])
    with pytest.raises(ValueError, match="'a' is given more than once"):
        parse_mixture(["a:1", "a:2"])


def sources(mixture, *firsts):
    """Which dataset each row is of, if the datasets' tokens begin at `firsts`."""
    return [sum(row[0] >= first for first in firsts) - 1 for row in mixture.rows["input_ids"]]


def rows_from(first, number, context_length=4):
    tokens = token_dataset(first, number * context_length)  # the first document counts up to `first`
    return packed(tokens.select([1]), context_length)


def test_without_shares_every_row_is_there_once():
    mixture = mixed([rows_from(0, 3), rows_from(1000, 2)])
    assert sources(mixture, 0, 1000) == [0, 0, 0, 1, 1]
    assert (mixture.tokens, mixture.epochs) == ([9, 6], [1, 1])


@pytest.mark.parametrize("shares", [[0.7, 0.3], [7, 3], [1, 1], [0.05, 0.95]])
def test_every_beginning_has_the_shares(shares):
    mixture = mixed([rows_from(0, 60), rows_from(1000, 40)], shares)
    found = np.array(sources(mixture, 0, 1000)) == 0
    share = shares[0] / sum(shares)
    for number in range(1, len(found) + 1):
        assert abs(found[:number].sum() - share * number) <= 1
    assert mixture.tokens == [3 * found.sum(), 3 * (~found).sum()]


def test_all_rows_are_read_and_the_short_dataset_is_repeated():
    mixture = mixed([rows_from(0, 20), rows_from(1000, 5)], [1, 1])
    found = np.array(sources(mixture, 0, 1000))
    assert len(found) in (39, 40)
    assert mixture.epochs == [1, pytest.approx(4, abs=0.25)]
    rows = [row[0] for row in mixture.rows["input_ids"]]
    for low, number in ((0, 20), (1000, 5)):
        own = [first for first in rows if low <= first < low + 1000]
        # Each time all of them, before any comes again, and in another order.
        passes = [own[start : start + number] for start in range(0, len(own) - number + 1, number)]
        assert all(sorted(one) == list(range(low, low + 4 * number, 4)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_shares_are_those_of_tokens_not_of_rows():
    half_empty = best_fit(token_dataset(*[5] * 40), 8)  # 4 targets a row
    full = best_fit(token_dataset(8 * 40), 8)  # 7 targets a row
    mixture = mixed([half_empty, full], [1, 1], num_rows=44)
    counts = [sum(label != IGNORED_LABEL for label in row) for row in mixture.rows["labels"]]
    assert (counts.count(4), counts.count(7)) == (28, 16)
    assert mixture.tokens == [112, 112]


def test_longer_mixtures_begin_alike_and_seeds_differ():
    parts = [rows_from(0, 9), rows_from(1000, 5)]
    short, long = (mixed(parts, [2, 1], num_rows=number).rows["input_ids"] for number in (12, 50))
    assert list(short) == list(long)[:12]
    assert list(mixed(parts, [2, 1], num_rows=12, seed=1).rows["input_ids"]) != list(short)


def test_shares_that_are_too_far_apart_are_refused():
    with pytest.raises(ValueError, match="repeated more than 1000 times until the largest is read once"):
        mixed([rows_from(0, 20), rows_from(1000, 5)], [1, 1e6])
    assert len(mixed([rows_from(0, 20), rows_from(1000, 5)], [1, 1e6], num_rows=50).rows) == 50
