"""Facts hidden in long real text, for needle retrieval.

A fact is stated as

    Secret word of Anna Smith, Boston, teacher, tulip: orange

and asked for by its first half, so that a model without any instruction tuning can answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from hf_sparse_attn.config import SparseAttentionConfig

SINGLE, SEVERAL = "single", "several"
QUESTION = "\nSecret word of {key}:"
# Among several facts a small model confuses those with short keys, or misses one that is stated only once, even with
# dense attention: what is to be measured here is the attention.
NUM_STATEMENTS = 3
NUM_ALTERNATIVES = 20
GAP = 32  # tokens of text between the facts of one depth

NAMES, SURNAMES, CITIES, TRADES, THINGS, WORDS = (
    words.split()
    for words in (
        "Anna Peter Maria John Laura David Sarah James Emma Robert Alice Thomas Julia Martin Helen Simon Nora "
        "Frank Clara Oscar Diana Victor Grace Henry Lucy Walter Rose Albert Jane Paul Kate George Ruth Daniel "
        "Susan Mark Linda Eric",
        "Smith Jones Brown Taylor Wilson Davies Evans Walker Wright Green Hall Wood Clarke Hill Moore Cooper Ward "
        "Turner Parker Cook Bell Bailey Carter Collins Kelly Murphy Morgan Reed Gray Fox Stone Hunt Cole Ford "
        "Marsh Lane Page West",
        "Paris London Berlin Madrid Rome Vienna Oslo Dublin Prague Lisbon Athens Moscow Cairo Tokyo Beijing Delhi "
        "Sydney Boston Chicago Dallas Denver Seattle Houston Miami Toronto Montreal Mumbai Bangkok Singapore "
        "Havana Lima Nairobi Lagos Dubai Tehran Baghdad Warsaw Brussels",
        "teacher doctor farmer lawyer painter writer sailor soldier singer dancer baker butcher driver pilot "
        "nurse actor judge banker priest hunter engineer architect chemist dentist journalist librarian mechanic "
        "musician photographer plumber policeman scientist secretary surgeon tailor waiter gardener carpenter",
        "lake chess tulip carrot violet ship train whale cherry clock boat tower drum flute kite statue tractor "
        "blackboard candy desk falcon goat jacket kettle lamp maple nest oak parrot quilt rose spoon tent "
        "umbrella vase wagon yacht zebra",
        "apple river mountain tiger piano bread silver ocean forest winter garden castle dragon honey pepper "
        "lemon rabbit horse desert island cotton marble orange butter camera bridge hammer mirror candle basket "
        "pencil rocket ladder window bottle carpet guitar blanket diamond monkey elephant thunder feather engine "
        "market kitchen planet violin tunnel sugar salmon eagle wolf lion chicken potato tomato banana coffee "
        "whiskey",
    )
)
MAX_NEEDLES = len(NAMES)


@dataclass(frozen=True)
class Needle:
    """One fact in a context.

    Args:
        depth: where it was asked to be, 0 to 1.
        start, end: its tokens in the context are start .. end - 1.
        question: token ids, appended to the context's.
        alternatives: token ids of the possible answers, all of one length; the first is the right one.
        key, answer: as text.
    """

    depth: float
    start: int
    end: int
    question: list[int]
    alternatives: list[list[int]]
    key: str
    answer: str


@dataclass(frozen=True)
class Context:
    """A document with needles: `input_ids` are followed by the question of one needle after the other.

    `context_length` is the length of the longest of these prompts together with its answer; `task` is "single" (one
    fact) or "several".
    """

    task: str
    context_length: int
    document: str
    input_ids: list[int]
    needles: list[Needle]


def make_contexts(
    documents: Sequence[dict[str, Any]],
    tokenizer: Any,
    context_length: int,
    depths: Sequence[float],
    config: SparseAttentionConfig,
    *,
    num_samples: int,
    needles_per_depth: int = 1,
    num_single: int = 0,
    seed: int = 0,
) -> list[Context]:
    """Contexts of one length.

    Args:
        documents: dicts with "name" and "input_ids", at least `context_length` of them; taken in turn.
        config: facts lie outside its global tokens and its window, questions at positions that it does not make dense.
        num_samples: contexts with `needles_per_depth` facts at every depth.
        num_single: contexts with a single fact, per depth.

    Raises:
        ValueError: as `hide_needles`, or questions would read everything because of `dense_below`.
    """
    kinds = [(SEVERAL, sample, list(depths) * needles_per_depth) for sample in range(num_samples)]
    kinds += [(SINGLE, sample, [depth]) for sample in range(num_single) for depth in depths]
    contexts = [
        hide_needles(
            documents[sample % len(documents)],
            tokenizer,
            context_length,
            chosen,
            num_globals=config.num_global_tokens,
            window_size=config.window_size,
            seed=f"{seed} {task} {sample} {chosen}",
            task=task,
        )
        for task, sample, chosen in kinds
    ]
    check_questions(context_length, min(len(context.input_ids) for context in contexts), config.dense_below)
    return contexts


def check_questions(context_length: int, first_question: int, dense_below: int) -> None:
    """Make sure that rows of questions at positions from `first_question` on can be sparse.

    Raises:
        ValueError: they read everything because of `dense_below`; saying which context_length they need.
    """
    if first_question < dense_below:
        raise ValueError(
            f"must be at least {context_length + dense_below - first_question}: questions at positions under "
            f"{dense_below=} read everything"
        )


def hide_needles(
    document: dict[str, Any],
    tokenizer: Any,
    context_length: int,
    depths: Sequence[float],
    *,
    num_globals: int,
    window_size: int,
    seed: str,
    task: str = SEVERAL,
) -> Context:
    """Put one fact per entry of `depths` into the first tokens of a document.

    No fact can be read directly through the static part of the sparse attention. Depth 0 is the first place after the
    `num_globals` leading tokens, depth 1 the last one that lies outside the window of the question's first token, hence
    of every later one: start >= num_globals and end <= question - window_size + 1. A depth that is listed several times
    has its facts there one after the other, `GAP` tokens of text between them.

    Args:
        document: "name" and "input_ids", at least `context_length` tokens.
        context_length: tokens of the context, a question and its answer.
        depths: fractions in [0, 1].
        seed: decides who knows which word.

    Raises:
        ValueError: the facts do not fit, or the tokenizer splits the words in no comparable way.
    """
    generator = random.Random(seed)
    depths = sorted(depths)
    if len(depths) > MAX_NEEDLES:
        raise ValueError(f"at most {MAX_NEEDLES} facts fit into one context, got {len(depths)}")
    names, *rest = (generator.sample(pool, len(depths)) for pool in (NAMES, SURNAMES, CITIES, TRADES, THINGS))
    keys = [f"{name} {', '.join(attributes)}" for name, *attributes in zip(names, *rest, strict=True)]
    questions = [_encode(tokenizer, QUESTION.format(key=key)) for key in keys]
    words = comparable_words(tokenizer, keys[0], max(NUM_ALTERNATIVES, len(depths)))
    answers = generator.sample(sorted(words), len(depths))
    newline = _encode(tokenizer, "\n")
    facts = [
        NUM_STATEMENTS * (question + words[answer]) + newline
        for question, answer in zip(questions, answers, strict=True)
    ]

    question_start = context_length - max(map(len, questions)) - len(words[answers[0]])
    starts = _places(depths, max(map(len, facts)), num_globals, question_start - window_size + 1)
    input_ids: list[int] = []
    text = iter(document["input_ids"])
    needles = []
    for index, (depth, start) in enumerate(zip(depths, starts, strict=True)):
        input_ids += [next(text) for _ in range(start - len(input_ids))]
        input_ids += facts[index]
        answer = answers[index]
        others = [other for other in answers if other != answer]
        others += generator.sample(sorted(set(words) - set(answers)), max(0, NUM_ALTERNATIVES - 1 - len(others)))
        alternatives = [words[word] for word in (answer, *others)]
        needles.append(Needle(depth, start, len(input_ids), questions[index], alternatives, keys[index], answer))
    input_ids += [next(text) for _ in range(question_start - len(input_ids))]
    return Context(task, context_length, document["name"], input_ids, needles)


def comparable_words(tokenizer: Any, key: str, at_least: int) -> dict[str, list[int]]:
    """Those of `WORDS` that the tokenizer splits into equally many tokens after a question, with these tokens.

    Their log-likelihoods are then comparable without any normalisation. Of all numbers of tokens that enough words
    have, the smallest is taken; with most tokenizers every word is one token.

    Raises:
        ValueError: there are no `at_least` words with the same number of tokens.
    """
    question = _encode(tokenizer, QUESTION.format(key=key))
    answers = {word: _encode(tokenizer, f"{QUESTION.format(key=key)} {word}") for word in WORDS}
    return split_alike(question, answers, at_least)


def split_alike(before: Sequence[int], texts: Mapping[str, Sequence[int]], at_least: int) -> dict[str, list[int]]:
    """Words that have equally many tokens after what stands before them, each others than all the rest.

    Of all numbers of tokens that enough words have, the smallest is taken.

    Args:
        before: tokens of what comes before a word.
        texts: word -> tokens of it and of what comes before it.

    Raises:
        ValueError: there are no `at_least` words with the same number of tokens.
    """
    answers = {word: list(tokens[len(before) :]) for word, tokens in texts.items() if tokens[: len(before)] == before}
    same = Counter(map(tuple, answers.values()))  # unknown words may all be one token
    by_count: dict[int, dict[str, list[int]]] = {}
    for word, answer in answers.items():
        if answer and same[tuple(answer)] == 1:
            by_count.setdefault(len(answer), {})[word] = answer
    for count in sorted(by_count):
        if len(by_count[count]) >= at_least:
            return by_count[count]
    raise ValueError(
        f"its tokenizer does not split {at_least} of the words needed into equally many tokens that tell them apart"
    )


def _places(depths: Sequence[float], length: int, first: int, end: int) -> list[int]:
    """Where facts of up to `length` tokens start, so that all lie in first .. end - 1."""
    starts = []
    for depth, group in groupby(depths):
        offsets = [(length + GAP) * index for index, _ in enumerate(group)]
        room = end - first - length - offsets[-1]
        starts += [first + round(depth * room) + offset for offset in offsets]
        if room < 0:
            break
    if room < 0 or any(later - earlier < length for earlier, later in pairwise(starts)):
        raise ValueError(
            f"too short for {len(depths)} facts of {length} tokens at these depths: {max(0, end - first)} tokens lie "
            "outside the global tokens and the window of the question"
        )
    return starts


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
