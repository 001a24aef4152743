"""Convert a dense checkpoint: fit the hash and what every head reads on sample documents.

    hf-sparse-attn convert --model demo --output converted
    hf-sparse-attn convert --model demo --output converted --target-density 0.13
    hf-sparse-attn convert --model demo --output converted --max-loss 0.01
    hf-sparse-attn convert --model meta-llama/Llama-3.2-1B --output converted --calibration-dataset books.jsonl
    hf-sparse-attn convert --model tuned --refit --output refitted
    hf-sparse-attn convert --model demo --output converted --remote-code
    hf-sparse-attn convert --model meta-llama/Meta-Llama-3-8B --output converted --dtype bfloat16 --offload

The weights stay as they are, unless --dtype rounds them. The output directory loads with stock
`from_pretrained(DIR, attn_implementation="sparse")` once `hf_sparse_attn` is imported, and as an ordinary dense model
without it. If it cannot be finished, what was fitted stays in a file beside it, which other commands take as
`--sparse-attention @FILE`. An estimate of the peak memory is printed before the weights are loaded.

`--refit` is for a converted model that was trained since. Without --target-density and --max-loss it reads as much as
before; a table shows what moved.
"""

from dataclasses import fields
from typing import Any

from hf_sparse_attn.calibration.budget_allocation import KEY_BUDGET
from hf_sparse_attn.calibration.convert import Conversion, convert
from hf_sparse_attn.calibration.refit import Refit
from hf_sparse_attn.calibration.settings import AUTO, TARGET_DENSITY, ConversionSettings
from hf_sparse_attn.cli.argument_types import count, output_directory, positive_int, positive_number, share
from hf_sparse_attn.cli.arguments import OneLineErrors, print_table
from hf_sparse_attn.cli.options import DATASET_HELP, add, command_parser
from hf_sparse_attn.progress import ProgressBars


def positions_or_auto(text: str) -> int | str:
    """The type of --dense-below."""
    return text if text == AUTO else count(text)


def make_parser() -> OneLineErrors:
    defaults = ConversionSettings()
    parser = command_parser(__doc__)
    add(parser, "model")
    add(
        parser, "output", type=output_directory, required=True, metavar="DIR", help="Write this new or empty directory."
    )
    parser.add_argument(
        "--calibration-dataset",
        nargs="+",
        default=[*defaults.datasets],
        metavar="DATASET",
        help=f"{DATASET_HELP[:-1]}; several give documents in turns (default: demo).",
    )
    parser.add_argument(
        "--num-calibration-documents",
        type=positive_int,
        default=defaults.num_calibration_documents,
        metavar="N",
        help="Calibrate on the first N documents that are long enough (default: %(default)s).",
    )
    add(
        parser,
        "context-length",
        type=positive_int,
        required=False,
        default=defaults.context_length,
        help="Read the first N tokens of each document (default: %(default)s).",
    )
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--target-density",
        type=share,
        metavar="SHARE",
        help=f"Let at most this share of the (row, key) pairs be read, from 0 to 1 (default: {TARGET_DENSITY}; with "
        "--refit, the share that the model reads as it is). A window that is not given has 256 keys, or less, down to "
        "64, if it would take over a sixth of that.",
    )
    aim.add_argument(
        "--max-loss",
        type=positive_number,
        metavar="NATS",
        help="Read as little instead as keeps the loss of a calibration document from rising by more nats per token.",
    )
    parser.add_argument(
        "--key-budget",
        type=positive_int,
        metavar="N",
        help="Score at most N candidate keys per row, on average over layers and KV heads; this limits time, where the "
        f"density limits what is read (default: {KEY_BUDGET}, or with --refit the model's own mean if that is larger).",
    )
    add(parser, "sparse-attention")
    parser.add_argument(
        "--dense-below",
        type=positions_or_auto,
        metavar="N",
        help="Let rows at positions less than N read everything; auto measures where sparse attention starts to win "
        "(default: 2048, or less if such rows would take over a sixth of the density).",
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="Fit a converted model anew after its weights were trained; fields that are not fitted stay as they are "
        "unless given, but for dense_layers, which is chosen anew.",
    )
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="Also write a file by which AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) loads the "
        "model with sparse attention, or says what to install; a model that has it keeps it.",
    )
    parser.add_argument(
        "--num-evaluation-documents",
        type=count,
        default=defaults.num_evaluation_documents,
        metavar="N",
        help="Measure the model card's figures on N documents; 0 leaves them out (default: %(default)s).",
    )
    add(parser, "device")
    add(
        parser,
        "dtype",
        help="Compute in float32, bfloat16, float16 or float64, and write the weights in it; auto is the checkpoint's "
        "own (default: %(default)s).",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="Leave weights for which the device has no room in the CPU's memory, and those for which that has no room "
        "on the disk; needs accelerate.",
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    settings = ConversionSettings(**{each.name: getattr(arguments, each.name) for each in fields(ConversionSettings)})
    report(
        convert(
            arguments.model,
            arguments.output,
            settings,
            progress=ProgressBars(),
            tell=print,
            kept_as="what was fitted, for --sparse-attention @FILE,",
        )
    )


def report(conversion: Conversion) -> None:
    choice, result = conversion.choice, conversion.evaluation
    factor = conversion.loss_factor
    told = "the real loss is higher" if factor is None else f"expected: times {factor:.2f}, as was measured"
    print_table(
        f"What density costs, in nats per token (predicted; {told})",
        ["density", "predicted", *(["expected"] if factor else []), "candidates per row", "dense layers"],
        [
            [
                f"{point.density:.3f}" + (" (chosen)" if point is choice else ""),
                f"{point.loss:.5f}",
                *([f"{point.loss * factor:.5f}"] if factor else []),
                f"{point.mean_key_budget:.0f}",
                ", ".join(map(str, point.dense_layers)) or "none",
            ]
            for point in sorted([*conversion.trade, choice], key=lambda point: point.density)
        ],
    )
    if conversion.refit:
        report_refit(conversion.refit)
    if conversion.local_layers:
        local = ", ".join(map(str, conversion.local_layers))
        print(f"read whole because of their own small windows, and counted in no density: layers {local}")
    size = len(conversion.config.calibrated_hash or "") / 1e6
    print(f"{conversion.output}: {size:.2f} MB of calibrated hash in config.json")
    print(describe_evaluation(result))


def report_refit(refit: Refit) -> None:
    print_table(
        "What the refit moved (predicted on the calibration documents with the weights as they are now)",
        ["", "nats per token", "density", "candidates per row"],
        [
            [name, f"{point.loss:.3g}", f"{point.density:.3f}", f"{point.mean_key_budget:.0f}"]
            for name, point in refit.steps
        ],
    )
    print_table(
        "By layer, in nats per token; heads change by their smallest weight or their KV head's candidates",
        ["layer", "old", "new", "changed"],
        [[str(moved.layer), f"{moved.old_loss:.3g}", f"{moved.new_loss:.3g}", moved.change] for moved in refit.layers],
    )


def describe_evaluation(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not evaluated: run scripts/eval_perplexity.py on documents that did not calibrate it"
    dense, sparse = result["dense"], result["sparse"]
    return (
        f"perplexity {dense['perplexity']:.4f} dense, {sparse['perplexity']:.4f} sparse "
        f"(x {result['perplexity_ratio']:.4f}) at density {sparse['density']:.4f}"
    )
