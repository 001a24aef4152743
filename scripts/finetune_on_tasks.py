"""Fine-tune a model with dense attention on the tasks of `eval-tasks`, so that a small model can do them at all.

    python scripts/finetune_on_tasks.py --model demo --context-length 8192 --max-steps 100 --output tuned

Texts and questions are made as for evaluation, from the train split and with another seed. A step reads one text with
all its questions and their right answers; the loss is that of the answers alone. Of eight texts one has
--context-length tokens with its questions and answers, three have half as many, and four a quarter. What is saved is
dense: convert it.
"""

import argparse
import json
import sys
from collections.abc import Iterator

from datasets import Dataset
from tqdm import tqdm

from hf_sparse_attn.cli.argument_types import output_directory, positive_int, positive_number
from hf_sparse_attn.config import text_config
from hf_sparse_attn.data import stream_documents
from hf_sparse_attn.data.packing import IGNORED_LABEL
from hf_sparse_attn.evaluation.tasks import TASKS, Haystack, Prompt, Vocabulary, prompt_of
from hf_sparse_attn.loading import load_model, read_checkpoint
from hf_sparse_attn.training import FinetuneArguments, finetune

TASKS_BY_DEFAULT = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "qa1")
PARTS = (4, 2, 4, 1, 4, 2, 4, 2)  # of the context length, one text after the other
SEED = 1_000_000  # apart from those of evaluations


def rows(
    tasks: list[str], context_length: int, number: int, vocabulary: Vocabulary, haystack: Haystack
) -> Iterator[dict[str, list[int]]]:
    """Rows of input_ids and labels: texts of all tasks at all lengths."""

    def answered(task: str, length: int, sample: int) -> dict[str, list[int]]:
        return with_answers(prompt_of(task, length, sample, vocabulary, haystack, SEED), vocabulary)

    for sample in tqdm(range(number), desc="texts"):
        length = context_length // PARTS[sample % len(PARTS)]
        task = tasks[sample // len(PARTS) % len(tasks)]
        room = length
        while len((row := answered(task, room, sample))["input_ids"]) > length:
            room -= len(row["input_ids"]) - length
        yield row


def with_answers(prompt: Prompt, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """A prompt, its questions and the first right answer of each; the labels are those of the answers."""
    tokens = list(prompt.input_ids)
    labels = [IGNORED_LABEL] * len(tokens)
    end, *_ = vocabulary.encode(["\n"])
    for question, answers in zip(prompt.question_ids, prompt.answer_ids, strict=True):
        tokens += [*question, *answers[0], *end]
        labels += [IGNORED_LABEL] * len(question) + answers[0] + [IGNORED_LABEL] * len(end)
    return {"input_ids": tokens, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="Hub id, directory, or demo (default: %(default)s)")
    parser.add_argument("--dataset", default="demo", help="Hub id, file, directory, or demo (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS_BY_DEFAULT), help="which ones")
    parser.add_argument("--context-length", type=positive_int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--max-steps", type=positive_int, default=100, help="a text each (default: %(default)s)")
    parser.add_argument("--learning-rate", type=positive_number, default=2e-4, help="its peak (default: %(default)s)")
    parser.add_argument("--output", type=output_directory, required=True, help="directory to fill, new or empty")
    arguments = parser.parse_args()
    dense = {"dense_below": sys.maxsize}
    path, _, tokenizer, _ = read_checkpoint(arguments.model, dense)
    haystack = Haystack(stream_documents(arguments.dataset, "train"))
    made = rows(arguments.tasks, arguments.context_length, arguments.max_steps, Vocabulary(tokenizer), haystack)
    training = FinetuneArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.max_steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        bf16=True,
        save_strategy="no",
        seed=0,
    )
    train_rows = Dataset.from_list(list(made))
    model = load_model(arguments.model, path, dense, num_tokens=arguments.context_length)
    results = finetune(model, tokenizer, train_rows, training)
    del text_config(model.config).sparse_attention  # nothing but the dense rows of the training
    model.config.save_pretrained(arguments.output)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
