"""Who is where, in sentences scattered over a long text: bAbI's first two tasks (Weston et al. 2015, arXiv 1502.05698),
as BABILong (Kuratov et al. 2024, arXiv 2406.10149) hides them, from templates of our own.
"""

from __future__ import annotations

import random

from hf_sparse_attn.evaluation.haystack import NAMES
from hf_sparse_attn.evaluation.tasks.prompts import Draft, Question
from hf_sparse_attn.evaluation.tasks.variables import interleaved
from hf_sparse_attn.evaluation.tasks.vocabulary import Vocabulary

PLACES, OBJECTS = (
    words.split()
    for words in (
        "bathroom bedroom hallway kitchen library gallery garden office pantry cellar stable garage closet lounge",
        "football apple milk box lamp ring map letter hammer umbrella basket candle",
    )
)
NUM_PLACES = NUM_PEOPLE = 8
NUM_MOVES = 3
_MOVED = ("moved to", "went to", "travelled to", "journeyed to")
_TOOK = ("picked up", "took", "grabbed", "got")
_LEFT = ("dropped", "put down", "left", "discarded")
_INTRO = "Memorize where people go and what they carry. These facts are hidden in the following text.\n\n"


def qa1(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """One supporting fact: eight people move three times each; where is each of them at the end?"""
    people, places = _cast(generator, vocabulary)
    moves = {
        person: [first, *generator.sample([place for place in places if place != first], NUM_MOVES - 1)]
        for person, first in zip(people, places, strict=True)
    }
    lines = [[_moved(generator, person, place) for place in way] for person, way in moves.items()]
    facts = interleaved(generator, lines)
    questions = [
        Question(
            f"Question: Where is {person}?\nAnswer: {person} is in the",
            *_answers(places, way[-1]),
            facts.index(line[-1]),
        )
        for (person, way), line in zip(moves.items(), lines, strict=True)
    ]
    return Draft(_INTRO, questions, facts)


def qa2(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """Two supporting facts: eight people each carry an object somewhere, and half of them go on without it."""
    people, places = _cast(generator, vocabulary)
    objects = generator.sample(OBJECTS, NUM_PEOPLE)
    goes_on = [True, False] * (NUM_PEOPLE // 2)
    generator.shuffle(goes_on)
    lines, ends = [], []
    for person, first, carried, leaves in zip(people, places, objects, goes_on, strict=True):
        end, other = generator.sample([place for place in places if place != first], 2)
        line = [_moved(generator, person, first), f"{person} {generator.choice(_TOOK)} the {carried}."]
        line.append(_moved(generator, person, end))
        if leaves:
            line += [f"{person} {generator.choice(_LEFT)} the {carried}.", _moved(generator, person, other)]
        lines.append(line)
        ends.append(end)
    facts = interleaved(generator, lines)
    questions = [
        Question(
            f"Question: Where is the {carried}?\nAnswer: The {carried} is in the",
            *_answers(places, end),
            facts.index(line[2]),
        )
        for carried, end, line in zip(objects, ends, lines, strict=True)
    ]
    return Draft(_INTRO, questions, facts)


def _cast(generator: random.Random, vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """Equally many people and places: each person goes to another one first, so that the text names all of them."""
    places = generator.sample(vocabulary.alike(PLACES, NUM_PLACES), NUM_PLACES)
    return generator.sample(NAMES, NUM_PEOPLE), places


def _moved(generator: random.Random, person: str, place: str) -> str:
    return f"{person} {generator.choice(_MOVED)} the {place}."


def _answers(places: list[str], right: str) -> tuple[list[str], list[str]]:
    return [f" {right}"], [f" {place}" for place in places if place != right]
