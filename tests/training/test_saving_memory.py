"""What a training does to take less memory changes neither its loss nor its gradients."""

import logging

import pytest
import torch
from transformers import default_data_collator

from hf_sparse_attn.data import load_documents, packed, tokenize
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.training import FinetuneArguments, FinetuneTrainer, make_trainer
from hf_sparse_attn.training.lora import add_lora

CONTEXT_LENGTH = 48


@pytest.fixture
def rows(tiny_tokenizer, text_directory):
    return packed(tokenize(load_documents(str(text_directory)), tiny_tokenizer), CONTEXT_LENGTH)


def arguments_for(output, **changes):
    defaults = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, "use_cpu": True}
    return FinetuneArguments(output_dir=str(output), save_strategy="no", **defaults | changes)


def loss_and_gradients(tmp_path, model_path, rows, monkeypatch, offload, lora, **changes):
    """Of one step, and how many tensors were packed by `save_on_cpu`."""
    saved = []

    class Spy(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory):
            assert not pin_memory
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: saved.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Spy)
    arguments = arguments_for(tmp_path, gradient_checkpointing=True, **changes)
    arguments.offload_activations = offload  # refused on a CPU, where it changes nothing
    torch.manual_seed(0)
    model = load_sparse_model(str(model_path))
    if lora:
        arguments.lora_rank, arguments.lora_alpha = 4, 8
        model = add_lora(model, arguments)
    trainer = FinetuneTrainer(model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    captured = {}

    def keep(optimizer, *_):
        captured.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(keep)
    arguments.max_steps = 1
    trainer.train()
    return trainer.state.log_history[0]["loss"], captured, saved


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_offloaded_activations(tmp_path, tiny_model_path, rows, monkeypatch, lora, reentrant):
    changes = {"gradient_checkpointing_kwargs": {"use_reentrant": True}} if reentrant else {}
    loss, gradients, saved = loss_and_gradients(tmp_path, tiny_model_path, rows, monkeypatch, True, lora, **changes)
    assert saved.count((1, CONTEXT_LENGTH, 32)) >= 2, "what each of two layers is given"
    expected_loss, expected, unsaved = loss_and_gradients(
        tmp_path, tiny_model_path, rows, monkeypatch, False, lora, **changes
    )
    assert not unsaved
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)


def test_what_layers_compute_inside_is_not_offloaded(tmp_path, tiny_model_path, rows, monkeypatch):
    """Layers are computed again, one after another: what one keeps then is never copied."""
    *_, saved = loss_and_gradients(tmp_path, tiny_model_path, rows, monkeypatch, True, False)
    assert not any(shape[-1:] == (64,) for shape in saved), "of the MLP, 64 wide"


def test_offloading_needs_checkpointing_and_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="offload_activations needs gradient_checkpointing"):
        arguments_for(tmp_path, offload_activations=True)
    with pytest.raises(ValueError, match="offload_activations is of use on a GPU alone"):
        arguments_for(tmp_path, offload_activations=True, gradient_checkpointing=True)


def test_checkpointing_is_not_reentrant_unless_it_is_asked_for(tmp_path, recwarn):
    assert arguments_for(tmp_path, gradient_checkpointing=True).gradient_checkpointing_kwargs == {
        "use_reentrant": False
    }
    given = {"use_reentrant": True}
    arguments = arguments_for(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
    assert arguments.gradient_checkpointing_kwargs == given
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
@pytest.mark.parametrize("way", ["dtype", "autocast"])
def test_bfloat16(tmp_path, tiny_model_path, tiny_tokenizer, rows, way, changes, caplog):
    """Both ways train; the loss is near that of float32; weights of bfloat16 come with a warning."""
    expected = make_trainer(
        load_sparse_model(str(tiny_model_path)), tiny_tokenizer, rows, arguments_for(tmp_path / "32", **changes)
    )
    expected.train()
    assert not caplog.records
    dtype = torch.bfloat16 if way == "dtype" else torch.float32
    arguments = arguments_for(tmp_path / "16", bf16=way == "autocast", **changes)
    with caplog.at_level(logging.WARNING, "hf_sparse_attn"):
        trainer = make_trainer(load_sparse_model(str(tiny_model_path), dtype=dtype), tiny_tokenizer, rows, arguments)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    losses, expected_losses = (
        [entry["loss"] for entry in done.state.log_history if "loss" in entry] for done in (trainer, expected)
    )
    assert losses == pytest.approx(expected_losses, rel=0.02)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (way == "dtype")
    if told:
        assert told[0] == (
            "updates of less than 0.004 of a weight are lost in weights of torch.bfloat16: train float32 weights with "
            "bf16 (--dtype float32 --bf16), or LoRA (--lora-rank)"
        )


def test_exact_updates_of_bfloat16_need_no_warning(tmp_path, tiny_model_path, tiny_tokenizer, rows, caplog):
    arguments = arguments_for(tmp_path)
    arguments.optim_args = "bf16_stochastic_round=True"
    make_trainer(load_sparse_model(str(tiny_model_path), dtype=torch.bfloat16), tiny_tokenizer, rows, arguments)
    assert not caplog.records
