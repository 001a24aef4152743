"""Tiny models and tokenizers made on the fly, and a way to run the scripts in this process."""

import copy
import os
import runpy
import signal
import sys
from dataclasses import dataclass

# Before the first import of huggingface_hub, which reads it once: nothing here may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before PyTorch is loaded: threads that spin while they wait take minutes beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Before the first import of Triton, which reads it once: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Assertions of the helpers say what they compared, as those of the test files do.
pytest.register_assert_rewrite("helpers", "matrix")
from helpers.paths import SCRIPTS  # noqa: E402
from helpers.poison import poison  # noqa: E402

# MKL 2024 settles at the first call of each of these how precise it is. Where two threads make that call together, one
# may take a kernel of half the digits for it (https://github.com/pytorch/pytorch/issues/188792).
for dtype in (torch.float32, torch.float64):
    for function in ("exp", "expm1", "log", "log1p", "log2", "sin", "cos", "sqrt", "tanh", "erf"):
        getattr(torch, function)(torch.ones(1, dtype=dtype))

# Property tests: the same few cases every time, or many with --hypothesis-profile=long.
_COMMON = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile("short", _COMMON, max_examples=80, derandomize=True)
settings.register_profile("long", _COMMON, max_examples=2000)
settings.load_profile("short")


def pytest_addoption(parser):
    parser.addoption(
        "--write-support-table",
        action="store_true",
        help="write docs/support.md from the cells of tests/test_matrix.py",
    )

    parser.addoption("--nightly", action="store_true", help="also run the tests that take long and rarely break")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--nightly") or "nightly" in config.getoption("markexpr"):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    config.hook.pytest_deselected(items=nightly)
    items[:] = [item for item in items if item not in nightly]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What reads memory that nothing was written to gets NaN, or indices of no key."""
    poison(monkeypatch)


@pytest.fixture
def fresh_graphs():
    """Nothing that was compiled before, or stays."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def tiny_llama_config():
    return LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory, tiny_tokenizer, tiny_llama_config):
    """A directory with a tiny random Llama whose rows read a window of 8 keys and two globals, never converted."""
    path = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(tiny_llama_config))
    model.config.sparse_attention = {"window_size": 8, "num_global_tokens": 2, "key_budget": 0, "dense_below": 0}
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def text_directory(tmp_path):
    """Three documents of 300 bytes and more, one too short to be of use."""
    directory = tmp_path / "documents"
    directory.mkdir()
    for index in range(3):
        text = " ".join(f"document {index} says {number}" for number in range(20 + index))
        (directory / f"{index}.txt").write_text(text)
    (directory / "short.txt").write_text("short")
    return directory


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where whoever started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@dataclass
class Finished:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run `scripts/NAME` with arguments in this process (a fresh one spends most of its time importing)."""

    def run(name: str, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return run


@pytest.fixture
def assert_refused():
    """Assert that a script ended in one clear line that names the argument, with exit status 2."""

    def check(finished: Finished, *words: str) -> None:
        assert finished.status == 2
        told = [line for line in finished.stdout.splitlines() if not line.startswith("estimated peak memory: ")]
        assert not told
        lines = finished.stderr.strip().splitlines()
        assert len(lines) == 1, finished.stderr
        for word in words:
            assert word in lines[0]

    return check
