"""LoRA: what is trained, what is saved, and how a training goes on."""

import json
import shutil
import sys

import pytest
import torch
from helpers.families import tiny_model
from transformers import AutoModelForCausalLM

from hf_sparse_attn.data import load_documents, packed, tokenize
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.evaluation.perplexity import token_nll
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.logits import loss_in_chunks
from hf_sparse_attn.training import (
    FinetuneArguments,
    check_packages,
    check_resumable,
    damage,
    finetune,
    make_trainer,
)
from hf_sparse_attn.training.lora import add_lora, autocast_dtype, merge_lora

peft = pytest.importorskip("peft")
CONTEXT_LENGTH = 48


@pytest.fixture
def rows(tiny_tokenizer, text_directory):
    return packed(tokenize(load_documents(str(text_directory)), tiny_tokenizer), CONTEXT_LENGTH)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model_path(request, tmp_path, tiny_model_path, tiny_tokenizer):
    model = load_sparse_model(str(tiny_model_path))
    model.config.tie_word_embeddings = request.param
    tied = type(model)(model.config)
    tied.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lora_arguments(output, **changes):
    defaults = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, "use_cpu": True}
    return FinetuneArguments(output_dir=str(output), **defaults | {"lora_rank": 4} | changes)


def tune(model_path, tokenizer, rows, arguments, eval_rows=None, **kwargs):
    return finetune(load_sparse_model(str(model_path), **kwargs), tokenizer, rows, arguments, eval_rows)


def sparse_from(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse", **kwargs)


@pytest.mark.parametrize("embeddings_and_norms", [True, False])
def test_merged_model_loads_like_any_other(tmp_path, model_path, tiny_tokenizer, rows, embeddings_and_norms):
    arguments = lora_arguments(tmp_path / "out", lora_train_embeddings_and_norms=embeddings_and_norms)
    results = tune(model_path, tiny_tokenizer, rows, arguments, rows)
    assert results["eval_loss_after"] < results["eval_loss_before"]
    merged, before = sparse_from(tmp_path / "out"), sparse_from(model_path)
    assert merged.config.use_cache
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == before.config.tie_word_embeddings
    changed = {name for name, weight in merged.state_dict().items() if not weight.equal(before.state_dict()[name])}
    head = {"lm_head.weight"}
    linear = {name for name in merged.state_dict() if "proj" in name}
    in_full = set(merged.state_dict()) - linear - (set() if before.config.tie_word_embeddings else head)
    assert changed == (linear | in_full if embeddings_and_norms else linear)

    row = rows[0]["input_ids"]
    adapted = peft.PeftModel.from_pretrained(before, tmp_path / "out" / "adapter")
    expected = token_nll(merged.eval(), torch.tensor([row]))
    torch.testing.assert_close(token_nll(adapted.eval(), torch.tensor([row])), expected, rtol=0, atol=1e-4)


def test_checkpoints_hold_the_adapter_alone_and_training_goes_on(tmp_path, model_path, tiny_tokenizer, rows):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    tune(model_path, tiny_tokenizer, rows, lora_arguments(whole, save_steps=3))
    checkpoint = resumed / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-3", checkpoint)
    assert not (checkpoint / "model.safetensors").exists()
    arguments = lora_arguments(resumed, save_steps=3, resume_from_checkpoint=str(checkpoint))
    assert damage(checkpoint) is None
    check_resumable(checkpoint, load_sparse_model(str(model_path)), arguments)
    assert tune(model_path, tiny_tokenizer, rows, arguments)["steps"] == 6
    expected = sparse_from(whole).state_dict()
    for name, weight in sparse_from(resumed).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.fixture
def checkpoint(tmp_path, tiny_model_path, tiny_tokenizer, rows):
    tune(tiny_model_path, tiny_tokenizer, rows, lora_arguments(tmp_path / "out", max_steps=1))
    return tmp_path / "out" / "checkpoint-1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": None}, "is of a training with lora_rank 4, not None"),
        ({"lora_rank": 8}, "is of a training with lora_rank 4, not 8"),
        ({"lora_alpha": 9}, "is of a training with lora_alpha 8, not 9"),
        ({"lora_train_embeddings_and_norms": False}, "with lora_train_embeddings_and_norms True, not False"),
    ],
)
def test_adapter_of_another_training(checkpoint, tiny_model_path, tmp_path, changes, words):
    model = load_sparse_model(str(tiny_model_path))
    with pytest.raises(ValueError, match=words):
        check_resumable(checkpoint, model, lora_arguments(tmp_path, **changes))


def test_adapter_of_another_model_and_no_adapter(checkpoint, tmp_path):
    wider = tiny_model(dtype=torch.float32)
    wider.model.layers[1].mlp.down_proj = torch.nn.Linear(7, 32)
    with pytest.raises(ValueError, match=r"checkpoint-1' is of another model: its model\.layers\."):
        check_resumable(checkpoint, wider, lora_arguments(tmp_path))
    (checkpoint / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="holds a whole model, not LoRA of rank 4"):
        check_resumable(checkpoint, wider, lora_arguments(tmp_path))


def test_damaged_adapter(checkpoint):
    config = (checkpoint / "adapter_config.json").read_text()
    (checkpoint / "adapter_config.json").write_text(config[:20])
    assert damage(checkpoint) == "its JSON files are damaged"
    (checkpoint / "adapter_config.json").write_text(config)
    weights = (checkpoint / "adapter_model.safetensors").read_bytes()
    (checkpoint / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert damage(checkpoint) == "its adapter_model.safetensors is damaged"
    (checkpoint / "adapter_model.safetensors").unlink()
    assert damage(checkpoint) == "it has no adapter_model.safetensors"


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "mixtral"])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_and_its_gradients_are_the_models_own(tmp_path, family, tied):
    model = tiny_model(family)
    model.config.tie_word_embeddings = tied
    torch.manual_seed(0)
    adapted = add_lora(type(model)(model.config).double(), lora_arguments(tmp_path)).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.randint(64, (1, 40))
    gradients = []
    for chunked in (False, True):
        adapted.zero_grad()
        with loss_in_chunks(adapted) if chunked else torch.enable_grad():
            adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-9)
    assert any("embed_tokens" in name for name in gradients[0])
    assert all(any(part in name for name in gradients[0]) for part in ("input_layernorm", "model.norm"))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_half_precision_trains_in_float32(tmp_path, model_path, tiny_tokenizer, rows, checkpointing):
    """Norms are about 1, where updates of 1e-3 are lost in bfloat16; the merged model is bfloat16 again."""
    arguments = lora_arguments(tmp_path / "out", learning_rate=1e-3, gradient_checkpointing=checkpointing)
    model = load_sparse_model(str(model_path), dtype=torch.bfloat16)
    trainer = make_trainer(model, tiny_tokenizer, rows, arguments)
    assert autocast_dtype(trainer.model) == torch.bfloat16
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}
    hidden = []
    trainer.model.base_model.model.model.layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    trainer.train()
    assert hidden[0].dtype == torch.bfloat16, "hidden states take half the memory"
    state = trainer.model.state_dict()
    norms = [weight for name, weight in state.items() if name.endswith("norm.modules_to_save.default.weight")]
    assert norms
    assert all((weight != 1).any() for weight in norms)
    merged = merge_lora(trainer.model)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_peft_is_named_where_it_is_absent_or_old(tmp_path, monkeypatch):
    arguments = lora_arguments(tmp_path)
    monkeypatch.delattr(peft.LoraConfig, "ensure_weight_tying")
    with pytest.raises(ArgumentError, match=r"lora_rank: LoRA needs peft 0\.18 or newer, not "):
        check_packages(arguments)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ArgumentError, match="lora_rank: LoRA needs peft: run `pip install peft`"):
        check_packages(arguments)


def test_alpha_is_twice_the_rank(tmp_path):
    assert lora_arguments(tmp_path).lora_alpha == 8
    with pytest.raises(ValueError, match="lora_alpha is of use with lora_rank alone, got 8"):
        lora_arguments(tmp_path, lora_rank=None, lora_alpha=8)


def test_adapter_says_what_was_trained(checkpoint):
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert set(config["modules_to_save"]) == {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"}


def test_with_autocast_and_the_best_checkpoint(tmp_path, model_path, tiny_tokenizer, rows):
    """Evaluation goes on with the merged model, which no longer computes in bfloat16."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    results = tune(model_path, tiny_tokenizer, rows, lora_arguments(tmp_path / "out", bf16=True, **best), rows)
    assert results["eval_loss_after"] < results["eval_loss_before"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert results["eval_loss_after"] == pytest.approx(state["best_metric"], rel=0.02)
    assert sparse_from(tmp_path / "out", dtype="auto").dtype == torch.float32
