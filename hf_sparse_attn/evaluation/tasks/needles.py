"""Facts hidden in a text and asked for: RULER's retrieval tasks (Hsieh et al. 2024, arXiv 2404.06654, section 3.1).

The questions repeat the words of the fact, so that a model without any instruction tuning can answer, and the values
are words, most of which are one token. All facts of a text are stated once.
"""

from __future__ import annotations

import random

from hf_sparse_attn.evaluation.haystack import CITIES, NAMES, SURNAMES
from hf_sparse_attn.evaluation.tasks.prompts import Draft, Question
from hf_sparse_attn.evaluation.tasks.vocabulary import NOUNS, Vocabulary

NUM_KEYS = 16
NUM_ALTERNATIVES = 20
NUM_VALUES = 4  # of a key with several
NUM_ASKED_TOGETHER = 4
_INTRO = "Some special magic words are hidden in the following text. Memorize them: they are asked for at the end.\n\n"
_FACT = "The special magic word of {key} is: {value}."
# Of each kind a text has one fact, which is single in this sense.
KINDS = (
    *("password of the old lighthouse", "name of the grey donkey", "code word of the night ferry"),
    *("gift for the youngest guest", "sign above the hidden door", "answer to the third riddle"),
    *("label on the green box", "mark on the pirate map", "subject of the torn letter"),
    *("favourite toy of the twins", "theme of the winter play", "emblem on the royal flag"),
    *("title of the unfinished poem", "prize of the village fair", "cargo of the sunken ship"),
    *("reward for the brave knight",),
)


def single(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """One fact of each of sixteen kinds; a model that finds any of their values has one in sixteen right."""
    kinds = generator.sample(KINDS, NUM_KEYS)
    words = generator.sample(vocabulary.alike(NOUNS, NUM_ALTERNATIVES), NUM_ALTERNATIVES)
    values = words[:NUM_KEYS]
    questions = [
        Question(
            f"Question: What is the {kind}?\nAnswer: The {kind} is:",
            [f" {values[index]}"],
            [f" {word}" for word in words if word != values[index]],
            index,
            1 / NUM_KEYS,
        )
        for index, kind in enumerate(kinds)
    ]
    facts = [f"The {kind} is: {value}." for kind, value in zip(kinds, values, strict=True)]
    generator.shuffle(questions)
    return Draft("Memorize the facts that are hidden in the following text.\n\n", questions, facts)


def multikey(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """Sixteen facts of one kind."""
    keys, values, facts = _facts(generator, vocabulary)
    questions = [
        Question(
            f"Question: What is the special magic word of {keys[index]}?\n"
            f"Answer: The special magic word of {keys[index]} is:",
            *_answers(values, [values[index]]),
            index,
        )
        for index in generator.sample(range(NUM_KEYS), NUM_KEYS)
    ]
    return Draft(_INTRO, questions, facts)


def multivalue(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """Four keys with four values each; all values of a key are asked for one after the other, in any order."""
    values = generator.sample(vocabulary.alike(NOUNS, NUM_KEYS), NUM_KEYS)
    keys = _keys(generator, NUM_KEYS // NUM_VALUES)
    own = [values[NUM_VALUES * index :][:NUM_VALUES] for index in range(len(keys))]
    stated = [(key, value) for key, its_values in zip(keys, own, strict=True) for value in its_values]
    generator.shuffle(stated)
    questions = [
        Question(
            f"Question: What are the {NUM_VALUES} special magic words of {key}?\n"
            f"Answer: The {NUM_VALUES} special magic words of {key} are:{listed(its_values[:known])}",
            *_answers(values, its_values[known:], without=its_values[:known]),
        )
        for key, its_values in zip(keys, own, strict=True)
        for known in range(NUM_VALUES)
    ]
    facts = [f"One of the special magic words of {key} is: {value}." for key, value in stated]
    return Draft(_INTRO, questions, facts)


def multiquery(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """Sixteen facts of one kind; four at a time are asked for at once and answered one after the other."""
    keys, values, facts = _facts(generator, vocabulary)
    asked = generator.sample(range(NUM_KEYS), NUM_KEYS)
    questions = []
    for start in range(0, NUM_KEYS, NUM_ASKED_TOGETHER):
        chosen = asked[start : start + NUM_ASKED_TOGETHER]
        text = f"Question: What are the special magic words of {joined([keys[index] for index in chosen])}?\nAnswer:"
        for index in chosen:
            text += f" The special magic word of {keys[index]} is:"
            questions.append(Question(text, *_answers(values, [values[index]]), index))
            text += f" {values[index]}."
    return Draft(_INTRO, questions, facts)


def listed(words: list[str]) -> str:
    """Words that have been answered before the next one is asked for."""
    return "".join(f" {word}," for word in words)


def joined(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _facts(generator: random.Random, vocabulary: Vocabulary) -> tuple[list[str], list[str], list[str]]:
    keys = _keys(generator, NUM_KEYS)
    values = generator.sample(vocabulary.alike(NOUNS, NUM_KEYS), NUM_KEYS)
    return keys, values, [_FACT.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]


def _keys(generator: random.Random, number: int) -> list[str]:
    """Keys that share no word: a small model confuses others even with dense attention."""
    parts = zip(*(generator.sample(pool, number) for pool in (NAMES, SURNAMES, CITIES)), strict=True)
    return [f"{name} {surname} of {city}" for name, surname, city in parts]


def _answers(values: list[str], right: list[str], without: list[str] | None = None) -> tuple[list[str], list[str]]:
    """Right and wrong ones, all of which stand in the text."""
    wrong = [value for value in values if value not in right and value not in (without or [])]
    return [f" {value}" for value in right], [f" {value}" for value in wrong]
