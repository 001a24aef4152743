"""Count what the Triton kernels compute and move, stage by stage, and the least time that takes (a roofline).

    hf-sparse-attn roofline --model demo --seq-lens 16384 32768 65536 131072 --output benchmarks/gpu_roofline.json

How many keys the rows of a tile list together is counted on the text of the demo, at --counted-tokens, or on random
queries and keys, the worst case; the shape is Llama-3-8B's attention. Where there is a GPU, each kernel is also timed.
"""

from dataclasses import asdict
from typing import Any

from hf_sparse_attn.cli.argument_types import positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors, print_table, refuse_token_ids
from hf_sparse_attn.cli.options import MODEL_HELP, add, command_parser
from hf_sparse_attn.config import text_config
from hf_sparse_attn.errors import argument
from hf_sparse_attn.output_files import write_json

SHAPE = (32, 8, 128)


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--seq-lens",
        type=positive_int,
        nargs="+",
        default=[16384, 32768, 65536, 131072],
        metavar="N",
        help="Count for sequences of N tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        default="forward",
        choices=("forward", "forward_backward"),
        help="Count the forward alone, or the backward, too (default: %(default)s).",
    )
    model_help = (
        f"Count the queries and keys of this model, {MODEL_HELP.partition(': ')[2][:-1]} (default: random ones)."
    )
    add(parser, "model", required=False, help=model_help)
    parser.add_argument(
        "--counted-tokens",
        type=positive_int,
        default=32768,
        metavar="N",
        help="Count the keys of tiles on N tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--tile-rows",
        type=positive_int,
        metavar="N",
        help="Count tiles of N rows in the forward (default: those of the kernels, 64 where they fit into a page).",
    )
    add(parser, "sparse-attention", "output")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    import torch

    from hf_sparse_attn.benchmarking.roofline import Ceilings, count_stages, dense_floor_ms
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.ops.triton import chunks as triton
    from hf_sparse_attn.ops.triton import launch as triton_launch

    with argument("sparse_attention"):
        config = SparseAttentionConfig.from_dict(arguments.sparse_attention)
    num_heads, num_kv_heads, head_dim = SHAPE
    half = torch.empty(0, head_dim, dtype=torch.bfloat16)
    refuse_token_ids(config)
    shape = half, num_heads // num_kv_heads, config.page_size
    backward, ceilings = arguments.passes == "forward_backward", Ceilings()
    tile_rows = [arguments.tile_rows or triton_launch.tile_shape(*shape)[0]]
    tile_rows += [triton_launch.tile_shape(*shape, backward=True)[0]] * backward
    counts, *others = count(arguments, tile_rows)
    of_backward = (others[0], triton.BACKWARD_CHUNK_ROWS) if backward else None
    source = {"inputs": arguments.model or "random", "counted_tokens": arguments.counted_tokens}
    tables = {"tile": asdict(counts), "ceilings": asdict(ceilings), "source": source}
    if backward:
        tables["backward_tile"] = asdict(others[0])
    results: list[dict[str, Any]] = []
    for num_tokens in dict.fromkeys(arguments.seq_lens):
        stages = count_stages(num_tokens, *SHAPE, config, counts, ceilings, of_backward)
        row = {"seq_len": num_tokens, "stages": stages, "floor_ms": sum(stage["floor_ms"] for stage in stages)}
        row["dense_floor_ms"] = dense_floor_ms(num_tokens, num_heads, head_dim, ceilings, backward)
        if torch.cuda.is_available():
            row["kernel_ms"] = measure(num_tokens, config, backward)
        results.append(row)
        if arguments.output:
            written = {"pass": arguments.passes, "shape": SHAPE, **tables, "rows": results}
            write_json(arguments.output, written | {"environment": describe_environment(half.device)})
        print_stages(row)


def count(arguments: Any, tile_rows: list[int]) -> list[Any]:
    """Count the keys per tile, for tiles of each of these sizes, over three layers of the model or of random inputs."""
    import torch

    from hf_sparse_attn.benchmarking.roofline import count_tiles, mean_counts
    from hf_sparse_attn.benchmarking.speed import layer_inputs, make_inputs
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.data import load_documents
    from hf_sparse_attn.loading import load_model, read_checkpoint
    from hf_sparse_attn.patterns import layer_pattern

    length, device = arguments.counted_tokens, torch.device("cpu")
    if not arguments.model:
        config = SparseAttentionConfig.from_dict(arguments.sparse_attention)
        query, key, _ = make_inputs(length, 4, 1, SHAPE[2], torch.float32, device)
        pattern = layer_pattern(config, 0, 4, 1, SHAPE[2], device, torch.float32)
        with argument("counted_tokens"):
            return [count_tiles(query[0], key[0], pattern, rows) for rows in tile_rows]
    path, model_config, tokenizer, sparse_attention = read_checkpoint(arguments.model, arguments.sparse_attention)
    config = SparseAttentionConfig.from_dict(sparse_attention)
    refuse_token_ids(config)
    text = "\n\n".join(load_documents("demo", "validation")["text"])
    tokens = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:length]])
    with argument("counted_tokens"):
        if tokens.shape[1] < length:
            raise ValueError(f"the text has {tokens.shape[1]} tokens, not {length}")
    model = load_model(arguments.model, path, arguments.sparse_attention, device=device, dtype=torch.float32)
    num_layers = text_config(model_config).num_hidden_layers
    found = []
    for layer in (num_layers // 6, num_layers // 2, num_layers - 1 - num_layers // 6):
        query, key, _ = layer_inputs(model, tokens, layer)
        heads = query.shape[1], key.shape[1], query.shape[-1]
        pattern = layer_pattern(config, layer, *heads, device, torch.float32)
        with argument("counted_tokens"):
            found.append([count_tiles(query[0], key[0], pattern, rows) for rows in tile_rows])
    return [mean_counts(of_size) for of_size in zip(*found, strict=True)]


def measure(num_tokens: int, config: Any, backward: bool) -> dict[str, float]:
    """The milliseconds of each Triton kernel, and of all others together, with random inputs."""
    import torch

    from hf_sparse_attn import sparse_attention
    from hf_sparse_attn.benchmarking.roofline import kernel_milliseconds
    from hf_sparse_attn.benchmarking.speed import make_inputs

    made = make_inputs(num_tokens, *SHAPE, torch.bfloat16, torch.device("cuda"))
    inputs = [x.requires_grad_(backward) for x in made]

    def attend() -> None:
        output = sparse_attention(*inputs, config=config.replace(implementation="triton"))
        if backward:
            torch.autograd.grad(output, inputs, torch.ones_like(output))

    return kernel_milliseconds(attend)


def print_stages(row: dict[str, Any]) -> None:
    print_table(
        f"{row['seq_len']} tokens: at least {row['floor_ms']:.2f} ms; dense at the rate of bf16 products: "
        f"{row['dense_floor_ms']:.2f} ms, {row['dense_floor_ms'] / row['floor_ms']:.1f} times that",
        ["stage", "GFLOP", "unit", "GB", "floor ms"],
        [
            [
                stage["stage"],
                f"{stage['gflop']:.0f}" if stage["gflop"] else "",
                stage["unit"] if stage["gflop"] else "",
                f"{stage['gbyte']:.2f}",
                f"{stage['floor_ms']:.2f}",
            ]
            for stage in row["stages"]
        ],
    )
