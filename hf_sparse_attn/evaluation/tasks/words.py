"""Words counted over a whole text: RULER's common and frequent words (arXiv 2404.06654, section 3.3).

The list fills the text but for a few tokens, which are text of the haystack.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

from hf_sparse_attn.evaluation.tasks.needles import listed
from hf_sparse_attn.evaluation.tasks.prompts import Draft, Question
from hf_sparse_attn.evaluation.tasks.vocabulary import ALL_WORDS, NOUNS, Vocabulary

NUM_COMMON = 10
NUM_COMMON_QUESTIONS = 8
RATIO = 10  # how much oftener common words come than others: RULER's 30 to 3
NUM_WRONG = 20
_LEAST_UNCOMMON = 30
_REPEATS = 3
NUM_FREQUENT = 3
NUM_CODED = 40
_EXPONENT = 2.0  # of Zipf's law
_NOISE = "..."  # RULER's most frequent word, which does not count
_SLACK = 16


def common_words(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """A numbered list in which ten words come ten times as often as the others; they are asked for in any order.

    Other words come three times, oftener where a list is so long that there are too few of them, and less often where
    it is short.
    """
    comparable = generator.sample(vocabulary.alike(NOUNS, NUM_COMMON + NUM_WRONG), NUM_COMMON + NUM_WRONG)
    common, wrong = comparable[:NUM_COMMON], comparable[NUM_COMMON:]
    others = [word for word in ALL_WORDS if word not in comparable]
    generator.shuffle(others)
    uncommon = [*wrong, *others]
    question = f"Question: What are the {NUM_COMMON} most common words in the list above?\n"
    question += f"Answer: The {NUM_COMMON} most common words in the list above are:"
    questions = [_listing(question, common[:known], common[known:], wrong) for known in range(NUM_COMMON_QUESTIONS)]
    order = generator.random()

    def body(entries: int) -> str:
        repeats = max(-(-entries // (RATIO * NUM_COMMON + len(uncommon))), min(_REPEATS, entries // _least()))
        if repeats < 1 or entries < _least():
            raise ValueError(f"too short for a list of at least {_least()} words")
        chosen = uncommon[: entries // repeats - RATIO * NUM_COMMON]
        words = repeats * (RATIO * common + chosen)
        random.Random(order).shuffle(words)
        return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))

    intro = "Memorize which words are the most common ones in the numbered list that follows.\n\n"
    return Draft(intro, questions, body=_filled(body, intro, questions, vocabulary, room, _least()))


def frequent_words(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """Coded words of Zipf's distribution, of which the three most frequent ones are asked for, in any order.

    A question for each part of the three that may have been answered before. Coded words have three letters, where
    RULER's have six, so that most tokenizers have enough of them as single tokens.
    """
    words = generator.sample(vocabulary.coded_words, NUM_CODED)
    top, wrong = words[:NUM_FREQUENT], words[NUM_FREQUENT : NUM_FREQUENT + NUM_WRONG]
    question = f"Question: What are the {NUM_FREQUENT} most frequent words in the coded text above? Ignore the dots.\n"
    question += f"Answer: The {NUM_FREQUENT} most frequent words in the coded text above are:"
    known = [list(part) for size in range(NUM_FREQUENT) for part in combinations(top, size)]
    questions = [_listing(question, part, [word for word in top if word not in part], wrong) for part in known]
    order = generator.random()
    shares = [1 / rank**_EXPONENT for rank in range(1, NUM_CODED + 2)]

    def body(entries: int) -> str:
        counts = [max(1, round(entries * share / sum(shares))) for share in shares]
        if counts[NUM_FREQUENT] <= counts[NUM_FREQUENT + 1]:
            raise ValueError("too short for a list in which some words are the most frequent ones")
        text = [word for word, count in zip([_NOISE, *words], counts, strict=True) for _ in range(count)]
        random.Random(order).shuffle(text)
        return " ".join(text)

    intro = "Read the following coded text and track how often each coded word comes.\n\n"
    return Draft(intro, questions, body=_filled(body, intro, questions, vocabulary, room, NUM_CODED))


def _listing(question: str, known: list[str], right: list[str], wrong: list[str]) -> Question:
    return Question(question + listed(known), [f" {word}" for word in right], [f" {word}" for word in wrong])


def _least() -> int:
    return RATIO * NUM_COMMON + _LEAST_UNCOMMON


def _filled(
    body: Callable[[int], str], intro: str, questions: list[Question], vocabulary: Vocabulary, room: int, least: int
) -> str:
    """The longest `body(entries)` that leaves room for the rest, within a few tokens."""
    room -= _SLACK + vocabulary.count(intro) + max(vocabulary.count(q.text + q.right[0]) for q in questions)
    sample = 10 * least
    entries = max(0, room) * sample // vocabulary.count(body(sample))
    while (tokens := vocabulary.count(text := body(entries))) > room:
        entries = min(entries - 1, entries * room // tokens)
    return text
