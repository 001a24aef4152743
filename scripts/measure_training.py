"""Peak memory and time of a training step, sparse attention beside Transformers' own Trainer with SDPA, and estimated.

    python scripts/measure_training.py --lengths 2048 4096 --output training_memory.json
    python scripts/measure_training.py --lengths 32768 --cases sparse-checkpointing sdpa-checkpointing --timeout 3600
    python scripts/measure_training.py --random-model gemma-3-270m --lengths 2048 --cases sparse

Each case runs in a process of its own on the CPU: a step on a short row, so that the optimizer has its states, then one
on a row of each length, which is timed. The peak is that of the resident memory. A process that comes to hold more than
--limit gigabytes is ended and recorded as "out of memory", one that takes longer than --timeout seconds as "timeout".
The output file is written after each case, and cases that it has seconds of already are not run again. "sdpa" is
Transformers' own Trainer; "sdpa-returning" is that with the allocator set as `finetune` sets it on a CPU.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHORT = 128  # tokens of the first step
POLL_SECONDS = 0.1

# Arguments of FinetuneArguments, and the dtype of the weights.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "sparse": ({}, "float32"),
    "sparse-checkpointing": ({"gradient_checkpointing": True}, "float32"),
    "sparse-distilled": ({}, "float32"),
    "sparse-distilled-checkpointing": ({"gradient_checkpointing": True}, "float32"),
    "sparse-lora": ({"lora_rank": 8}, "float32"),
    "sparse-lora-checkpointing": ({"lora_rank": 8, "gradient_checkpointing": True}, "float32"),
    "sparse-bf16": ({"bf16": True}, "float32"),
    "sparse-bf16-checkpointing": ({"bf16": True, "gradient_checkpointing": True}, "float32"),
    "sparse-bfloat16": ({}, "bfloat16"),
    "sparse-bfloat16-checkpointing": ({"gradient_checkpointing": True}, "bfloat16"),
    "sparse-bfloat16-lora": ({"lora_rank": 8}, "bfloat16"),
    "sparse-bfloat16-lora-checkpointing": ({"lora_rank": 8, "gradient_checkpointing": True}, "bfloat16"),
    "sdpa": ({}, "float32"),
    "sdpa-checkpointing": ({"gradient_checkpointing": True}, "float32"),
    "sdpa-returning": ({}, "float32"),
    "sdpa-checkpointing-returning": ({"gradient_checkpointing": True}, "float32"),
}
RETURNING = ("sparse", "returning")  # cases of which the name has one of these call `return_freed_memory`, as finetune
DEFAULT_CASES = ["sparse", "sparse-checkpointing", "sdpa", "sdpa-checkpointing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL", default="demo", help="(default: %(default)s)")
    parser.add_argument(
        "--random-model", metavar="NAME", help="Take random weights of this shape, or of a config.json."
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", default=[2048, 4096], help="Tokens of a row.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES, help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, metavar="GB", help="(default: nine tenths of what is free)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", default=1800.0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write and complete this JSON file.")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    name = arguments.random_model or arguments.model
    if arguments.here:
        measured = measure(name, arguments.random_model is not None, arguments.cases[0], arguments.lengths[0])
        print(json.dumps(measured))
        return

    import torch

    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.memory import available_memory
    from hf_sparse_attn.output_files import write_json

    cpu = torch.device("cpu")
    report: dict[str, Any] = {"rows": []}
    if arguments.output and arguments.output.exists():
        report = json.loads(arguments.output.read_text())
    asked = {(name, case, length) for case in arguments.cases for length in arguments.lengths}
    report["rows"] = [
        row for row in report["rows"] if row["status"] == "" or (row["model"], row["case"], row["tokens"]) not in asked
    ]
    done = {(row["model"], row["case"], row["tokens"]) for row in report["rows"]}
    report["environment"] = describe_environment(cpu)
    print("| case | tokens | peak, GB | estimated, GB | seconds | |\n|---|---|---|---|---|---|")
    for length in sorted(arguments.lengths):
        for case in arguments.cases:
            if (name, case, length) in done:
                continue
            limit = 1e9 * arguments.limit if arguments.limit else 0.9 * (available_memory(cpu) or 2**62)
            # The last of an option holds.
            command = [sys.executable, __file__, *sys.argv[1:], "--here", "--cases", case, "--lengths", str(length)]
            row = {"model": name, "case": case, "tokens": length, **run(command, limit, arguments.timeout)}
            report["rows"].append(row)
            if arguments.output:
                write_json(arguments.output, report)
            figures = [f"{row[key] / 1e9:.2f}" if row.get(key) else "" for key in ("peak_bytes", "estimated_bytes")]
            seconds = f"{row['seconds']:.1f}" if row.get("seconds") else ""
            print(f"| {case} | {length} | {' | '.join(figures)} | {seconds} | {row['status']} |", flush=True)


def run(command: list[str], limit: float, timeout: float) -> dict[str, Any]:
    """What a process prints as JSON, with its "status"; it is ended where it takes too much memory or time."""
    import psutil

    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        started, peak, status = time.monotonic(), 0, ""
        while process.poll() is None:
            try:
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            except psutil.Error:
                break  # it has ended
            if peak > limit:
                status = "out of memory"
            elif time.monotonic() - started > timeout:
                status = "timeout"
            if status:
                process.kill()
                break
            time.sleep(POLL_SECONDS)
        returned = process.wait()
        output.seek(0)
        errors.seek(0)
        lines, told = output.read().splitlines(), errors.read()
    if not status and returned == 0:
        return {"status": "", **json.loads(lines[-1])}
    if not status:
        lacking = returned == -9 or "MemoryError" in told or "allocate memory" in told
        status = "out of memory" if lacking else f"failed: {(told.splitlines() or [''])[-1]}"
    return {"status": status, "peak_bytes": peak, "limit_bytes": int(limit) if status == "out of memory" else None}


def measure(name: str, is_random: bool, case: str, length: int) -> dict[str, Any]:
    """Seconds of a step, the most that this process ever held, and what was estimated, in all and by part."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, default_data_collator

    from hf_sparse_attn.benchmarking.random_models import random_sparse_model
    from hf_sparse_attn.loading import load_sparse_model, resolve_model
    from hf_sparse_attn.memory import ModelSize
    from hf_sparse_attn.training import Distillation, FinetuneArguments, make_trainer, training_memory
    from hf_sparse_attn.training.allocator import return_freed_memory

    options, dtype = CASES[case]
    if any(word in case for word in RETURNING):
        return_freed_memory()
    torch_dtype = getattr(torch, dtype)
    if is_random:
        model = (
            AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(name), attn_implementation="sparse", dtype=torch_dtype
            )
            if Path(name).is_file()
            else random_sparse_model(name, None, torch_dtype, torch.device("cpu"))
        )
        ids = torch.randint(model.config.vocab_size, (length,)).tolist()
    else:
        model = load_sparse_model(resolve_model(name), dtype=torch_dtype)
        ids = tokens_of_text(resolve_model(name), length)
    rows = Dataset.from_list([{"input_ids": part, "labels": part} for part in (ids[:SHORT], ids)])

    times: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        on_step_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        arguments = FinetuneArguments(
            output_dir=folder,
            use_cpu=True,
            disable_tqdm=True,
            max_steps=2,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            logging_first_step=False,
            **options,
        )
        distillation = Distillation(layer_weight=0.5) if "distilled" in case else None
        estimated = training_memory(ModelSize.of(model.config, torch_dtype), length, arguments, distillation)
        if case.startswith("sdpa"):
            model.set_attn_implementation("sdpa")
            trainer = Trainer(model, arguments, default_data_collator, rows)
        else:
            trainer = make_trainer(model, None, rows, arguments, distillation=distillation)
        trainer.add_callback(Watch())
        trainer.train()
    return {
        "seconds": times[-1] - times[-2],
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    } | ({} if case.startswith("sdpa") else {"estimated_bytes": estimated.peak, "parts": estimated.parts})


def tokens_of_text(path: str, length: int) -> list[int]:
    """The first tokens of the demo documents, as one document."""
    from transformers import AutoTokenizer

    from hf_sparse_attn.data import load_documents, tokenize

    documents = tokenize(load_documents("demo", "train"), AutoTokenizer.from_pretrained(path))
    ids = [token for document in documents for token in document["input_ids"]]
    if len(ids) < length:
        raise ValueError(f"the demo documents have {len(ids)} tokens, not {length}")
    return ids[:length]


if __name__ == "__main__":
    main()
