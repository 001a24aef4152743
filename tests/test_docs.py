"""The Python blocks of the documentation, run in the order in which they stand."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import hf_sparse_attn
from hf_sparse_attn import loading
from hf_sparse_attn.training import FinetuneArguments

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [
    path
    for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
    if BLOCK.search(path.read_text()) and path.name != "hub_kernel.md"  # tests/test_hub_kernel.py runs it
]


def run_blocks(path, names, before=()):
    """`before[i]` is called before block i."""
    text = path.read_text()
    for number, block in enumerate(BLOCK.finditer(text)):
        if number < len(before) and before[number] is not None:
            before[number]()
        line = text[: block.start(1)].count("\n")  # so that errors name the page's own line
        exec(compile("\n" * line + block[1], path.name, "exec"), names)


@pytest.fixture
def names(tiny_model_path, tmp_path, monkeypatch):
    """What pages take for granted: a model and what goes with it, tiny; "demo" and files of the names that they use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "demo_model_directory", lambda: tiny_model_path)
    shutil.copytree(tiny_model_path, "my-model")
    for name in ("pg19/book.txt", "notes.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        text = "word " * 40_000
        Path(name).write_text(text if name.endswith("txt") else f'{{"text": "{text}"}}\n')
    model = hf_sparse_attn.load_model("demo")
    group = SimpleNamespace(get_rank=lambda group: 0, get_world_size=lambda group: 1)
    handler = SimpleNamespace(sp_handler=SimpleNamespace(sp_attn_implementation="sdpa"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    return {
        "hf_sparse_attn": hf_sparse_attn,
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "inputs": {"input_ids": torch.randint(5, 60, (1, 150), generator=torch.Generator().manual_seed(0))},
        "finetune": lambda model, tokenizer, rows, training: rows[0],  # examples/finetune.py is run by its own test
        "FinetuneArguments": FinetuneArguments,
        "trainer": SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=handler)),
        "group": None,
        "distributed": group,
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages(path, names, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", names["distributed"].get_rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", names["distributed"].get_world_size)
    run_blocks(path, names)


@pytest.mark.nightly
def test_readme(tmp_path, monkeypatch):
    """With the demo model itself."""
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "README.md", {}, [None, None, None, lambda: shutil.copytree("results/model", "tuned")])
