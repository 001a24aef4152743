"""Documents from the Hub, their tokens, and rows for training."""

import time
from itertools import chain

import datasets
import pytest
from helpers.documents import lines, texts, token_dataset, write
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_attn.data import IGNORED_LABEL, best_fit, load_documents, long_documents, packed, tokenize, windowed


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/directory", "missing.jsonl:body"])
def test_missing_path_is_refused(name):
    with pytest.raises(FileNotFoundError, match=f"dataset '{name}': no such file or directory"):
        load_documents(name)


@pytest.mark.parametrize(
    ("spec", "arguments", "column"),
    [
        ("org/name", ("org/name", None, "validation"), "text"),
        ("org/name:en", ("org/name", "en", "validation"), "text"),
        ("org/name::test", ("org/name", None, "test"), "text"),
        ("org/name:en:test:body", ("org/name", "en", "test"), "body"),
    ],
)
def test_hub_id_with_optional_parts(monkeypatch, spec, arguments, column):
    calls = []

    def load_dataset(hub_id, config, split):
        calls.append((hub_id, config, split))
        return datasets.Dataset.from_dict({column: ["a"], "id": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(load_documents(spec, "validation")) == {"org/name, row 0": "a"}
    assert calls == [arguments]


def test_hub_errors_name_the_dataset(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="dataset 'org/name' cannot be loaded: offline"):
        load_documents("org/name")
    with pytest.raises(ValueError, match="at most id:config:split:column"):
        load_documents("a:b:c:d:e")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("why"), datasets.exceptions.DatasetNotFoundError("why"), datasets.exceptions.DatasetsError("why")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_hub_errors_give_their_reason(monkeypatch, error, is_wrapped):
    def load_dataset(*args, **kwargs):
        if is_wrapped:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^dataset 'org/name' cannot be loaded: why$"):
        load_documents("org/name")


def test_hub_columns_are_checked(monkeypatch):
    table = datasets.Dataset.from_dict({"body": ["a"], "label": [0]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(ValueError, match=r"^dataset 'org/name' has no column 'text'; it has body, label$"):
        load_documents("org/name")
    with pytest.raises(ValueError, match=r"^dataset 'org/name:::label': column 'label' holds int64, not text$"):
        load_documents("org/name:::label")


def test_tokenize_keeps_names(tiny_tokenizer, text_directory):
    documents = load_documents(str(text_directory))
    tokens = tokenize(documents, tiny_tokenizer)
    assert tokens.column_names == ["name", "input_ids"]
    assert [len(ids) for ids in tokens["input_ids"]] == [len(text) for text in documents["text"]]
    assert tiny_tokenizer.decode(tokens[0]["input_ids"]) == documents[0]["text"]


class NoTokens:
    """A tokenizer that knows only the letter x."""

    def __call__(self, batch, verbose):
        return {"input_ids": [[7] * text.count("x") for text in batch]}


def test_documents_without_tokens(tmp_path):
    """Also the first ones, from which the type of the tokens cannot be told."""
    documents = load_documents(write(tmp_path, {"d.jsonl": lines(*["-"] * 20, "xxx", "-", "x")}))
    tokens = tokenize(documents, NoTokens())
    assert list(tokens["input_ids"]) == [[]] * 20 + [[7] * 3, [], [7]]
    assert list(packed(tokens, 4)["labels"]) == [[IGNORED_LABEL, 7, 7, IGNORED_LABEL]]
    assert list(windowed(tokens, 3)["labels"]) == [[IGNORED_LABEL, 7, 7]]
    assert [len(document["input_ids"]) for document in long_documents(documents, NoTokens(), 2)] == [2]


class EndingTokenizer:
    """A word's token is its length, but 0 is that of nine letters, and ends a text."""

    eos_token_id = 0

    def __call__(self, batch, verbose):
        return {"input_ids": [[len(word) % 9 for word in text.split()] for text in batch]}


def test_documents_end_with_an_eos_token_unless_the_tokenizer_adds_it(tmp_path):
    documents = load_documents(write(tmp_path, {"d.jsonl": lines("a bb", "ccc nine-long", "a")}))
    assert list(tokenize(documents, EndingTokenizer())["input_ids"]) == [[1, 2], [3, 0], [1]]
    tokens = tokenize(documents, EndingTokenizer(), eos=True)
    assert list(tokens["input_ids"]) == [[1, 2, 0], [3, 0], [1, 0]]
    # It is a target, and a document that is cut has none at the cut.
    ignored = IGNORED_LABEL
    assert list(windowed(tokens, 2)["labels"]) == [[ignored, 2], [ignored, 0], [ignored, 0]]


def test_documents_without_tokens_get_no_eos_token(tmp_path):
    documents = load_documents(write(tmp_path, {"d.jsonl": lines("-", "xx")}))
    tokenizer = NoTokens()
    tokenizer.eos_token_id = 3
    assert list(tokenize(documents, tokenizer, eos=True)["input_ids"]) == [[], [7, 7, 3]]
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token to end documents with"):
        tokenize(documents, tokenizer, eos=True)


@pytest.mark.parametrize(("number", "length", "shown"), [(3, 10, False), (200, 10, True), (2, 6 * 2**20, True)])
def test_progress_of_tokenizing_is_shown_for_much_text(tmp_path, capsys, number, length, shown):
    documents = load_documents(write(tmp_path, {"d.jsonl": lines(*["-" * length] * number)}))
    capsys.readouterr()
    tokenize(documents, NoTokens())
    told = capsys.readouterr().err
    assert ("tokenizing" in told) == shown
    assert (f"/{number}" in told and "characters" in told) == shown


def test_no_tokens_at_all_are_refused(tmp_path):
    documents = load_documents(write(tmp_path, {"d.txt": "-"}))
    for tokens in (tokenize(documents, NoTokens()), token_dataset(0, 0), token_dataset(0).select([])):
        with pytest.raises(ValueError, match="dataset has 0 tokens in all, fewer than one row of 4"):
            packed(tokens, 4)
        with pytest.raises(ValueError, match="dataset has no document of 4 tokens: the longest has 0"):
            windowed(tokens, 4)
    with pytest.raises(ValueError, match="the longest of its 1 documents has 0"):
        long_documents(documents, NoTokens(), 4)


def test_long_documents_are_cut_and_short_ones_left_out(tiny_tokenizer, text_directory):
    documents = load_documents(str(text_directory))
    chosen = long_documents(documents, tiny_tokenizer, 100)
    assert [document["name"] for document in chosen] == ["0.txt", "1.txt", "2.txt"]
    assert all(len(document["input_ids"]) == 100 for document in chosen)
    assert [d["name"] for d in long_documents(documents, tiny_tokenizer, 100, max_documents=2)] == ["0.txt", "1.txt"]


def test_too_short_documents_say_how_long_the_longest_is(tiny_tokenizer, text_directory):
    documents = load_documents(str(text_directory))
    longest = max(map(len, documents["text"]))
    with pytest.raises(ValueError, match=f"at least 5000 tokens: the longest of its 4 documents has {longest}"):
        long_documents(documents, tiny_tokenizer, 5000)


def test_packed_rows_restart_at_every_document():
    rows = packed(token_dataset(3, 6, 2), 5)
    assert list(rows["input_ids"]) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert list(rows["position_ids"]) == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    ignored = IGNORED_LABEL
    assert list(rows["labels"]) == [[ignored, 1, 2, ignored, 4], [ignored, 6, 7, 8, ignored]]


def test_packing_loses_only_the_last_incomplete_row():
    rows = packed(token_dataset(1, 17, 4, 30, 2), 8)
    assert list(chain.from_iterable(rows["input_ids"])) == list(range(48))


def test_rows_without_a_target_are_left_out():
    ignored = IGNORED_LABEL
    rows = packed(token_dataset(*[1] * 10, 6), 4)
    # Two rows of documents of one token; the next two stand before a document, which is a target's worth.
    assert list(rows["input_ids"]) == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert list(rows["labels"]) == [[ignored, ignored, ignored, 11], [ignored, 13, 14, 15]]


def test_a_document_does_not_begin_in_a_row_that_is_left_out():
    rows = packed(token_dataset(1, 1, 1, 4), 4)
    assert list(rows["input_ids"]) == [[3, 4, 5, 6]]
    assert list(rows["position_ids"]) == [[0, 1, 2, 3]]
    # The last token of the first document, alone in its row, is left out; the second begins after it.
    assert list(packed(token_dataset(3, 2), 2)["input_ids"]) == [[0, 1], [3, 4]]


@pytest.mark.parametrize("lengths", [[1] * 9, [1] * 8 + [7], [1] * 16])
def test_documents_of_one_token_alone_are_refused(lengths):
    total, single = sum(lengths), lengths.count(1)
    message = (
        f"{total} tokens in all, which fill no row of 8 with a target: {single} of its documents are single tokens"
    )
    with pytest.raises(ValueError, match=message):
        packed(token_dataset(*lengths), 8)


@given(st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 5, 11]), min_size=1, max_size=30), st.integers(2, 6))
def test_every_row_has_a_target_and_nothing_else_is_lost(lengths, context_length):
    tokens = token_dataset(*lengths)
    documents = [ids for ids in tokens["input_ids"] if ids]
    kept, end = [], -1
    try:
        rows = packed(tokens, context_length)
    except ValueError:
        rows = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["position_ids"]) == len(row["labels"]) == context_length
        assert any(label != IGNORED_LABEL for label in row["labels"])
        position = -1
        for token, *position_and_label in zip(*row.values(), strict=True):
            position = 0 if any(token == ids[0] for ids in documents) else position + 1
            assert position_and_label == [position, token if position else IGNORED_LABEL]
        kept += row["input_ids"]
        end = kept[-1]
    assert kept == sorted(set(kept))
    assert set(range(end)) - set(kept) <= {ids[-1] for ids in documents}
    rest = [sum(token > end for token in ids) for ids in documents]
    assert sum(length for length in rest if length > 1) < context_length


@pytest.mark.parametrize("make_rows", [packed, best_fit, windowed])
def test_one_long_document_takes_as_long_as_many(make_rows):
    seconds = []
    for number, length in ((400, 1000), (1, 400_000)):
        tokens = datasets.Dataset.from_dict({"input_ids": [[5] * length] * number})
        started = time.perf_counter()
        assert len(make_rows(tokens, 20)) == 20_000
        seconds.append(time.perf_counter() - started)
    # It would be hundreds of times as long if the rest of the document were copied for every row.
    assert seconds[1] < 5 * seconds[0] + 1


def test_windows_stay_inside_a_document():
    rows = windowed(token_dataset(3, 11, 5), 5)
    assert list(rows["input_ids"]) == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [14, 15, 16, 17, 18]]
    assert list(rows["position_ids"]) == [[0, 1, 2, 3, 4]] * 3
    assert [labels[0] for labels in rows["labels"]] == [IGNORED_LABEL] * 3


@pytest.mark.parametrize(
    ("make_rows", "message"), [(packed, "9 tokens in all, fewer than one row of 10"), (windowed, "the longest has 5")]
)
def test_too_little_for_a_row_is_refused(make_rows, message):
    with pytest.raises(ValueError, match=message):
        make_rows(token_dataset(4, 5), 10)


@pytest.mark.parametrize("make_rows", [packed, windowed])
def test_rows_need_a_target(make_rows):
    with pytest.raises(ValueError, match="context_length must be at least 2"):
        make_rows(token_dataset(4), 1)
