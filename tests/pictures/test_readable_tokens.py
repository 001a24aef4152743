import copy

import pytest

from hf_sparse_attn.pictures import Token, readable_tokens

TEXT = "na\u00efve\n\n\t\U0001f642\u05e9\u05dc\u05d5\u05dd  </script>&\u202e\ufffd."


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def byte_ids(tokenizer, data):
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    known = {tuple(tokenizer(chr(byte))["input_ids"]): byte for byte in range(128)}
    by_byte = {byte: ids[0] for ids, byte in known.items()}
    # GPT-2's alphabet: bytes without a printable character of their own are moved to U+0100 and after.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    alphabet = {byte: chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)}
    assert all(symbols[by_byte[byte]] == alphabet[byte] for byte in range(128))
    return [symbols.index(alphabet[byte]) for byte in data]


def test_texts_together_are_the_document(tokenizer):
    tokens = readable_tokens(tokenizer, tokenizer(TEXT)["input_ids"])
    assert "".join(token.text for token in tokens) == TEXT
    assert len(tokens) == len(TEXT.encode())


def test_a_character_stands_whole_in_its_first_token(tokenizer):
    tokens = readable_tokens(tokenizer, tokenizer("a\U0001f642b")["input_ids"])
    part = Token("", is_continued=True)
    assert tokens == [Token("a"), Token("\U0001f642"), part, part, part, Token("b")]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_is_cut_off(tokenizer, cut):
    tokens = readable_tokens(tokenizer, tokenizer("a\U0001f642")["input_ids"][: 1 + cut])
    assert [token.text for token in tokens] == ["a", "\ufffd", *[""] * (cut - 1)]


def test_bytes_that_are_no_text_leave_what_follows_alone(tokenizer):
    ids = byte_ids(tokenizer, b"\xffab" + b"\xff" * 20 + b"c")
    tokens = readable_tokens(tokenizer, ids)
    assert tokens[:3] == [Token("\ufffd"), Token("a"), Token("b")]
    assert tokens[-1] == Token("c")
    assert "".join(token.text for token in tokens) == "\ufffdab" + "\ufffd" * 20 + "c"


def test_special_tokens_are_told_apart_from_the_same_text(tokenizer):
    ids = [tokenizer.bos_token_id, *tokenizer(" x")["input_ids"], tokenizer.bos_token_id]
    tokens = readable_tokens(tokenizer, ids)
    assert tokens == [Token("<s>", is_special=True), Token(" "), Token("x"), Token("<s>", is_special=True)]
