"""The samples of `eval-tasks` for lm-evaluation-harness, which loads this file by its path.

`--metadata` may hold context_length (4096), num_samples (20), seed (0), dataset ("demo"), split ("validation") and
tokenizer (the model's own), as the options of `eval-tasks` are called.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from datasets import Dataset

from hf_sparse_attn.data import stream_documents
from hf_sparse_attn.evaluation.tasks import Haystack, Vocabulary, prompt_of
from hf_sparse_attn.evaluation.tasks.prompts import documents_of


def make(
    task_name: str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    context_length: int = 4096,
    num_samples: int = 20,
    seed: int = 0,
    dataset: str = "demo",
    split: str = "validation",
    **others: Any,
) -> dict[str, Dataset]:
    """The questions of a task, in the order in which `eval-tasks` asks them.

    Raises:
        ValueError: there is neither a model nor a tokenizer, or as `prompt_of`.
    """
    path = tokenizer or pretrained
    if not path:
        raise ValueError('tokenizer: expected the name of one, such as --metadata \'{"tokenizer": "DIR"}\'')
    vocabulary, haystack = _vocabulary(path), _haystack(dataset, split)
    return {
        "test": Dataset.from_list(
            [
                document
                for sample in range(num_samples)
                for document in documents_of(prompt_of(task_name, context_length, sample, vocabulary, haystack, seed))
            ]
        )
    }


def process_results(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """ "acc", "generated" (greedy decoding starts with a right answer) and "margin" in nats, as in `eval-tasks`."""
    num_right = document["num_right"]
    margin = max(likelihood for likelihood, _ in results[:num_right]) - max(
        likelihood for likelihood, _ in results[num_right:]
    )
    generated = any(is_greedy for _, is_greedy in results[:num_right])
    return {"acc": float(margin > 0), "generated": float(generated), "margin": margin}


@cache
def _vocabulary(path: str) -> Vocabulary:
    from transformers import AutoTokenizer

    return Vocabulary(AutoTokenizer.from_pretrained(path))


@cache
def _haystack(dataset: str, split: str) -> Haystack:
    return Haystack(stream_documents(dataset, split))
