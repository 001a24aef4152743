"""Measure time and memory of the attention alone or of a whole model, dense (SDPA) and sparse by turns in one run.

    hf-sparse-attn benchmark --model demo --seq-lens 2048 8192 32768 --output benchmark.json --picture benchmark.png
    hf-sparse-attn benchmark --model converted --seq-lens 8192 --pass prefill
    hf-sparse-attn benchmark --model demo --seq-lens 8192 --pass stages
    hf-sparse-attn benchmark --model demo --seq-lens 8192 32768 65536 --pass decode
    hf-sparse-attn benchmark --seq-lens 4096 8192 --pass forward_backward --num-heads 32 --num-kv-heads 8 --head-dim 128

With --model, the attention gets the queries, keys and values of one of its layers when it reads the demo text; without
it, random ones, which are the hardest: neighbouring rows have no keys in common, and no key is light enough to be left
out.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from hf_sparse_attn.cli.argument_types import positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors, UserError, print_table, refuse_token_ids, this_command
from hf_sparse_attn.cli.options import MODEL_HELP, SUFFIXES, add, command_parser
from hf_sparse_attn.config import text_config
from hf_sparse_attn.errors import argument
from hf_sparse_attn.output_files import replaced, write_json

OF_A_MODEL = ("prefill", "training_step", "generation", "compiled_generation")
PASSES = ("forward", "forward_backward", "stages", "decode", *OF_A_MODEL)
SHAPE = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
BACKENDS = ("flash", "cudnn", "efficient", "flex")


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--seq-lens",
        type=positive_int,
        nargs="+",
        default=[2048, 8192, 32768],
        metavar="N",
        help="Measure sequences of N tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        default="forward",
        choices=PASSES,
        help="Measure this pass of the attention: forward, forward_backward, stages (where the time goes, with Numba "
        "on a CPU) or decode (one step over a full cache); or of the whole --model: prefill, training_step or "
        "generation (one token; compiled_generation: by torch.compile) (default: %(default)s).",
    )
    add(
        parser,
        "model",
        required=False,
        help=f"Measure on real inputs, with the shape and the budgets of this model: {MODEL_HELP.partition(': ')[2]}",
    )
    parser.add_argument(
        "--random-model",
        metavar="NAME",
        help="Measure a whole untrained model instead of --model: llama-3-8b, llama-3.2-1b, mistral-7b, "
        "mistral-7b-v0.1, gemma-2-2b, gemma-3-270m or gemma-3-1b.",
    )
    parser.add_argument(
        "--layer", type=int, metavar="N", help="Take the inputs of the layer of index N (default: the middle one)."
    )
    for name, value in SHAPE.items():
        words = name.replace("num_", "").replace("kv", "KV").replace("_", " ")
        told = f"Give random inputs N {words}" if name != "head_dim" else "Give the heads of random inputs N dimensions"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=positive_int, metavar="N", help=f"{told} (default: {value})."
        )
    parser.add_argument(
        "--repeats", type=positive_int, default=3, metavar="N", help="Time each side N times (default: %(default)s)."
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=[],
        choices=BACKENDS,
        help="Also time these backends of SDPA, and as flex FlexAttention over window and global tokens alone; the "
        "speedup is then over the fastest dense one.",
    )
    add(parser, "sparse-attention")
    add(parser, "dtype", default="float32")
    add(parser, "device", "output")
    add(parser, "picture", help=f"Draw time against length to this {SUFFIXES} file.")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    arguments.seq_lens = list(dict.fromkeys(arguments.seq_lens))
    if arguments.picture:
        with argument("picture"):
            if len(arguments.seq_lens) < 2:
                raise ValueError("a picture of time against length needs two of --seq-lens")
            if arguments.passes == "stages":
                raise ValueError("stages have no picture")
    for name in SHAPE:
        if arguments.model and getattr(arguments, name):
            raise UserError(f"argument --{name.replace('_', '-')}: --model brings its own")
    shape = SHAPE | {name: getattr(arguments, name) for name in SHAPE if getattr(arguments, name)}
    with argument("num_kv_heads"):
        if shape["num_heads"] % shape["num_kv_heads"]:
            raise ValueError(f"{shape['num_kv_heads']} does not divide --num-heads {shape['num_heads']}")
    if not (arguments.model or arguments.random_model) and arguments.passes in OF_A_MODEL:
        raise UserError(f"argument --pass: {arguments.passes} is of a whole model; give --model")
    if arguments.random_model and (arguments.model or arguments.passes not in OF_A_MODEL):
        raise UserError(f"argument --random-model: for {', '.join(OF_A_MODEL)} alone, and without --model")
    if arguments.backends and arguments.passes not in PASSES[:2]:
        raise UserError(f"argument --backends: only for --pass {' and '.join(PASSES[:2])}")
    if not arguments.model and arguments.layer is not None:
        raise UserError("argument --layer: only a --model has layers")

    from tqdm import tqdm

    from hf_sparse_attn.benchmarking.speed import make_inputs
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.loading import parse_device, parse_dtype
    from hf_sparse_attn.ops import check_implementation
    from hf_sparse_attn.visualization import plot_times

    device = parse_device(arguments.device)
    dtype = parse_dtype(arguments.dtype)
    with argument("dtype"):
        if isinstance(dtype, str):
            raise ValueError("auto means a checkpoint's own dtype; give one")
    with argument("sparse_attention"):
        config = SparseAttentionConfig.from_dict(arguments.sparse_attention)
        check_implementation(config.implementation, device)
    if arguments.passes == "stages":
        with argument("pass", "stages"):
            check_implementation("numba", device)

    progress = partial(tqdm, arguments.seq_lens, desc="benchmarking", unit="length")
    if arguments.model or arguments.random_model:
        source, config, measured = measure_model(arguments, device, dtype, progress)
    else:
        source = {"inputs": "random", **shape}
        check_stages(arguments, config)
        refuse_token_ids(config)
        measured = (
            measure_attention(
                arguments,
                make_inputs(seq_len + decoded_after(arguments), **shape, dtype=dtype, device=device),
                config,
            )
            for seq_len in progress()
        )
    rows: list[dict[str, Any]] = []
    try:
        for row in measured:
            rows.append(row)
            if arguments.output:  # each time: the next length may need more memory than there is
                result = {"rows": rows, "source": source | {"dtype": arguments.dtype}}
                result |= {"sparse_attention": config.to_dict(), "environment": describe_environment(device)}
                result["command"] = this_command(print_result)
                write_json(arguments.output, result)
    finally:
        if rows:
            print_rows(rows)
    if arguments.picture:
        with replaced(arguments.picture) as picture:
            plot_times(rows, picture)


def decoded_after(arguments: Any) -> int:
    """How many tokens are decoded after each of --seq-lens."""
    from hf_sparse_attn.benchmarking.decoding import decoded_tokens

    return decoded_tokens(arguments.repeats) if arguments.passes == "decode" else 0


def check_stages(arguments: Any, config: Any, layer: int = 0) -> None:
    """Make sure that every length has sparse rows, if their stages are measured."""
    with argument("seq_lens"):
        shortest = min(arguments.seq_lens)
        if arguments.passes == "stages" and (layer in config.dense_layers or shortest <= config.dense_below):
            raise ValueError(f"all of the {shortest} rows are dense: there are no stages")


def measure_attention(arguments: Any, inputs: Any, config: Any, layer: int = 0) -> dict[str, Any]:
    from hf_sparse_attn.benchmarking.decoding import compare_decoding
    from hf_sparse_attn.benchmarking.speed import compare_speed, measure_stages

    if arguments.passes == "decode":
        return compare_decoding(inputs, config=config, layer_idx=layer, repeats=arguments.repeats)
    if arguments.passes == "stages":
        return measure_stages(inputs, config=config, layer_idx=layer, repeats=arguments.repeats)
    return compare_speed(
        inputs,
        config=config,
        layer_idx=layer,
        passes=arguments.passes,
        repeats=arguments.repeats,
        backends=arguments.backends,
    )


def measure_model(
    arguments: Any, device: Any, dtype: Any, progress: Any
) -> tuple[dict[str, Any], Any, Iterator[dict[str, Any]]]:
    """Say what is measured: its source, the model's configuration, and the rows, each measured when it is asked for."""
    import torch

    from hf_sparse_attn.benchmarking.random_models import random_sparse_model
    from hf_sparse_attn.benchmarking.speed import layer_inputs
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.data import load_documents
    from hf_sparse_attn.loading import load_model, read_checkpoint

    if arguments.random_model:
        with argument("random_model"):
            model = random_sparse_model(arguments.random_model, arguments.sparse_attention, dtype, device)
        config = SparseAttentionConfig.from_dict(text_config(model.config).sparse_attention)
        tokens = torch.randint(text_config(model.config).vocab_size, (1, max(arguments.seq_lens)), device=device)
        rows = (measure_whole(arguments, model, tokens[:, :seq_len]) for seq_len in progress())
        return {"inputs": "random tokens", "model": f"{arguments.random_model}, random weights"}, config, rows
    path, model_config, tokenizer, sparse_attention = read_checkpoint(arguments.model, arguments.sparse_attention)
    config = SparseAttentionConfig.from_dict(sparse_attention)
    num_layers = text_config(model_config).num_hidden_layers
    layer = num_layers // 2 if arguments.layer is None else arguments.layer
    with argument("layer"):
        if not 0 <= layer < num_layers:
            raise ValueError(f"must be from 0 to {num_layers - 1}, got {layer}")
    check_stages(arguments, config, layer)
    if arguments.passes not in OF_A_MODEL:
        refuse_token_ids(config)
    text = "\n\n".join(load_documents("demo", "validation")["text"])
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], device=device)
    more = decoded_after(arguments)
    with argument("seq_lens"):
        if max(arguments.seq_lens) + more > len(tokens):
            raise ValueError(f"the text has {len(tokens)} tokens, not {max(arguments.seq_lens) + more}")
    model = load_model(arguments.model, path, arguments.sparse_attention, device=device, dtype=dtype)

    def measure(seq_len: int) -> dict[str, Any]:
        ids = tokens[None, : seq_len + more]
        if arguments.passes in OF_A_MODEL:
            return measure_whole(arguments, model, ids)
        with argument("layer"):
            inputs = tuple(x.to(dtype) for x in layer_inputs(model, ids, layer))
        return measure_attention(arguments, inputs, config, layer)

    source = {"inputs": "demo text", "model": arguments.model}
    return source | ({"layer": layer} if arguments.passes not in OF_A_MODEL else {}), config, map(measure, progress())


def measure_whole(arguments: Any, model: Any, ids: Any) -> dict[str, Any]:
    from hf_sparse_attn.benchmarking.decoding import compare_generation
    from hf_sparse_attn.benchmarking.speed import compare_model_speed

    if arguments.passes.endswith("generation"):
        return compare_generation(model, ids, arguments.repeats, compiled=arguments.passes == "compiled_generation")
    return compare_model_speed(model, ids, arguments.passes, arguments.repeats)


def print_result(result: dict[str, Any]) -> None:
    print_rows(result["rows"])


def print_rows(rows: list[dict[str, Any]]) -> None:
    if rows[0]["pass"] == "stages":
        for row in rows:
            print_stages(row)
        return
    timed = ("dense", "dense_device", *BACKENDS, "sparse", "sparse_device", "sparse_graph", "routing", "floor")
    parts = [part for part in timed if f"{part}_ms" in rows[0]]
    digits = 2 if rows[0]["pass"] == "decode" else 1
    memory = "cache" if rows[0]["pass"] in ("decode", "generation", "compiled_generation") else "peak"
    sides = (f"{side} {memory} MB" for side in ("dense", "sparse"))
    print_table(
        f"{rows[0]['pass']}: medians",
        ["tokens", *(f"{part.replace('_', ' ')} ms" for part in parts), "speedup", "density", *sides],
        [
            [
                str(row["seq_len"]),
                *("-" if row[f"{part}_ms"] is None else f"{row[f'{part}_ms']:.{digits}f}" for part in parts),
                f"{row['speedup']:.2f}",
                f"{row['density']:.3f}",
                f"{row['dense_peak_bytes'] / 1e6:.0f}",
                f"{row['sparse_peak_bytes'] / 1e6:.0f}",
            ]
            for row in rows
        ],
    )


def print_stages(row: dict[str, Any]) -> None:
    print_table(
        f"{row['seq_len']} tokens; SDPA: {row['dense_ms']:.0f} ms, backward {row['dense_backward_ms']:.0f} ms",
        ["stage", "ms", "GFLOP", "floor ms", "GB loaded", "GB/s"],
        [
            [
                stage["stage"],
                f"{stage['ms']:.1f}",
                f"{stage['gflop']:.1f}" if stage["gflop"] else "",
                f"{stage['floor_ms']:.1f}" if stage["gflop"] else "",
                f"{stage['gbyte']:.1f}" if stage["gbyte"] else "",
                f"{1e3 * stage['gbyte'] / stage['ms']:.0f}" if stage["gbyte"] else "",
            ]
            for stage in row["stages"]
        ],
    )
