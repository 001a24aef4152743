"""Prompts of an exact length, made of facts among the text of any documents, and the questions about them.

Everything is text, so that another program with the same tokenizer reads the same tokens: lm-evaluation-harness does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse_attn.evaluation.tasks.vocabulary import Vocabulary

HAYSTACK_CHARACTERS = 4_000_000  # of the documents that are read: enough for any context, and quickly read
_ENDS = re.compile(r"(?<=[.!?])\s|\n")  # of sentences and of lines
_NEAR = 20  # tokens
_TRIED = 400  # characters about the end
_TRIED_ENDS = 5
_TRIED_PASSAGES = 5


@dataclass(frozen=True)
class Question:
    """What is asked after a text, and what may be answered.

    Args:
        text: ends where the answer starts.
        right, wrong: answers with the space before them, all of equally many tokens.
        fact: which of the facts decides it, or None where the whole text does.
        by_chance: share of right answers without any ability for the task; None: that of right ones among all.
    """

    text: str
    right: Sequence[str]
    wrong: Sequence[str]
    fact: int | None = None
    by_chance: float | None = None

    @property
    def alternatives(self) -> list[str]:
        """All possible answers, the right ones first."""
        return [*self.right, *self.wrong]

    @property
    def chance(self) -> float:
        return len(self.right) / len(self.alternatives) if self.by_chance is None else self.by_chance


@dataclass(frozen=True)
class Draft:
    """What a task makes: `facts` are to be scattered over a haystack in this order; `body` stands after it."""

    intro: str
    questions: Sequence[Question]
    facts: Sequence[str] = ()
    body: str = ""


@dataclass(frozen=True)
class Prompt:
    """A text with questions, each of which follows the text alone.

    Args:
        task: its name.
        context_length: tokens of the longest question with all before it and its answer.
        text: what is read once.
        input_ids: its tokens, with those that the tokenizer puts in front.
        questions: as text.
        question_ids: tokens of each question.
        answer_ids: for each question the tokens of its alternatives.
        depths: where in the text the fact of each question is, from 0 to 1, or None.
    """

    task: str
    context_length: int
    text: str
    input_ids: list[int]
    questions: Sequence[Question]
    question_ids: list[list[int]]
    answer_ids: list[list[list[int]]]
    depths: list[float | None]


Maker = Callable[[random.Random, Vocabulary, int], Draft]


class Haystack:
    """Text of documents, one after the other, whose passages lie between the facts.

    Args:
        documents: names and texts; read up to `HAYSTACK_CHARACTERS`.
    """

    def __init__(self, documents: Iterable[tuple[str, str]]) -> None:
        texts: list[str] = []
        for _, text in documents:
            texts.append(text)
            if sum(map(len, texts)) >= HAYSTACK_CHARACTERS:
                break
        self.text = "\n\n".join(texts)[:HAYSTACK_CHARACTERS]

    def passage(self, generator: random.Random, size: int) -> str:
        """Text from a random place on, at least `size` characters if there are as many."""
        start = generator.randrange(max(1, len(self.text) - size))
        space = re.compile(r"\s").search(self.text, start) if start else None
        return self.text[space.end() if space else 0 :].lstrip()


def make_prompt(
    task: str, make: Maker, vocabulary: Vocabulary, haystack: Haystack, context_length: int, seed: str
) -> Prompt:
    """A prompt of a task.

    Args:
        make: the task's draft from a source of randomness, the words and a number of tokens to be filled.
        context_length: tokens of the longest question with all before it and its answer, exactly.
        seed: decides everything that is drawn.

    Raises:
        ValueError: the text does not fit or is not long enough, or the tokenizer splits no words in a comparable way.
    """
    generator = random.Random(seed)
    draft = make(generator, vocabulary, context_length)
    encoded = [_encode(vocabulary, question) for question in draft.questions]
    longest = max(len(question_ids) + len(answers[0]) for question_ids, answers in encoded)
    text, starts = _lay_out(draft, haystack, vocabulary, context_length - longest, generator)
    input_ids = vocabulary.whole(text)
    for question, (question_ids, answers) in zip(draft.questions, encoded, strict=True):
        if vocabulary.whole(text + question.text + question.right[0]) != [*input_ids, *question_ids, *answers[0]]:
            raise ValueError("its tokenizer splits a text in another way when more follows")
    return Prompt(
        task,
        context_length,
        text,
        input_ids,
        draft.questions,
        [question_ids for question_ids, _ in encoded],
        [answers for _, answers in encoded],
        [None if question.fact is None else starts[question.fact] / len(text) for question in draft.questions],
    )


def _encode(vocabulary: Vocabulary, question: Question) -> tuple[list[int], list[list[int]]]:
    """Tokens of a question that stands at the beginning of a line, and of each of its alternatives."""
    line, asked, *answered = vocabulary.encode(
        ["\n", *(f"\n{question.text}{answer}" for answer in ("", *question.alternatives))]
    )
    answers = [tokens[len(asked) :] for tokens in answered]
    is_prefix = all(tokens[: len(asked)] == asked for tokens in answered) and asked[: len(line)] == line
    if not is_prefix or len({len(answer) for answer in answers}) > 1 or not answers[0]:
        raise ValueError(f"its tokenizer does not split the answers to {question.text!r} into equally many tokens")
    if len(set(map(tuple, answers))) < len(answers):
        raise ValueError(f"its tokenizer does not tell the answers to {question.text!r} apart")
    return asked[len(line) :], answers


def _lay_out(
    draft: Draft, haystack: Haystack, vocabulary: Vocabulary, num_tokens: int, generator: random.Random
) -> tuple[str, list[int]]:
    """A text of exactly `num_tokens` tokens, and where in it (in characters) each fact starts.

    Facts are at places drawn uniformly, moved to the next end of a sentence or a line. The end of the haystack is what
    makes the length exact.
    """
    empty = vocabulary.count(_assembled(draft, "", [0] * len(draft.facts))[0])
    if empty > num_tokens:
        raise ValueError(f"too short for the facts and the questions by {empty - num_tokens} tokens")
    room = num_tokens - empty
    places = sorted(generator.random() for _ in draft.facts)
    for skipped in range(_TRIED_PASSAGES):
        characters = max(1, round(room / vocabulary.tokens_per_character(haystack.text)))
        # Three times, for text differs in its tokens; from within a word where the ends of words do not fit.
        passage = haystack.passage(generator, 3 * characters)[skipped:]
        for _ in range(3):
            characters = round(characters * room / max(1, vocabulary.count(passage[:characters])))
            characters = max(1, characters)
        if characters > len(passage):
            raise ValueError(f"more than its documents have: {vocabulary.count(haystack.text)} tokens")
        # Facts add newlines: the last one stands a little before the end, which is then moved.
        cuts = [_end_after(passage, round(place * 0.98 * characters), characters) for place in places]
        for size in _sizes(draft, passage, cuts, vocabulary, num_tokens, characters):
            text, starts = _assembled(draft, passage[:size], cuts)
            if vocabulary.count(text) == num_tokens:
                return text, starts
    raise ValueError(f"no text has exactly {num_tokens} tokens with its tokenizer")


def _sizes(
    draft: Draft, passage: str, cuts: Sequence[int], vocabulary: Vocabulary, num_tokens: int, size: int
) -> Iterator[int]:
    """Characters of the passage that are likely to make `num_tokens` tokens; the nearest to `size` first."""
    least = max(cuts, default=0)
    rate = vocabulary.tokens_per_character(passage)
    missing = 0
    for _ in range(8):
        missing = num_tokens - vocabulary.count(_assembled(draft, passage[:size], cuts)[0])
        if abs(missing) < _NEAR:
            break
        size = min(max(least, size + round(missing / rate)), len(passage))
    # Near that, only the tokens of the last words differ.
    start = max(least, size - _TRIED)
    ends = range(start, min(size + _TRIED, len(passage)) + 1)
    lines = [passage[start:end].rstrip() + "\n" for end in ends]
    counts = dict(zip(ends, map(len, vocabulary.encode(lines)), strict=True))
    fitting = (end for end in ends if counts[end] - counts[size] == missing)
    yield from sorted(fitting, key=lambda end: abs(end - size))[:_TRIED_ENDS]


def _end_after(text: str, start: int, end: int) -> int:
    found = _ENDS.search(text, start, end)
    return found.start() if found else start


def _assembled(draft: Draft, passage: str, cuts: Sequence[int]) -> tuple[str, list[int]]:
    """The whole text, and where each fact starts; it ends with one newline, which no tokenizer joins to a question."""
    text, starts, cut = draft.intro, [], 0
    for fact, next_cut in zip(draft.facts, cuts, strict=True):
        text += passage[cut:next_cut] + "\n"
        starts.append(len(text))
        text += fact + "\n"
        cut = next_cut + 1 if passage[next_cut : next_cut + 1].isspace() else next_cut
    text = (text + passage[cut:]).rstrip()
    return (f"{text}\n\n{draft.body}" if draft.body else text) + "\n", starts


def documents_of(prompt: Prompt) -> list[Mapping[str, Any]]:
    """Its questions as lm-evaluation-harness takes them, one document each."""
    return [
        {"context": prompt.text + question.text, "choices": question.alternatives, "num_right": len(question.right)}
        for question in prompt.questions
    ]
