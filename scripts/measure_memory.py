"""Peak memory of calibration, perplexity and a training step by size of the vocabulary, beside what is estimated.

    python scripts/measure_memory.py
    python scripts/measure_memory.py --vocab-sizes 262144 --work calibration perplexity --context-length 8192
    python scripts/measure_memory.py --shape llama-3.2-1b --dtype bfloat16 --work calibration perplexity
    python scripts/measure_memory.py --shape llama-3-8b --dtype bfloat16 --context-length 8192 --estimate-only

The model has the shape of a known one, of Gemma 3 270M unless --shape names another, and random weights; each
measurement runs in a process of its own on the CPU. Prints the peak of the resident memory, how much of it is above the
weights (Python and its libraries, some 0.5 GB, are in it), and the estimate that `convert` prints of the same work.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile

WORK = ("gradients", "calibration", "perplexity", "training-step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", metavar="NAME", default="gemma-3-270m", help="(default: %(default)s)")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", metavar="N", help="(default: the shape's own)")
    parser.add_argument("--dtype", metavar="DTYPE", default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--work",
        nargs="+",
        choices=WORK,
        default=["gradients", "perplexity", "training-step"],
        help="Measure these: the gradients are calibration's, of at most 2048 tokens (default: all but calibration).",
    )
    parser.add_argument("--context-length", type=int, metavar="N", default=2048, help="(default: %(default)s)")
    parser.add_argument(
        "--estimate-only", action="store_true", help="Print what a conversion is estimated to take, without running it."
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    vocab_sizes = arguments.vocab_sizes or [None]
    shape = arguments.shape, arguments.dtype, arguments.context_length
    if arguments.here:
        print(json.dumps(measure(arguments.work[0], vocab_sizes[0], *shape)))
        return
    if arguments.estimate_only:
        for vocab_size in vocab_sizes:
            print(estimate(vocab_size, *shape))
        return
    print("| vocabulary | work | tokens | weights, GB | peak, GB | above the weights, GB | estimated peak, GB |")
    print("|---|---|---|---|---|---|---|")
    for vocab_size in vocab_sizes:
        for work in arguments.work:
            of_size = [] if vocab_size is None else ["--vocab-sizes", str(vocab_size)]
            options = [*sys.argv[1:], "--here", "--work", work, *of_size]  # the last of an option holds
            finished = subprocess.run(
                [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
            )
            found, *sizes = json.loads(finished.stdout.splitlines()[-1])
            weights, peak, estimated = (size / 1e9 for size in sizes)
            print(
                f"| {found} | {work} | {arguments.context_length} | {weights:.2f} | {peak:.2f} | {peak - weights:.2f} "
                f"| {f'{estimated:.2f}' if estimated else ''} |",
                flush=True,
            )


def estimate(vocab_size, shape, dtype, context_length):  # type: ignore[no-untyped-def]
    """What a conversion of a model of this shape is estimated to take; `ConversionMemory`."""
    from hf_sparse_attn.benchmarking.random_models import shape_config
    from hf_sparse_attn.calibration.calibrate import GRADIENT_TOKENS
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.loading import parse_dtype
    from hf_sparse_attn.memory import ModelSize, conversion_memory

    changes = {} if vocab_size is None else {"vocab_size": vocab_size}
    size = ModelSize.of(shape_config(shape, **changes), parse_dtype(dtype))
    return conversion_memory(size, SparseAttentionConfig(), context_length, GRADIENT_TOKENS)


def measure(
    work: str, vocab_size: int | None, shape: str, dtype: str, context_length: int
) -> tuple[int, int, int, float]:
    """The vocabulary, bytes of the weights, the most that this process held until the work was done, and estimated.

    Nothing (0) is estimated of a training step.
    """
    import torch

    from hf_sparse_attn.benchmarking.random_models import random_sparse_model
    from hf_sparse_attn.calibration import calibrate
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.evaluation.perplexity import compare_perplexity
    from hf_sparse_attn.memory import LIBRARIES
    from hf_sparse_attn.training import FinetuneArguments, FinetuneTrainer

    changes = {} if vocab_size is None else {"vocab_size": vocab_size}
    model = random_sparse_model(shape, None, getattr(torch, dtype), torch.device("cpu"), **changes)
    vocab_size = model.config.vocab_size
    ids = torch.randint(vocab_size, (context_length,))
    tokens = min(context_length, calibrate.GRADIENT_TOKENS) if work == "gradients" else context_length
    estimated = estimate(vocab_size, shape, dtype, tokens)
    above = estimated.evaluation if work == "perplexity" else estimated.calibration
    if work == "gradients":
        calibrate._gradient_moments(model, ids[:tokens], seed=0)
    elif work == "calibration":
        calibrate.calibrate(model, [ids], SparseAttentionConfig(), lambda step: print(step, file=sys.stderr))
    elif work == "perplexity":
        compare_perplexity(model, [{"name": "random", "input_ids": ids.tolist()}])
    else:
        above = -LIBRARIES - estimated.weights
        with tempfile.TemporaryDirectory() as output:
            arguments = FinetuneArguments(output_dir=output, use_cpu=True, disable_tqdm=True)
            trainer = FinetuneTrainer(model, args=arguments)
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(model, {"input_ids": ids[None], "labels": ids[None]})
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return vocab_size, model.get_memory_footprint(), peak, LIBRARIES + estimated.weights + above


if __name__ == "__main__":
    main()
