"""Peak memory of calibration, perplexity and a training step by size of the vocabulary.

    python scripts/measure_memory.py
    python scripts/measure_memory.py --vocab-sizes 262144 --work calibration perplexity --context-length 8192

The model has the shape of Gemma 3 270M and random weights in float32; each measurement runs in a process of its own on
the CPU. Prints the peak of the resident memory, and how much of it is above the weights: Python and its libraries, some
0.5 GB, are in it.
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
    parser.add_argument("--vocab-sizes", type=int, nargs="+", metavar="N", default=[32000, 49152, 128256, 262144])
    parser.add_argument(
        "--work",
        nargs="+",
        choices=WORK,
        default=["gradients", "perplexity", "training-step"],
        help="Measure these: the gradients are calibration's, of at most 2048 tokens (default: all but calibration).",
    )
    parser.add_argument("--context-length", type=int, metavar="N", default=2048, help="(default: %(default)s)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.work[0], arguments.vocab_sizes[0], arguments.context_length)))
        return
    print("| vocabulary | work | tokens | weights, GB | peak, GB | above the weights, GB |\n|---|---|---|---|---|---|")
    length = arguments.context_length
    for vocab_size in arguments.vocab_sizes:
        for work in arguments.work:
            options = ["--here", "--work", work, "--vocab-sizes", str(vocab_size), "--context-length", str(length)]
            finished = subprocess.run(
                [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
            )
            weights, peak = (size / 1e9 for size in json.loads(finished.stdout.splitlines()[-1]))
            print(
                f"| {vocab_size} | {work} | {length} | {weights:.2f} | {peak:.2f} | {peak - weights:.2f} |", flush=True
            )


def measure(work: str, vocab_size: int, context_length: int) -> tuple[int, int]:
    """Bytes of the weights, and the most that this process held until the work was done."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from hf_sparse_attn.calibration import calibrate
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.evaluation.perplexity import compare_perplexity
    from hf_sparse_attn.training import FinetuneArguments, FinetuneTrainer

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        tie_word_embeddings=True,
        attn_implementation="sparse",
    )
    model = Gemma3ForCausalLM(config).eval()
    ids = torch.randint(vocab_size, (context_length,))
    if work == "gradients":
        calibrate._gradient_moments(model, ids[: calibrate.GRADIENT_TOKENS], seed=0)
    elif work == "calibration":
        calibrate.calibrate(model, [ids], SparseAttentionConfig(), lambda step: print(step, file=sys.stderr))
    elif work == "perplexity":
        compare_perplexity(model, [{"name": "random", "input_ids": ids.tolist()}])
    else:
        with tempfile.TemporaryDirectory() as output:
            arguments = FinetuneArguments(output_dir=output, use_cpu=True, disable_tqdm=True)
            trainer = FinetuneTrainer(model, args=arguments)
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(model, {"input_ids": ids[None], "labels": ids[None]})
    return model.get_memory_footprint(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
