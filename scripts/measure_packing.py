"""Measure how rows are filled: documents that are cut, tokens left out, padding, and the time that it takes.

    python scripts/measure_packing.py --output benchmarks/packing.json

Of the demo documents as they are and split at classes and functions, and of random lengths.
"""

import argparse
import re
import time

import numpy as np
import torch
from datasets import Dataset

from hf_sparse_attn.cli.argument_types import output_file
from hf_sparse_attn.data import best_fit, load_documents, packed, tokenize
from hf_sparse_attn.data.packing import best_fit_bins
from hf_sparse_attn.data.rows import lengths
from hf_sparse_attn.data.streams import BUFFER_ROWS, BUFFER_TOKENS
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.loading import read_checkpoint
from hf_sparse_attn.output_files import write_json

CONTEXT_LENGTHS = (2048, 8192, 32768)
NUM_RANDOM, NUM_TIMED = 20_000, 200_000


def demo_tokens() -> dict[str, Dataset]:
    """The demo's documents, and their parts, with their tokens."""
    tokenizer = read_checkpoint("demo")[2]
    documents = load_documents("demo")
    parts = [part for text in documents["text"] for part in re.split(r"\n(?=class |def )|\n\n\n", text) if part.strip()]
    split = Dataset.from_list([{"name": "part", "text": part} for part in parts])
    return {
        "demo": tokenize(documents, tokenizer, eos=True),
        "demo, split at classes and functions": tokenize(split, tokenizer, eos=True),
    }


def shares(sizes: np.ndarray, context_length: int, padded_rows: int) -> dict[str, float]:
    """What both ways make of documents of these lengths."""
    starts = np.cumsum(sizes) - sizes
    is_cut = starts // context_length != (starts + sizes - 1) // context_length
    fits = sizes <= context_length
    used = int((sizes - (sizes % context_length == 1)).sum())
    return {
        "context_length": context_length,
        "documents": len(sizes),
        "tokens": int(sizes.sum()),
        "packed_cuts_of_those_that_fit": float(is_cut[fits].mean()) if fits.any() else None,
        "packed_left_out": float(sizes.sum() % context_length / sizes.sum()),
        "best_fit_rows": padded_rows,
        "best_fit_padding": 1 - used / (padded_rows * context_length),
    }


def num_rows(sizes: np.ndarray, context_length: int) -> int:
    return len(best_fit_bins(sizes % context_length, context_length)) + int((sizes // context_length).sum())


def num_streamed_rows(sizes: np.ndarray, context_length: int) -> int:
    """As `data.StreamedRows` fills them, among so many tokens at a time."""
    ends = np.cumsum(sizes) // max(BUFFER_TOKENS, BUFFER_ROWS * context_length)
    return sum(num_rows(sizes[ends == buffer], context_length) for buffer in range(int(ends[-1]) + 1))


def random_lengths(number: int, median: float, spread: float, most: int) -> np.ndarray:
    lengths_drawn = np.random.default_rng(0).lognormal(np.log(median), spread, number).astype(int) + 2
    return np.minimum(lengths_drawn, most)


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    output = parser.parse_args().output
    rows = []
    for name, tokens in demo_tokens().items():
        sizes = np.array(lengths(tokens))
        rows += [{"data": name} | shares(sizes, n, len(best_fit(tokens, n))) for n in CONTEXT_LENGTHS[:2]]
    for n in CONTEXT_LENGTHS:
        for name, sizes in {
            "log-normal, median 1800": random_lengths(NUM_RANDOM, 1800, 1.3, 10 * n),
            "all of 60% of a row": np.full(2000, int(0.6 * n)),
        }.items():
            found = shares(sizes, n, num_rows(sizes, n))
            streamed = 1 - sizes.sum() / (num_streamed_rows(sizes, n) * n)
            rows.append({"data": name} | found | {"streamed_best_fit_padding": float(streamed)})
    sizes = random_lengths(NUM_TIMED, 245, 1.0, 20_000)
    ids = np.split(np.zeros(sizes.sum(), dtype=np.int64), np.cumsum(sizes)[:-1])
    timed = Dataset.from_dict({"input_ids": ids})
    times = {
        "documents": NUM_TIMED,
        "tokens": int(sizes.sum()),
        "distributing_seconds": seconds(best_fit_bins, random_lengths(NUM_TIMED, 1800, 1.3, 10**6) % 8192, 8192),
        "best_fit_seconds": seconds(best_fit, timed, 8192),
        "packed_seconds": seconds(packed, timed, 8192),
    }
    write_json(output, {"rows": rows, "times": times, "environment": describe_environment(torch.device("cpu"))})
    for row in rows:
        print(row)
    print(times)


if __name__ == "__main__":
    main()
