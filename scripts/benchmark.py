"""Time and memory of the attention alone, dense (SDPA) against sparse, alternating in one run.

python scripts/benchmark.py --seq-lens 2048 8192 32768 --output benchmark.json
python scripts/benchmark.py --seq-lens 4096 8192 --pass forward_backward --num-heads 32 --num-kv-heads 8 --head-dim 128
"""

from typing import Any

from hf_sparse_attn.command_line import (
    OneLineErrors,
    argument,
    check_output_file,
    json_object,
    positive_int,
    print_table,
    run,
    write_json,
)


def parse_arguments() -> Any:
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=positive_int, nargs="+", default=[2048, 8192, 32768], help="tokens")
    parser.add_argument("--pass", dest="passes", default="forward", choices=["forward", "forward_backward"])
    parser.add_argument("--num-heads", type=positive_int, default=9, help="default: %(default)s")
    parser.add_argument("--num-kv-heads", type=positive_int, default=3, help="default: %(default)s")
    parser.add_argument("--head-dim", type=positive_int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="timed runs of each side (default: %(default)s)"
    )
    parser.add_argument("--sparse-attention", type=json_object, default={}, help="JSON object of fields to set")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.output:
        with argument("--output"):
            check_output_file(arguments.output)
    with argument("--num-kv-heads"):
        if arguments.num_heads % arguments.num_kv_heads:
            raise ValueError(f"{arguments.num_kv_heads} does not divide --num-heads {arguments.num_heads}")

    from tqdm import tqdm

    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.evaluation.speed import compare_speed
    from hf_sparse_attn.loading import parse_device, parse_dtype

    with argument("--device"):
        device = parse_device(arguments.device)
    with argument("--dtype"):
        dtype = parse_dtype(arguments.dtype)
        if isinstance(dtype, str):
            raise ValueError("auto means a checkpoint's own dtype; there is no checkpoint here")
    with argument("--sparse-attention"):
        config = SparseAttentionConfig.from_dict(arguments.sparse_attention)

    rows = [
        compare_speed(
            seq_len,
            config=config,
            num_heads=arguments.num_heads,
            num_kv_heads=arguments.num_kv_heads,
            head_dim=arguments.head_dim,
            dtype=dtype,
            device=device,
            passes=arguments.passes,
            repeats=arguments.repeats,
        )
        for seq_len in tqdm(arguments.seq_lens, desc="benchmarking", unit="length")
    ]
    if arguments.output:
        shape = {name: getattr(arguments, name) for name in ("num_heads", "num_kv_heads", "head_dim", "dtype")}
        write_json(
            arguments.output,
            {"rows": rows, "shape": shape, "sparse_attention": config.to_dict()}
            | {"environment": describe_environment(device)},
        )
    print_rows(rows)


def print_rows(rows: list[dict[str, Any]]) -> None:
    print_table(
        f"{rows[0]['pass']}, attention alone",
        ["tokens", "dense ms", "sparse ms", "routing ms", "speedup", "density", "dense peak MB", "sparse peak MB"],
        [
            [
                str(row["seq_len"]),
                f"{row['dense_ms']:.1f}",
                f"{row['sparse_ms']:.1f}",
                f"{row['routing_ms']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['density']:.3f}",
                f"{row['dense_peak_bytes'] / 1e6:.0f}",
                f"{row['sparse_peak_bytes'] / 1e6:.0f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    run(main)
