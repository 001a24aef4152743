"""Compare the field's sparse patterns on one model at the same density: perplexity, divergence, tasks and time.

    hf-sparse-attn compare-patterns --model demo --dataset demo --context-lengths 8192 --densities 0.2 0.1 \
        --output patterns.json --picture patterns.png
    hf-sparse-attn compare-patterns --model demo --dataset book.txt --context-lengths 2048 4096 --densities 0.15 \
        --patterns converted longformer ssa oracle --num-samples 2

Patterns are the presets of docs/patterns.md, each with the number that brings it to the density, and:

  converted    what `convert` fits on --calibration-dataset
  block-votes  the blocks of minference-like beside the window and the leading keys of ssa
  ssa-votes    the buckets of ssa, with a vote: the rows of a block all read what most of them find
  quest-like   the window and the leading keys of ssa, and pages with the largest bounds of a score, as in Quest
  oracle       the same, and the keys with the largest weights of the dense softmax

minference-like, block-votes and ssa-votes look at later tokens, so that their perplexity is no measure: each pattern is
put to a leak test. The last three are here to say what could be had, and their time means nothing. The table has the
perplexity over that of dense attention, the mean KL(dense || sparse) in nats, how often both expect the same token
most, the share of dense attention's mass that is read, how far earlier logits move when a later token is changed, the
task of docs/tasks.md that loses most, and the speed over that of dense attention.
Results that --output holds already, made with the same options, are kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.cli.argument_types import fraction, positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors, print_table, report, resumed
from hf_sparse_attn.cli.options import DATASET_HELP, FIELDS_HELP, SUFFIXES, add, command_parser
from hf_sparse_attn.config import SparseAttentionConfig, layer_shape
from hf_sparse_attn.errors import ArgumentError, argument
from hf_sparse_attn.evaluation.tasks import TASKS, Haystack, Vocabulary, prompt_of
from hf_sparse_attn.output_files import replaced
from hf_sparse_attn.presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_sparse_attn.evaluation.tasks import Prompt
    from hf_sparse_attn.ops import Chooser

CONVERTED = "converted"
NAMES = (CONVERTED, *PRESETS, "block-votes", "ssa-votes", "quest-like", "oracle")


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model", "dataset", "split")
    add(parser, "context-lengths", help="Compare at these numbers of tokens.")
    add(parser, "max-documents", default=4)
    parser.add_argument(
        "--densities",
        type=fraction,
        nargs="+",
        default=[0.2, 0.1],
        metavar="SHARE",
        help="Bring each pattern to these shares of the admissible pairs (default: %(default)s).",
    )
    parser.add_argument(
        "--patterns",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"Compare these: {', '.join(NAMES)} (default: all of them).",
    )
    parser.add_argument(
        "--calibration-dataset",
        default="demo",
        metavar="DATASET",
        help=f"{DATASET_HELP.replace('Read', 'Convert with')[:-1]} (default: %(default)s).",
    )
    add(parser, "sparse-attention", help=f"{FIELDS_HELP[:-1]}, in the conversion (default: {{}}).")
    parser.add_argument(
        "--num-rows",
        type=positive_int,
        default=64,
        metavar="N",
        help="Measure the kept mass of N rows of the first document (default: %(default)s).",
    )
    parser.add_argument(
        "--tasks",
        nargs="*",
        choices=list(TASKS),
        default=["niah_single", "niah_multikey"],
        metavar="NAME",
        help=f"Ask these: {', '.join(TASKS)}; none to ask nothing (default: niah_single niah_multikey).",
    )
    add(parser, "num-samples", default=1, help="Make N texts for each task (default: %(default)s).")
    add(parser, "seed", "device", "dtype", "output")
    add(parser, "picture", help=f"Draw what each pattern costs to this {SUFFIXES} file.")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    from tqdm import tqdm

    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.evaluation.pattern_comparison import compare_patterns, plot_comparison
    from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint

    device, dtype = parse_device(arguments.device), parse_dtype(arguments.dtype)
    path, model_config, tokenizer, _ = read_checkpoint(arguments.model)
    with argument("sparse_attention"):
        SparseAttentionConfig.from_dict(arguments.sparse_attention)
    lengths = sorted(set(arguments.context_lengths))
    inputs = read_inputs(arguments, tokenizer, lengths)
    num_kv_heads = (layer_shape(model_config, 0) or (1, 1, 1))[1]
    variants = {length: chosen_patterns(arguments, length, num_kv_heads) for length in lengths}
    result, keep = resumed(arguments)
    result.setdefault("fitted", {})
    if CONVERTED in (arguments.patterns or [CONVERTED]):
        fit_conversions(arguments, lengths, variants, result, keep)
    model = load_model(arguments.model, path, device=device, num_tokens=lengths[-1], dtype=dtype)
    result |= {
        "documents": {str(length): [document["name"] for document in inputs[length][0]] for length in lengths},
        "environment": describe_environment(device),
    }
    for length in lengths:
        results = result["results"].setdefault(str(length), {})
        with argument("model", arguments.model):
            for name, found in compare_patterns(
                model,
                *inputs[length],
                variants[length],
                num_rows=arguments.num_rows,
                known=dict(results),
                progress=partial(tqdm, desc=f"comparing at {length} tokens", unit="pattern"),
            ):
                results[name] = found
                keep()
    del result["fitted"]  # it was kept in case of an interruption
    report(result, arguments.output, print_result)
    if arguments.picture:
        with replaced(arguments.picture) as picture:
            plot_comparison({int(length): by_pattern(found) for length, found in result["results"].items()}, picture)


def read_inputs(
    arguments: Any, tokenizer: Any, lengths: list[int]
) -> dict[int, tuple[list[dict[str, Any]], list[Prompt]]]:
    """The documents and the prompts of each length."""
    from hf_sparse_attn.data import load_documents, long_documents, stream_documents

    with argument("dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
        haystack = Haystack(stream_documents(arguments.dataset, arguments.split))
    vocabulary, inputs = Vocabulary(tokenizer), {}
    for length in lengths:
        with argument("dataset"):
            documents = long_documents(texts, tokenizer, length, arguments.max_documents)
        prompts = []
        for task in dict.fromkeys(arguments.tasks):
            with argument("tasks", f"{task}, {length} tokens"):
                for sample in range(arguments.num_samples):
                    prompts.append(prompt_of(task, length, sample, vocabulary, haystack, arguments.seed))
        inputs[length] = documents, prompts
    return inputs


def chosen_patterns(
    arguments: Any, num_tokens: int, num_kv_heads: int
) -> dict[str, tuple[SparseAttentionConfig, Chooser | None]]:
    """Each preset at each density, by name; presets that the model cannot have are left out if nobody named them, and
    densities that a preset cannot have, too."""
    from hf_sparse_attn.evaluation.pattern_comparison import CHOOSERS, expected_density, pattern_at

    variants = {}
    for name in arguments.patterns or NAMES:
        if name == CONVERTED:
            continue
        with argument("patterns", name):
            try:
                for density in arguments.densities:
                    config, choose = pattern_at(name, density, num_tokens, num_kv_heads), CHOOSERS.get(name)
                    least = expected_density(config, num_tokens, num_kv_heads, choose)
                    if least > density:
                        tell_left_out(f"{name} {density:g}", num_tokens, f"it reads at least {least:.4f}")
                    else:
                        variants[f"{name} {density:g}"] = config, choose
            except ValueError as error:
                if arguments.patterns:
                    raise
                tell_left_out(name, num_tokens, error)
    return variants


def tell_left_out(name: str, num_tokens: int, reason: object) -> None:
    print(f"{name} is left out at {num_tokens} tokens: {reason}")


def fit_conversions(
    arguments: Any,
    lengths: list[int],
    variants: dict[int, dict[str, tuple[SparseAttentionConfig, Chooser | None]]],
    result: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Add what `convert` fits at each length for each density; densities that it cannot have are left out."""
    from hf_sparse_attn.calibration.convert import fit
    from hf_sparse_attn.calibration.settings import ConversionSettings
    from hf_sparse_attn.progress import ProgressBars

    with TemporaryDirectory() as folder:
        for length in lengths:
            known, fitted = result["results"].get(str(length), {}), result["fitted"].setdefault(str(length), {})
            for density in arguments.densities:
                name = f"{CONVERTED} {density:g}"
                settings = ConversionSettings(
                    calibration_dataset=arguments.calibration_dataset,
                    context_length=length,
                    target_density=density,
                    sparse_attention=arguments.sparse_attention,
                    num_evaluation_documents=0,
                    device=arguments.device,
                    dtype=arguments.dtype,
                )
                if name not in known and name not in fitted:
                    try:
                        config = fit(arguments.model, settings, Path(folder), progress=ProgressBars(), tell=print)
                    except ArgumentError as error:
                        if error.name not in ("target_density", "context_length"):
                            raise
                        tell_left_out(name, length, error)
                        continue
                    fitted[name] = config.to_dict()
                    keep()
                variants[length][name] = SparseAttentionConfig.from_dict(fitted.get(name)), None


def by_pattern(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What was found with each pattern, at one density after the other."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, measured in results.items():
        if name != "dense":
            found.setdefault(name.rpartition(" ")[0], []).append(measured)
    return found


def print_result(result: dict[str, Any]) -> None:
    for length, results in result["results"].items():
        found = dict(results)
        dense, rows = found.pop("dense"), []
        for name, row in sorted(found.items(), key=lambda item: (item[0].rpartition(" ")[2], item[1]["ratio"])):
            low, high = row["delta_nll"]["ci95"]
            figures = [f"{row['density']:.4f}", f"{row['ratio']:.4f}", f"{low:+.4f} .. {high:+.4f}"]
            figures += [f"{row['kl']['mean']:.3g}", f"{row['top1_agreement']:.4f}"]
            speed = f"{row['dense_seconds'] / row['seconds']:.2f}" if row["seconds"] else "-"
            shown = name if row["is_causal"] else f"{name} (not causal)"
            figures += [f"{row['kept_mass']:.4f}", "-" if row.get("leak") is None else f"{row['leak']:.2g}"]
            rows.append([shown, *figures, *worst_task(row["tasks"]), speed])
        columns = ["pattern", "density", "ratio", "95%, nats", "KL", "top-1", "mass", "leak", "worst task", "points"]
        told = f"{result['settings']['model']}: {len(dense['nll'])} documents of {length} tokens; "
        print_table(f"{told}dense perplexity {dense['perplexity']:.4f}", [*columns, "speed"], rows)


def worst_task(tasks: dict[str, Any] | None) -> list[str]:
    """Its name, and what is lost in points, if anything was asked that the dense model knows."""
    worst = tasks and tasks["worst"]
    return [worst["task"], f"{100 * worst['difference']['accuracy']:+.1f}"] if worst else ["-", "-"]
