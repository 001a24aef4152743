"""The loss of a distilled model is its formula, written out over all logits in float64; so are the gradients."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.batches import tokens
from helpers.families import tiny_model
from transformers import default_data_collator

from hf_sparse_attn import SparseAttentionConfig, configure, logits
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.logits import loss_in_chunks
from hf_sparse_attn.training import Distillation, FinetuneArguments, FinetuneTrainer, train
from hf_sparse_attn.training.distillation import Teacher, check_distillation, sampled_rows

NUM_TOKENS, DENSE_BELOW = 40, 12
ALL_ROWS = 1000
PACKED = torch.arange(NUM_TOKENS)[None] % 25  # a document of 25 tokens, another one of 15


@pytest.fixture(autouse=True)
def float64_losses(monkeypatch):
    """Losses and logits round to float32 otherwise, which would hide small errors; seven rows are a chunk."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(logits, "CHUNK_BYTES", 7 * 4 * 64)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.5)
    adapted = peft.get_peft_model(model, config).double()
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_pre_hook(lambda module, _: pytest.fail("dropout") if module.training else None)
    return adapted


def batch(position_ids=None):
    ids = tokens(NUM_TOKENS)
    labels = ids.clone()
    labels[0, :15] = labels[0, 30:33] = -100
    inputs = {"input_ids": ids, "labels": labels}
    return inputs if position_ids is None else inputs | {"position_ids": position_ids}


def rows_to_compare(inputs):
    """By the definition: they have a target and do not read everything."""
    position_ids = inputs.get("position_ids", torch.arange(NUM_TOKENS)[None])[0]
    labels = inputs["labels"][0].tolist()
    return [i for i in range(NUM_TOKENS - 1) if labels[i + 1] != -100 and position_ids[i] >= DENSE_BELOW]


def outputs_of_attention(model, **inputs):
    """Logits [N, V], and what each attention layer gives [N, D]."""
    found = []
    layers = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    hooks = [layer.register_forward_hook(lambda _, __, output: found.append(output[0][0])) for layer in layers]
    whole = model(use_cache=False, **inputs).logits[0]
    for hook in hooks:
        hook.remove()
    return whole, found


def formula(model, inputs, settings):
    """The loss written out."""
    inputs, rows = dict(inputs), rows_to_compare(inputs)
    labels = inputs.pop("labels")[0]
    dense = copy.deepcopy(model).eval()
    configure(dense, dense_below=10**6)
    with torch.no_grad():
        expected, expected_layers = outputs_of_attention(dense, **inputs)
    found, layers = outputs_of_attention(model, **inputs)
    loss = (1 - settings.weight) * F.cross_entropy(found[:-1], labels[1:])
    expected, found = expected[rows].log_softmax(-1), found[rows].log_softmax(-1)
    loss = loss + settings.weight * (expected.exp() * (expected - found)).sum(-1).mean()
    if settings.layer_weight:
        errors = [
            (ours[rows] - theirs[rows]).square().sum() / theirs[rows].square().sum()
            for ours, theirs in zip(layers, expected_layers, strict=True)
            if not torch.equal(ours, theirs)  # a local layer
        ]
        loss = loss + settings.layer_weight * torch.stack(errors).mean()
    return loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


MODELS = {
    "llama": lambda: tiny_model(dense_below=DENSE_BELOW),
    "gemma2, local layers, caps": lambda: tiny_model("gemma2", dense_below=DENSE_BELOW),
    "qwen2": lambda: tiny_model("qwen2", dense_below=DENSE_BELOW),
    "lora": lambda: lora(tiny_model(dense_below=DENSE_BELOW)),
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("position_ids", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_formula(name, position_ids, checkpointed):
    model, inputs = MODELS[name](), batch(position_ids)
    settings = Distillation(weight=0.3, rows=ALL_ROWS, layer_weight=0.7)
    expected = formula(model.eval(), inputs, settings)
    expected_gradients = gradients(model, expected)
    teacher = Teacher(model, settings)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if name != "lora" or checkpointed:  # checkpointing is for training alone
        model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
            module._forward_pre_hooks.clear()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with teacher.lesson(model, inputs) as taught, loss_in_chunks(model, taught):
        loss = model(**inputs, use_cache=False).loss
        found = gradients(model, loss)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found, expected_gradients, rtol=1e-8, atol=1e-10)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks, "the model is left as it was"


def test_the_teacher_has_no_dropout():
    model = lora(tiny_model(dense_below=DENSE_BELOW)).train()
    with Teacher(model.eval(), Distillation()).lesson(model.train(), batch()) as taught:
        assert taught.hidden.requires_grad is False
    assert model.training


def test_sampled_rows():
    labels = torch.tensor([[5, 5, -100, 5, 5, 5], [5, 5, 5, 5, 5, 5]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]])
    every = [2, 3, 8, 9, 10]  # not 1, whose target is left out; not 5 and 11, which have none
    every = [row for row in every if positions.flatten()[row] >= 2]
    assert sampled_rows(labels, positions, 2, 100).tolist() == every
    some = [tuple(sampled_rows(labels, positions, 2, 2).tolist()) for _ in range(50)]
    assert all(set(rows) < set(every) and list(rows) == sorted(rows) for rows in some)
    assert len(set(some)) > 3
    assert sampled_rows(labels, None, 5, 100).tolist() == []
    assert sampled_rows(labels, None, 4, 100).tolist() == [4, 10]


def test_nothing_is_asked_where_every_row_reads_everything():
    model = tiny_model(dense_below=NUM_TOKENS)
    teacher = Teacher(model, Distillation())
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with teacher.lesson(model, batch()) as taught:
        assert taught is None
    assert not calls


def trainer_of(output, distillation, model=None, **arguments):
    inputs = [batch()[name][0].tolist() for name in ("input_ids", "labels")]
    other = tokens(NUM_TOKENS, seed=1)[0].tolist()
    rows = [dict(zip(("input_ids", "labels"), inputs, strict=True)), {"input_ids": other, "labels": other}]
    defaults = {"learning_rate": 0.05, "optim": "sgd", "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    arguments = FinetuneArguments(output_dir=str(output), disable_tqdm=True, **defaults | arguments)
    return FinetuneTrainer(
        model or tiny_model(dense_below=DENSE_BELOW),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        distillation=distillation,
    )


def test_accumulated_batches_weigh_as_one(tmp_path):
    """One row has fewer targets than the other: each counts by its own."""
    losses = []
    for size, steps in ((1, 2), (2, 1)):
        settings = Distillation(weight=1.0, rows=ALL_ROWS, layer_weight=0.0)
        trainer = trainer_of(
            tmp_path, settings, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        if size == 1:
            parts = []
            step = trainer.compute_loss
            trainer.compute_loss = lambda *a, step=step, parts=parts, **kw: parts.append(step(*a, **kw)) or parts[-1]
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    model, first = tiny_model(dense_below=DENSE_BELOW), batch()
    second = {"input_ids": tokens(NUM_TOKENS, seed=1), "labels": tokens(NUM_TOKENS, seed=1)}
    counts = [int((inputs["labels"][:, 1:] != -100).sum()) for inputs in (first, second)]
    means = [formula(model, inputs, settings).item() for inputs in (first, second)]
    expected = sum(count * mean for count, mean in zip(counts, means, strict=True)) / sum(counts)
    assert losses[0] == pytest.approx(expected, rel=1e-6)


def test_training_closes_the_gap_to_dense(tmp_path):
    """In a few steps the sparse model becomes more like the dense one, and both losses are told."""
    settings = Distillation(weight=1.0, rows=ALL_ROWS)
    trainer = trainer_of(tmp_path, settings, max_steps=20)
    results = train(trainer)
    assert results["last_loss"] < 0.7 * results["first_loss"]
    assert {"eval_loss_before", "eval_loss_after", "dense_eval_loss_before", "dense_eval_loss_after"} <= set(results)
    assert results["eval_loss_before"] != results["dense_eval_loss_before"]
    assert json.loads((tmp_path / "all_results.json").read_text()) == results
    assert trainer.model.config.sparse_attention["dense_below"] == DENSE_BELOW


def test_every_second_step(tmp_path):
    trainer = trainer_of(tmp_path, Distillation(weight=1.0, rows=ALL_ROWS, every=2), max_steps=4)
    asked = []
    lesson = trainer._teacher.lesson
    trainer._teacher.lesson = lambda *args: asked.append(trainer.state.global_step) or lesson(*args)
    trainer.train()
    assert asked == [0, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -0.1), ("weight", 1.1), ("weight", float("nan")), ("rows", 0), ("every", 0), ("layer_weight", -1.0)],
)
def test_impossible_numbers_are_refused(name, value):
    with pytest.raises(ArgumentError, match=f"distill_{name}.*{value}"):
        Distillation(**{name: value})


def test_layers_need_gradients(tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(tmp_path, Distillation(layer_weight=1.0), max_steps=1, **checkpointing)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trainer.train()


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ArgumentError, match="distill_weight: is 0, and so is distill_layer_weight"):
        Distillation(weight=0.0)


def test_models_that_cannot_be_distilled_are_refused(tmp_path):
    opt = hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            ffn_dim=48,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    )
    with pytest.raises(ValueError, match="OPTForCausalLM computes its loss in its own way"):
        Teacher(opt, Distillation())
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="soft prompt"):
        Teacher(peft.get_peft_model(tiny_model(), prompt).double(), Distillation())
    with pytest.raises(ArgumentError, match=r"distill: needs .* which label_smoothing_factor replaces"):
        trainer_of(tmp_path, Distillation(), label_smoothing_factor=0.1)
    arguments = FinetuneArguments(output_dir=str(tmp_path), use_cpu=True)
    check_distillation(arguments, SparseAttentionConfig(dense_below=9), 10)
    with pytest.raises(ArgumentError, match=r"distill: nothing is sparse in rows of 10 tokens.*dense_below=10"):
        check_distillation(arguments, SparseAttentionConfig(dense_below=10), 10)
