"""Ask RULER-style tasks of long text, dense and sparse on the same prompts, and name the task that loses most.

    hf-sparse-attn eval-tasks --model converted --context-lengths 4096 8192 --num-samples 40 --output tasks.json
    hf-sparse-attn eval-tasks --model demo --dataset book.txt --tasks niah_multikey qa1 --context-lengths 2048 \
        --sparse-attention '{"key_budget": 256}' --picture tasks.png

A sample is one text with up to 16 questions, which share its prefill. Each is answered by the log-likelihood of the
right answers against wrong ones and by greedy decoding. A task in which the dense model is not better than chance says
nothing about sparse attention and is left out where the worst task is named. Prompts that --output holds already, asked
with the same other options, are not asked again: tasks, lengths and samples can be added. docs/tasks.md describes each
task, and how lm-evaluation-harness runs the same ones.
"""

from pathlib import Path
from typing import Any

import hf_sparse_attn.evaluation
from hf_sparse_attn.cli.arguments import OneLineErrors, print_table, report, resumed, warn
from hf_sparse_attn.cli.options import DATASET_HELP, SUFFIXES, add, command_parser
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.errors import argument
from hf_sparse_attn.evaluation.haystack import check_questions
from hf_sparse_attn.evaluation.tasks import TASKS, Haystack, Prompt, Vocabulary, prompt_of
from hf_sparse_attn.output_files import replaced

LM_EVAL_PATH = Path(hf_sparse_attn.evaluation.__file__).parent / "lm_eval_tasks"


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=list(TASKS),
        metavar="NAME",
        help=f"Ask these: {', '.join(TASKS)} (default: all of them).",
    )
    add(
        parser,
        "context-lengths",
        help="Make prompts of exactly N tokens, the longest question and its answer included.",
    )
    add(parser, "num-samples", default=20, help="Make N texts for each task and length (default: %(default)s).")
    dataset_help = f"{DATASET_HELP[:-1]}, to hide facts in (default: %(default)s)."
    add(parser, "dataset", required=False, default="demo", help=dataset_help)
    add(parser, "split")
    add(parser, "seed", help="Draw texts, facts and questions with the seed N (default: %(default)s).")
    add(parser, "sparse-attention", "device", "dtype")
    parser.add_argument(
        "--fast-dense",
        action="store_true",
        help="Compute dense attention with this package's compiled loops, not SDPA, where both give the same (float32 "
        "on a CPU): half the time.",
    )
    add(parser, "output")
    add(parser, "picture", help=f"Draw accuracies and losses to this {SUFFIXES} file.")
    parser.add_argument(
        "--print-lm-eval-path",
        action="version",
        version=str(LM_EVAL_PATH),
        help="Print the --include_path of these tasks for lm-evaluation-harness, and exit.",
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    from tqdm import tqdm

    from hf_sparse_attn.data import stream_documents
    from hf_sparse_attn.environment import describe_environment, written_fields
    from hf_sparse_attn.evaluation.dense_attention import dense_implementation, dense_side
    from hf_sparse_attn.evaluation.tasks.asking import ask_both
    from hf_sparse_attn.evaluation.tasks.paired import summarize
    from hf_sparse_attn.evaluation.tasks.picture import plot_tasks
    from hf_sparse_attn.integration import reading_everything
    from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint

    device, dtype = parse_device(arguments.device), parse_dtype(arguments.dtype)
    with argument("dataset"):
        haystack = Haystack(stream_documents(arguments.dataset, arguments.split))
    path, _, tokenizer, fields = read_checkpoint(arguments.model, arguments.sparse_attention)
    vocabulary = Vocabulary(tokenizer)
    tasks, lengths = dict.fromkeys(arguments.tasks), sorted(set(arguments.context_lengths))

    def made(task: str, length: int, sample: int) -> Prompt:
        with argument("context_lengths", f"{length} of {task}"):
            return prompt_of(task, length, sample, vocabulary, haystack, arguments.seed)

    dense_below = SparseAttentionConfig.from_dict(fields).dense_below
    for length in lengths:
        for task in tasks:
            first = made(task, length, 0).input_ids
            with argument("context_lengths", f"{length} of {task}"):
                check_questions(length, len(first), dense_below)
    result, keep = resumed(
        arguments, ("tasks", "context_lengths", "num_samples"), sparse_attention=written_fields(fields)
    )
    model = load_model(
        arguments.model, path, arguments.sparse_attention, device=device, num_tokens=lengths[-1], dtype=dtype
    )
    result |= {"environment": describe_environment(device)}
    with argument("model", arguments.model):
        dense = dense_side(model, first, fast=arguments.fast_dense)
    if arguments.fast_dense and dense is not reading_everything:
        warn("--fast-dense has no effect: it is for float32 on a CPU with Numba")
    result["dense_attention"] = "own" if dense is reading_everything else dense_implementation(model)
    samples = range(arguments.num_samples)
    asked = {f"{task} {length} {i}": (task, length, i) for i in samples for length in lengths for task in tasks}
    with argument("model", arguments.model):
        for turn, (name, prompt) in enumerate(tqdm(asked.items(), desc="asking", unit="prompt")):
            if name in result["results"]:
                continue
            result["results"][name] = ask_both(model, made(*prompt), turn % 2 == 1, dense)
            keep()
    result["summary"] = summarize([result["results"][name] for name in asked])
    report(result, arguments.output, print_result)
    if arguments.picture:
        with replaced(arguments.picture) as picture:
            plot_tasks(result["summary"]["cells"], picture)


def print_result(result: dict[str, Any]) -> None:
    summary, model = result["summary"], result["settings"]["model"]
    rows, others = [], []
    for cell in summary["cells"]:
        name = [cell["task"], str(cell["context_length"])]
        difference, (low, high) = cell["difference"], points(cell["difference"]["ci95"])
        shares = [f"{cell[side]['accuracy']:.3f}" for side in ("dense", "sparse")]
        change = [f"{100 * difference['accuracy']:+.2f}", f"{low} .. {high}", f"{difference['p_value_by_prompt']:.3g}"]
        rows.append([*name, str(cell["samples"]), f"{cell['chance']:.3f}", *shares, *change])
        low, high = (f"{end:+.3f}" for end in difference["margin_ci95"])
        found = [
            f"{cell[side][part]:.3f}" for part in ("generation_accuracy", "margin") for side in ("dense", "sparse")
        ]
        others.append([*name, *found, f"{difference['margin']:+.3f}", f"{low} .. {high}"])
    title = f"{model}: share of right answers; density {summary['density']:.4f}"
    print_table(title, ["task", "tokens", "asked", "chance", "dense", "sparse", "points", "95%", "p"], rows)
    columns = ["task", "tokens", "dense", "sparse", "dense nats", "sparse nats", "difference", "95%"]
    print_table("Right when generated; mean margin in nats", columns, others)
    if summary["too_hard"]:
        print(f"Say nothing, for the dense model is not above chance: {', '.join(summary['too_hard'])}")
    print(worst_task(summary["worst"]))


def worst_task(worst: dict[str, Any] | None) -> str:
    """The line that names the worst task."""
    if worst is None:
        return "Worst task: none, for the dense model can do no task"
    (low, high), (lowest, highest) = points(worst["difference"]["ci95"]), points(worst["simultaneous_ci95"])
    told = f"Worst task: {worst['task']} at {worst['context_length']} tokens, "
    told += f"{100 * worst['difference']['accuracy']:+.2f} points, 95% interval {low} .. {high}"
    return told + (f" ({lowest} .. {highest} for all {worst['of']} at once)" if worst["of"] > 1 else "")


def points(interval: list[float]) -> list[str]:
    return [f"{100 * end:+.2f}" for end in interval]
