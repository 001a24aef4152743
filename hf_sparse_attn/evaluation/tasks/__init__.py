"""RULER-style tasks and bAbI-like facts in long text, made from a seed: a file for each family of tasks.

prompts      texts of an exact length, and questions about them
vocabulary   words that a tokenizer splits alike
needles, variables, words, facts
             the tasks
asking       dense and sparse on the same prompts
paired       what the answers say: intervals, tests, the worst task
picture      the same, drawn
"""

from __future__ import annotations

from hf_sparse_attn.evaluation.tasks import facts, needles, variables, words
from hf_sparse_attn.evaluation.tasks.prompts import Haystack, Maker, Prompt, make_prompt
from hf_sparse_attn.evaluation.tasks.vocabulary import Vocabulary

TASKS: dict[str, Maker] = {
    "niah_single": needles.single,
    "niah_multikey": needles.multikey,
    "niah_multivalue": needles.multivalue,
    "niah_multiquery": needles.multiquery,
    "variable_tracking": variables.variable_tracking,
    "common_words": words.common_words,
    "frequent_words": words.frequent_words,
    "qa1": facts.qa1,
    "qa2": facts.qa2,
}


def prompt_of(
    task: str, context_length: int, sample: int, vocabulary: Vocabulary, haystack: Haystack, seed: int = 0
) -> Prompt:
    """A prompt of a task with several questions, always the same for the same arguments.

    Args:
        task: one of TASKS.
        context_length: tokens of the longest question with all before it and its answer.
        sample: its number, from 0.

    Raises:
        ValueError: as `make_prompt`.
    """
    own_seed = f"{seed} {task} {context_length} {sample}"
    return make_prompt(task, TASKS[task], vocabulary, haystack, context_length, own_seed)


__all__ = ["TASKS", "Haystack", "Prompt", "Vocabulary", "make_prompt", "prompt_of"]
