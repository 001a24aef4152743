"""Logits in chunks are the model's own, and nowhere are there more of them at once than a chunk."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.batches import tokens
from helpers.families import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import default_data_collator

from hf_sparse_attn import logits
from hf_sparse_attn.calibration.calibrate import _gradient_moments
from hf_sparse_attn.evaluation.cache_policies import cached_nll
from hf_sparse_attn.evaluation.perplexity import token_nll
from hf_sparse_attn.logits import hidden_states_and_head, loss_in_chunks
from hf_sparse_attn.training import FinetuneArguments, FinetuneTrainer

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROWS = 7  # of a chunk, in most tests


def lora(model, **options):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
    return adapted.double().eval()


def soft_prompt():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(tiny_model(), config).double().eval()


def composite():
    config = hf.Gemma3Config(
        text_config={**SMALL, "head_dim": 8, "layer_types": ["full_attention"] * 2, "final_logit_softcapping": 2.0},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def on_devices():
    """With the hooks of accelerate that a device_map puts there, weights fetched when a module runs."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(tiny_model(), torch.device("cpu"))


def no_separate_base():
    """OPT's forward goes around its base model."""
    return hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=64)
    )


MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "tied embeddings": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gemma2 caps": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "cohere scales": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.3)),
    "granite scales": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=3.0)),
    "phi's head has a bias": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL)),
    "mixtral's router": lambda: tiny_model("mixtral"),
    "vision and language": composite,
    "lora": lambda: lora(tiny_model(), target_modules=["q_proj", "lm_head"]),
    "lora, head trained": lambda: lora(tiny_model(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompt tuning": soft_prompt,
    "device_map": on_devices,
    "opt, all at once": no_separate_base,
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and not parameter.is_meta:  # biases start at zero
                parameter.add_(0.3 * torch.randn_like(parameter))
    if name == "mixtral's router":
        model.config.output_router_logits = True
    return model


@pytest.fixture(autouse=True)
def float64_losses(monkeypatch):
    """The losses round to float32, which would hide small errors."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(logits, "CHUNK_BYTES", ROWS * 4 * SMALL["vocab_size"])


@models
def test_a_chunk_gives_the_models_own_logits(name):
    model, ids = model_of(name), tokens(40, 2)
    expected = model(input_ids=ids, use_cache=False).logits
    hidden, head = hidden_states_and_head(model, input_ids=ids, use_cache=False)
    assert hidden.shape[:2] == expected.shape[:2]
    for row, start, end in [(0, 0, 1), (0, 3, 10), (1, 30, 40)]:
        torch.testing.assert_close(head(hidden[row, start:end]), expected[row, start:end], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)  # it is left as it was


@models
def test_token_losses(name, small_chunks):
    model, ids = model_of(name), tokens(40)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0, -40:-1]
    expected = F.cross_entropy(whole, ids[0, 1:], reduction="none")
    torch.testing.assert_close(token_nll(model, ids), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_bytes", [1, 2**27], ids=["a few rows", "all rows"])
def test_chunks_take_so_many_bytes(chunk_bytes, monkeypatch):
    monkeypatch.setattr(logits, "CHUNK_BYTES", chunk_bytes)
    head = hidden_states_and_head(tiny_model(), input_ids=tokens(8), use_cache=False)[1]
    assert head.chunk_size == max(logits.LEAST_ROWS, chunk_bytes // (4 * 64))


@pytest.mark.parametrize("name", ["llama", "gemma2", "device_map"])
def test_gradients_of_calibration_do_not_depend_on_the_chunks(name, monkeypatch):
    found = []
    for chunk_bytes in (ROWS * 4 * SMALL["vocab_size"], 2**26):
        monkeypatch.setattr(logits, "CHUNK_BYTES", chunk_bytes)
        model = on_devices() if name == "device_map" else tiny_model(name)
        found.append(_gradient_moments(model, tokens(40)[0], seed=3))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert all(moment.any() for moment in found[0].values())


def labels_of(ids):
    labels = ids.clone()
    labels[0, 5:20] = -100  # more than a chunk
    labels[1, -3:] = -100
    return labels


def outcome(model, **inputs):
    """Loss, and gradients of all weights."""
    model.zero_grad()
    model.train()
    loss = model(use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestLoss:
    @pytest.mark.parametrize("count", [None, 100, torch.tensor(100)], ids=["mean", "int", "tensor"])
    @pytest.mark.parametrize("name", [name for name in MODELS if name != "device_map"])
    def test_loss_and_gradients_are_the_models_own(self, name, count, small_chunks):
        model, ids = model_of(name), tokens(40, 2)
        inputs = {"input_ids": ids, "labels": labels_of(ids)}
        if name == "vision and language":
            inputs["token_type_ids"] = torch.zeros_like(ids)
        if count is not None:
            inputs["num_items_in_batch"] = count
        loss, gradients = outcome(model, **inputs)
        with loss_in_chunks(model):
            found, found_gradients = outcome(model, **inputs)
        torch.testing.assert_close(found, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(found_gradients, gradients, rtol=1e-10, atol=1e-10)
        assert any("lm_head" in name or "embed" in name for name in gradients)
        assert torch.equal(outcome(model, **inputs)[0], loss), "the model is left as it was"

    def test_packed_documents(self, small_chunks):
        model, ids = tiny_model(), tokens(40)
        inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(40)[None] % 15}
        expected = outcome(model, **inputs)
        with loss_in_chunks(model):
            torch.testing.assert_close(outcome(model, **inputs), expected, rtol=1e-10, atol=1e-10)

    def test_shifted_labels(self, small_chunks):
        model, ids = tiny_model(), tokens(40, 2)
        inputs = {"input_ids": ids, "labels": ids, "shift_labels": labels_of(ids)}
        expected = outcome(model, **inputs)
        with loss_in_chunks(model):
            torch.testing.assert_close(outcome(model, **inputs), expected, rtol=1e-10, atol=1e-10)

    def test_nothing_to_predict(self, small_chunks):
        model, ids = tiny_model(), tokens(40)
        with loss_in_chunks(model):
            assert model(ids, labels=torch.full_like(ids, -100)).loss.isnan()

    def test_the_routers_loss_is_kept(self, small_chunks):
        model, ids = model_of("mixtral's router"), tokens(40)
        with loss_in_chunks(model):
            found = model(ids, labels=ids, use_cache=False)
        assert found.aux_loss > 0
        model.config.output_router_logits = False
        without = model(ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(found.loss, without + model.router_aux_loss_coef * found.aux_loss)

    def test_a_loss_function_of_ones_own(self, small_chunks):
        model, ids = tiny_model(), tokens(40)
        model.loss_function = lambda logits, labels, **_: logits.square().mean()
        expected = outcome(model, input_ids=ids, labels=ids)
        with loss_in_chunks(model):
            torch.testing.assert_close(outcome(model, input_ids=ids, labels=ids), expected)

    def test_a_forward_that_does_not_call_the_loss_function(self, small_chunks):
        config = hf.MBartConfig(
            vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, is_decoder=True
        )
        model, ids = hf.MBartForCausalLM(config).double(), tokens(20)
        expected = outcome(model.eval(), input_ids=ids, labels=ids)[0].isfinite()
        with loss_in_chunks(model):
            assert model(input_ids=ids, labels=ids).logits.shape[1] == 20
        assert expected


class MostLogits(TorchDispatchMode):
    """Notes the largest tensor, in bytes of float32, that any operation returned with one logit for every word of the
    vocabulary in each row."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.bytes = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocab_size,):
                self.bytes = max(self.bytes, 4 * tensor.numel())
        return result


class TestMemory:
    """With logits for 100000 words, the chunk's 16 MB hold 41 rows of 200."""

    VOCABULARY, BYTES = 100_000, 2**24

    @pytest.fixture
    def watched(self, monkeypatch):
        monkeypatch.undo()  # float32
        monkeypatch.setattr(logits, "CHUNK_BYTES", self.BYTES)
        config = hf.LlamaConfig(**{**SMALL, "vocab_size": self.VOCABULARY, "num_hidden_layers": 1})
        config.sparse_attention = {"dense_below": 0}
        config._attn_implementation = "sparse"
        torch.manual_seed(0)
        with MostLogits(self.VOCABULARY) as most:
            yield hf.LlamaForCausalLM(config), torch.randint(self.VOCABULARY, (1, 200)), most
        assert self.BYTES / 2 < most.bytes <= self.BYTES

    def test_perplexity(self, watched):
        token_nll(*watched[:2])

    def test_perplexity_through_a_cache(self, watched):
        cached_nll(*watched[:2], hf.DynamicCache(), 150)

    def test_calibration(self, watched):
        _gradient_moments(watched[0], watched[1][0], seed=0)

    @pytest.mark.parametrize("evaluation", [False, True], ids=["step", "evaluation"])
    def test_training(self, watched, evaluation, tmp_path):
        model, ids, _ = watched
        trainer = trainer_of(model, ids, tmp_path)
        batch = {"input_ids": ids, "labels": ids}
        if evaluation:
            assert trainer.prediction_step(model, batch, prediction_loss_only=True)[0].isfinite()
        else:
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(model, batch)
            assert model.lm_head.weight.grad.any()
            assert model.model.layers[0].self_attn.q_proj.weight.grad.any()


def trainer_of(model, ids, output, **arguments):
    defaults = {
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    labels = labels_of(ids) if len(ids) > 1 else ids
    rows = [{"input_ids": row, "labels": target} for row, target in zip(ids.tolist(), labels.tolist(), strict=True)]
    arguments = FinetuneArguments(output_dir=str(output), **defaults | arguments)
    return FinetuneTrainer(
        model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator
    )


class TestTrainer:
    """Steps of the Trainer, with chunks and without."""

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"gradient_accumulation_steps": 2},
            {"per_device_train_batch_size": 2},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"label_smoothing_factor": 0.1},
            {"auto_find_batch_size": True},
            {"bf16": True},
            {"prediction_loss_only": False},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("name", ["gemma2 caps", "lora, head trained"])
    def test_steps_are_the_same(self, name, arguments, small_chunks, tmp_path, monkeypatch):
        found, calls = [], []
        function = logits.checkpoint
        monkeypatch.setattr(logits, "checkpoint", lambda *a, **kw: calls.append(1) or function(*a, **kw))
        for in_chunks in (True, False):
            model = copy.deepcopy(model_of(name))
            trainer = trainer_of(model, tokens(40, 4), tmp_path, **arguments)
            if not in_chunks:
                calls.clear()
                trainer._needs_all_logits = lambda return_outputs: True
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            found.append((torch.tensor(losses), trainer.evaluate()["eval_loss"], dict(model.state_dict())))
            assert bool(calls) == (in_chunks and "label_smoothing_factor" not in arguments)
        assert not torch.is_autocast_enabled("cpu")
        tolerance = 1e-2 if "bf16" in arguments else 1e-7
        torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)
