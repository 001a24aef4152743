"""Chains of variables that are assigned to one another: RULER's variable tracking (arXiv 2404.06654, section 3.2)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hf_sparse_attn.evaluation.tasks.needles import listed
from hf_sparse_attn.evaluation.tasks.prompts import Draft, Question
from hf_sparse_attn.evaluation.tasks.vocabulary import Vocabulary

NUM_CHAINS = 3
NUM_ASKED_CHAINS = 2
NUM_HOPS = 4


def variable_tracking(generator: random.Random, vocabulary: Vocabulary, room: int) -> Draft:
    """Three chains of five variables; all that hold the values of two are asked for, from the second one on.

    The first variable of a chain is given: its value is stated beside it. Each further one needs one more hop. Wrong
    answers are the variables of the other chains. RULER has one chain by default.
    """
    length = NUM_HOPS + 1
    names = generator.sample(vocabulary.variables, NUM_CHAINS * length)
    chains = [names[index * length :][:length] for index in range(NUM_CHAINS)]
    values = generator.sample(range(10_000, 100_000), NUM_CHAINS)
    statements = [
        [f"VAR {chain[0]} = {value}", *(f"VAR {chain[hop]} = VAR {chain[hop - 1]}" for hop in range(1, length))]
        for chain, value in zip(chains, values, strict=True)
    ]
    facts = interleaved(generator, statements)
    questions = [
        Question(
            f"Question: Find all variables that are assigned the value {value} in the text above.\n"
            f"Answer: The {length} variables that are assigned the value {value} are:{listed(chain[:known])}",
            [f" {name}" for name in chain[known:]],
            [f" {name}" for name in names if name not in chain],
            facts.index(lines[known]),
        )
        for chain, value, lines in list(zip(chains, values, statements, strict=True))[:NUM_ASKED_CHAINS]
        for known in range(1, length)
    ]
    intro = "Memorize and track the chains of variable assignments that are hidden in the following text.\n\n"
    return Draft(intro, questions, facts)


def interleaved(generator: random.Random, sequences: Sequence[Sequence[str]]) -> list[str]:
    """All items in a random order that keeps the order of each sequence."""
    turns = [index for index, sequence in enumerate(sequences) for _ in sequence]
    generator.shuffle(turns)
    rest = [iter(sequence) for sequence in sequences]
    return [next(rest[index]) for index in turns]
