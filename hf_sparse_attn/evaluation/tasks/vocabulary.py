"""Words that one tokenizer splits alike, so that their log-likelihoods are comparable without any normalisation."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from hf_sparse_attn.evaluation.haystack import CITIES, NAMES, SURNAMES, THINGS, TRADES, WORDS, split_alike

NOUNS = tuple(dict.fromkeys(WORDS + TRADES + THINGS))
ALL_WORDS = (*NOUNS, *NAMES, *SURNAMES, *CITIES)
_SAMPLE = 20_000  # characters
_NUM_RANDOM_WORDS = 2000


class Vocabulary:
    """The words of the tasks, seen by one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alike: dict[tuple[tuple[str, ...], int], list[str]] = {}

    def whole(self, text: str) -> list[int]:
        """Tokens of a whole text, with those that the tokenizer puts in front."""
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids

    def count(self, text: str) -> int:
        return len(self.whole(text))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of parts of texts."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def tokens_per_character(self, text: str) -> float:
        """Of the beginning of a text."""
        sample = text[:_SAMPLE]
        return self.count(sample) / max(1, len(sample))

    def alike(self, words: Sequence[str], at_least: int) -> list[str]:
        """Those of `words` that have equally many tokens after a space: with most tokenizers, one (`split_alike`).

        Raises:
            ValueError: there are no `at_least` words with the same number of tokens.
        """
        key = (tuple(words), at_least)
        if key not in self._alike:
            before, *texts = self.encode([":", *(f": {word}" for word in words)])
            self._alike[key] = list(split_alike(before, dict(zip(words, texts, strict=True)), at_least))
        return self._alike[key]

    @cached_property
    def coded_words(self) -> list[str]:
        """At least 50 words of three random letters."""
        return self.alike(_random_words(string.ascii_lowercase), 50)

    @cached_property
    def variables(self) -> list[str]:
        """At least 20 words of three random capital letters."""
        return self.alike(_random_words(string.ascii_uppercase), 20)


def _random_words(letters: str) -> list[str]:
    generator = random.Random(0)
    words = ("".join(generator.choices(letters, k=3)) for _ in range(_NUM_RANDOM_WORDS))
    return list(dict.fromkeys(words))
