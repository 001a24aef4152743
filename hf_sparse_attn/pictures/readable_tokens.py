"""The tokens of a document as text that a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_LONGEST_CHARACTER = 8  # tokens that may share one character before their bytes are taken for damaged


class Token(NamedTuple):
    """One token of a document.

    Args:
        text: what it adds to the text, whitespace included; empty where an earlier token already has it.
        is_special: whether it is a special token of the tokenizer, such as a BOS.
        is_continued: whether it is a later part of a character, which stands whole in an earlier token's text.
    """

    text: str
    is_special: bool = False
    is_continued: bool = False


def readable_tokens(tokenizer: Any, input_ids: Sequence[int]) -> list[Token]:
    """The text of each token, one `Token` each; all texts together are the text that the tokenizer decodes.

    Where a character takes several tokens, as emoji often do, the first of them has all that these tokens say. Bytes
    that are no text become U+FFFD.

    Args:
        tokenizer: of Transformers.
        input_ids: the document, any ids of the vocabulary.
    """
    special = set(tokenizer.all_special_ids)

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(input_ids[start:stop], clean_up_tokenization_spaces=False)

    tokens: list[Token] = []
    # Some tokenizers leave out the space before the first token that they decode: those before are decoded, too.
    before = 0
    while len(tokens) < len(input_ids):
        start = len(tokens)
        if input_ids[start] in special:
            tokens.append(Token(decode(start, start + 1), is_special=True))
            before = start + 1
            continue
        known = decode(before, start)
        stop = start + 1
        text = decode(before, stop)
        limit = min(start + _LONGEST_CHARACTER, len(input_ids))
        while text.endswith("\ufffd") and stop < limit and input_ids[stop] not in special:
            stop += 1
            text = decode(before, stop)
        if stop > start + 1 and "\ufffd" not in decode(stop - 1, stop):  # damaged bytes, and then a token of its own
            stop -= 1
            text = decode(before, stop)
        added = text[len(known) :] if text.startswith(known) else decode(start, stop)
        tokens.append(Token(added))
        tokens.extend(Token("", is_continued=True) for _ in range(start + 1, stop))
        before = start
    return tokens
