"""What the checks of check_integrations.py share: a tiny model, and how to tell that its attention is sparse."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is loaded: everything is made here

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_sparse_attn
from hf_sparse_attn.calibration.remote_code import name_remote_code, write_remote_code

FIELDS = {"window_size": 8, "num_global_tokens": 2, "key_budget": 12, "num_hash_bits": 3, "dense_below": 0}
LENGTHS = (90, 61, 74, 83)  # tokens of the documents that are trained on
STEPS = 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and two more for padding and the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_tiny_model(directory: Path) -> None:
    """A random Llama as `convert --remote-code` leaves it, with a random hash, and its tokenizer."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        sparse_attention=FIELDS,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    name_remote_code(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_remote_code(directory)


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))


def texts() -> list[str]:
    """Random letters of LENGTHS."""
    return [bytes((tokens(length, seed=length) % 26 + 97).tolist()).decode() for length in LENGTHS]


def load(directory: Path, attn_implementation: str = "sparse", **kwargs: Any) -> Any:
    kwargs = {"dtype": torch.float64} | kwargs
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attn_implementation, **kwargs).eval()


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(**({"input_ids": tokens(120)[None]} | kwargs)).logits


def assert_close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def assert_other(found: Any, dense: Any) -> None:
    """What sparse attention gives is not what dense attention does."""
    difference = (torch.as_tensor(found) - torch.as_tensor(dense)).abs().max().item()
    assert difference > 1e-4, f"the result is that of dense attention (to {difference:.1e})"


@contextmanager
def sparse_forwards(model: torch.nn.Module, told: list[str], attn_implementation: str = "sparse") -> Iterator[None]:
    """Make sure that the model's forwards in this block read fewer pairs than there are, if they are to be sparse."""
    if attn_implementation != "sparse":
        yield
        return
    with hf_sparse_attn.record_density(model) as density:
        yield
    assert 0 < density.attended < density.admissible, "no sparse attention ran"
    told.append(f"density {density.density:.2f}")


def run(*command: object, options: Mapping[str, object] = MappingProxyType({})) -> str:
    """The output of a Python command in a process of its own, with this package as it is here."""
    path = os.pathsep.join([str(Path(hf_sparse_attn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, *map(str, command), *(str(part) for option in options.items() for part in option)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert finished.returncode == 0, f"exit status {finished.returncode}: {finished.stderr[-2000:]}"
    return finished.stdout


def training_arguments(directory: Path, **changes: Any) -> dict[str, Any]:
    """Plain gradient descent of two steps in float32, so that runs can be compared."""
    return {
        "output_dir": str(directory / "output"),
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    } | changes
