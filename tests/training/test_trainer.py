import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn.data import load_documents, packed, tokenize, windowed
from hf_sparse_attn.errors import RunError
from hf_sparse_attn.evaluation.perplexity import token_nll
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.training import (
    FinetuneArguments,
    FinetuneTrainer,
    check_resumable,
    checkpoints,
    damage,
    finetune,
)

CONTEXT_LENGTH = 48


@pytest.fixture
def tokens(tiny_tokenizer, text_directory):
    return tokenize(load_documents(str(text_directory)), tiny_tokenizer)


def training_arguments(output, **changes):
    defaults = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, "use_cpu": True}
    return FinetuneArguments(output_dir=str(output), **defaults | changes)


def tune(model_path, tokenizer, rows, arguments, eval_rows=None):
    return finetune(load_sparse_model(str(model_path)), tokenizer, rows, arguments, eval_rows)


@pytest.mark.parametrize("make_rows", [packed, windowed])
def test_loss_falls_and_the_checkpoint_loads_like_any_other(
    tmp_path, tiny_model_path, tiny_tokenizer, tokens, make_rows
):
    rows = make_rows(tokens, CONTEXT_LENGTH)
    results = tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(tmp_path / "out", max_steps=12), rows)
    assert results["steps"] == 12
    assert results["last_loss"] < results["first_loss"]
    assert results["eval_loss_after"] < results["eval_loss_before"]

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sparse")
    assert reloaded.config.sparse_attention == load_sparse_model(str(tiny_model_path)).config.sparse_attention
    assert reloaded.config.use_cache, "Trainer's use_cache=False must not be saved with the model"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == tiny_tokenizer("ab").input_ids
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 12
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == results


def test_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path, tiny_model_path, tiny_tokenizer, tokens):
    rows = packed(tokens, CONTEXT_LENGTH)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(whole, save_steps=3))
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    arguments = training_arguments(resumed, save_steps=3, resume_from_checkpoint=str(resumed / "checkpoint-3"))
    assert tune(tiny_model_path, tiny_tokenizer, rows, arguments)["steps"] == 6
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(resumed).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "sparse"])
def test_packed_documents_do_not_see_each_other(tiny_model_path, tokens, implementation):
    """The loss of packed rows, as Trainer feeds them, is the mean over the documents' pieces, each alone."""
    rows = packed(tokens, CONTEXT_LENGTH)
    model = load_sparse_model(str(tiny_model_path)).eval()
    model.set_attn_implementation(implementation)
    row = next(row for row in rows if 0 in row["position_ids"][1:-2])
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0] + [CONTEXT_LENGTH]
    pieces = [row["input_ids"][start:end] for start, end in pairwise(starts)]
    expected = torch.cat([token_nll(model, torch.tensor([piece])) for piece in pieces if len(piece) > 1]).mean()
    with torch.no_grad():
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        loss = model(**batch, use_cache=False).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "changes",
    [{"logging_strategy": "no", "logging_first_step": False}, {"logging_steps": 50, "logging_first_step": False}],
    ids=lambda x: next(iter(x)),
)
def test_without_a_logged_loss(tmp_path, tiny_model_path, tiny_tokenizer, tokens, changes):
    arguments = training_arguments(tmp_path, max_steps=2, **changes)
    results = tune(tiny_model_path, tiny_tokenizer, packed(tokens, CONTEXT_LENGTH), arguments)
    assert {"steps": 2, "first_loss": None, "last_loss": None}.items() <= results.items()
    assert json.loads((tmp_path / "all_results.json").read_text()) == results
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_model_is_saved_before_the_last_evaluation(tmp_path, tiny_model_path, tiny_tokenizer, tokens, monkeypatch):
    rows = packed(tokens, CONTEXT_LENGTH)
    calls = []

    def evaluate(trainer):
        calls.append(trainer)
        if len(calls) == 2:
            raise MemoryError
        return {"eval_loss": float("nan")}

    monkeypatch.setattr(FinetuneTrainer, "evaluate", evaluate)
    with pytest.raises(MemoryError):
        tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(tmp_path, save_strategy="no"), rows)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["steps"] == 6
    assert results["eval_loss_before"] is None  # NaN


def strict_json(path):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, tiny_model_path, tiny_tokenizer, tokens, monkeypatch):
    """The newest checkpoint is of before."""
    step = FinetuneTrainer.__mro__[1].training_step
    monkeypatch.setattr(
        FinetuneTrainer.__mro__[1],
        "training_step",
        lambda trainer, *args: step(trainer, *args) * (float("nan") if trainer.state.global_step == 4 else 1),
    )
    rows = packed(tokens, CONTEXT_LENGTH)
    with pytest.raises(RunError, match=r"the loss of step 5 is nan; .*; the newest checkpoint is '.*checkpoint-4'"):
        tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(tmp_path, save_steps=2))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
    assert damage(tmp_path / "checkpoint-4") is None


def test_numbers_that_json_lacks_are_not_logged(tmp_path, tiny_model_path, tiny_tokenizer, tokens, monkeypatch):
    log = FinetuneTrainer.log
    monkeypatch.setattr(
        FinetuneTrainer, "log", lambda trainer, logs, *args: log(trainer, logs | {"grad_norm": float("nan")}, *args)
    )
    tune(tiny_model_path, tiny_tokenizer, packed(tokens, CONTEXT_LENGTH), training_arguments(tmp_path, save_steps=3))
    for path in (tmp_path / "trainer_state.json", tmp_path / "checkpoint-6" / "trainer_state.json"):
        assert [entry["grad_norm"] for entry in strict_json(path)["log_history"]] == [None] * 6 + [None] * (
            path.parent == tmp_path
        )


def test_weights_that_cannot_be_saved_go_elsewhere(tmp_path, tiny_model_path, tiny_tokenizer, tokens, monkeypatch):
    save = FinetuneTrainer.save_model

    def full(trainer, output_dir=None, **kwargs):
        if output_dir is None:
            raise OSError(28, os.strerror(28))
        save(trainer, output_dir, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "save_model", full)
    with pytest.raises(OSError, match="No space left") as failure:
        tune(tiny_model_path, tiny_tokenizer, packed(tokens, CONTEXT_LENGTH), training_arguments(tmp_path))
    (note,) = failure.value.__notes__
    assert note.startswith("the weights after step 6 are in ")
    saved = Path(note.split("'")[1])
    assert AutoModelForCausalLM.from_pretrained(saved).config.use_cache
    shutil.rmtree(saved)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_training_goes_on_from_its_checkpoint(
    tmp_path, tiny_model_path, tiny_tokenizer, tokens, monkeypatch
):
    rows = packed(tokens, CONTEXT_LENGTH)
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(whole))
    step = FinetuneTrainer.training_step

    def interrupting(trainer, *args):
        if trainer.state.global_step == 2 and not trainer.args.resume_from_checkpoint:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *args)

    monkeypatch.setattr(FinetuneTrainer, "training_step", interrupting)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(interrupted, save_strategy="no"))
    assert "checkpoint-3' holds what was trained" in interrupt.value.__notes__[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    arguments = training_arguments(interrupted, resume_from_checkpoint=str(interrupted / "checkpoint-3"))
    assert tune(tiny_model_path, tiny_tokenizer, rows, arguments)["steps"] == 6
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(interrupted).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.fixture
def checkpoint(tmp_path, tiny_model_path, tiny_tokenizer, tokens):
    rows = packed(tokens, CONTEXT_LENGTH)
    tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(tmp_path / "out", max_steps=1))
    return tmp_path / "out" / "checkpoint-1"


def test_whole_checkpoint_has_no_damage(checkpoint, tiny_model_path):
    assert damage(checkpoint) is None
    check_resumable(checkpoint, load_sparse_model(str(tiny_model_path)))


@pytest.mark.parametrize("half", [True, False], ids=["half", "empty"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_half_written_checkpoint(checkpoint, name, half):
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[: len(whole) // 2] if half else b"")
    assert damage(checkpoint) in (f"its {name} is damaged", "its JSON files are damaged")


def test_checkpoint_without_parts(checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    assert damage(checkpoint) == "it has no part-1.safetensors"
    (checkpoint / "trainer_state.json").unlink()
    assert damage(checkpoint) == "it has no trainer_state.json"


def test_checkpoint_without_weights_or_of_another_model(checkpoint, tiny_model_path):
    model = load_sparse_model(str(tiny_model_path))
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"checkpoint-1' is of another model: its num_hidden_layers is 2, not 3"):
        check_resumable(checkpoint, model)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-1' holds no weights"):
        check_resumable(checkpoint, model)


def test_optimizer_of_another_model(checkpoint, tiny_model_path, tiny_tokenizer, tokens):
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.pt")
    arguments = training_arguments(checkpoint.parent, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(RunError, match=r"cannot go on from '.*checkpoint-1': "):
        tune(tiny_model_path, tiny_tokenizer, packed(tokens, CONTEXT_LENGTH), arguments)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_bfloat16_needs_no_word_about_the_cpu(tmp_path):
    arguments = FinetuneArguments(output_dir=str(tmp_path), bf16=True)
    assert (arguments.use_cpu, arguments.device.type, arguments.bf16) == (True, "cpu", True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", -1e-5),
        ("num_train_epochs", 0),
        ("num_train_epochs", float("nan")),
        ("max_steps", 0),
        ("max_steps", -2),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -1),
        ("gradient_accumulation_steps", 0),
        ("adam_beta2", 1.0),
        ("weight_decay", float("nan")),
        ("max_grad_norm", -1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_numbers_with_which_nothing_can_be_trained(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        FinetuneArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
