import json
import math

import pytest
import torch
import transformers as hf
from helpers.families import tiny_model
from helpers.operation import calibrated_hash_text

from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.training import check_first_loss, extend_context
from hf_sparse_attn.training.context_extension import OTHER_TEXT_MARGIN, SAME_TEXT_MARGIN, FirstLoss

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama(**changes):
    return hf.LlamaConfig(**SMALL | changes)


def frequencies(config):
    """Of the rotary embeddings that Transformers makes of a config: [head_dim / 2]."""
    return hf.AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "theta"])
def test_the_factor_follows_from_the_length(name, tmp_path):
    """The saved config gives stock Transformers the frequencies of the published formulas, and the new length."""
    config = llama()
    extend_context(config, name, 1024).save_pretrained(tmp_path)
    loaded = hf.AutoConfig.from_pretrained(tmp_path)
    parameters = loaded.rope_parameters
    assert loaded.max_position_embeddings == (256 if name == "dynamic" else 1024)
    own = frequencies(config)
    scaled = frequencies(loaded)
    if name == "theta":
        assert parameters["rope_type"] == "default"
        assert parameters["rope_theta"] == pytest.approx(10000.0 * 4 ** (8 / 6))
        torch.testing.assert_close(scaled[-1], own[-1] / 4)  # the slowest one is stretched by the factor
    else:
        assert (parameters["rope_type"], parameters["factor"], parameters["rope_theta"]) == (name, 4, 10000.0)
    if name in ("yarn", "llama3"):
        assert parameters["original_max_position_embeddings"] == 256
        torch.testing.assert_close(scaled[-1], own[-1] / 4)
        torch.testing.assert_close(scaled[0], own[0])
    if name == "linear":
        torch.testing.assert_close(scaled, own / 4)
    if name == "dynamic":
        torch.testing.assert_close(scaled, own)
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_type"] == "default", "the given config stays as it is"


def test_no_warning_where_dynamic_scaling_reaches(tmp_path, tiny_model_path, caplog):
    config = extend_context(hf.AutoConfig.from_pretrained(tiny_model_path), "dynamic", 1024)
    model = load_sparse_model(str(tiny_model_path), config=config)
    ids = torch.zeros(1, 1025, dtype=torch.long)
    with torch.no_grad():
        model(ids[:, :1024])
        assert not caplog.records
        model(ids)
    assert "beyond max_position_embeddings=1024" in caplog.text


def test_scaled_further_in_its_own_kind():
    """Llama 3.1's factor of 8 stands for 16 times the length: what is between the two is kept."""
    config = extend_context(llama(rope_parameters=LLAMA_3_1), "llama3", 512)
    assert config.rope_parameters == LLAMA_3_1 | {"factor": 16.0}
    assert config.max_position_embeddings == 512
    twice = extend_context(extend_context(llama(), "dynamic", 512), "dynamic", 1024)
    assert (twice.rope_parameters["factor"], twice.max_position_embeddings) == (4, 256)


def test_parameters_in_full():
    given = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "beta_fast": 16}
    config = extend_context(llama(rope_parameters=LLAMA_3_1), given, 1024)
    assert config.rope_parameters == given | {"rope_theta": 500000.0}
    raised = extend_context(llama(), {"rope_type": "default", "rope_theta": 8e6}, 1024)
    assert raised.rope_parameters == {"rope_type": "default", "rope_theta": 8e6}
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]}
    longrope = extend_context(llama(), {"rope_type": "longrope", **factors}, 1024).rope_parameters
    assert (longrope["factor"], longrope["original_max_position_embeddings"]) == (4, 256)


def test_only_full_attention_is_scaled():
    own = tiny_model("gemma3").config
    config = extend_context(own, "linear", 1024)
    assert config.rope_parameters["sliding_attention"] == own.rope_parameters["sliding_attention"]
    assert config.rope_parameters["full_attention"]["factor"] == 4
    assert own.rope_parameters["full_attention"]["rope_type"] == "default"
    rotary = hf.AutoModelForCausalLM.from_config(config).model.rotary_emb
    before = hf.AutoModelForCausalLM.from_config(own).model.rotary_emb
    assert torch.equal(rotary.sliding_attention_inv_freq, before.sliding_attention_inv_freq)
    assert not torch.equal(rotary.full_attention_inv_freq, before.full_attention_inv_freq)


def test_partial_rotary_embeddings():
    own = hf.GPTNeoXConfig(**SMALL, rotary_pct=0.5)
    config = extend_context(own, "theta", 1024)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == pytest.approx(10000.0 * 4 ** (4 / 2))
    assert extend_context(own, "linear", 1024).rope_parameters["partial_rotary_factor"] == 0.5


def test_text_model_of_a_vision_language_model():
    text = {**SMALL, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    own = hf.Gemma3Config(text_config=text, vision_config={"hidden_size": 24, "num_hidden_layers": 1})
    config = extend_context(own, "linear", 512)
    assert config.text_config.rope_parameters["full_attention"]["factor"] == 2
    assert config.text_config.max_position_embeddings == 512
    assert config.vision_config.to_dict() == own.vision_config.to_dict()


@pytest.mark.parametrize(
    ("scaling", "context_length", "words"),
    [
        ("yarm", 1024, "unknown kind 'yarm'; expected linear, dynamic, yarn, llama3, theta or a JSON object"),
        ("longrope", 1024, "longrope needs its short_factor and long_factor"),
        ("yarn", 256, "the model was made for 256 tokens, context_length is 256"),
        ({"factor": 2.0}, 1024, "rope_type must be one of default, linear, .*, got None"),
        ({"rope_type": ["yarn"]}, 1024, r"got \['yarn'\]"),
        ({"rope_type": "linear", "factor": 1}, 1024, "factor must be a number greater than 1, got 1.0"),
        ({"rope_type": "linear", "factor": "2"}, 1024, "factor must be a number greater than 1, got '2'"),
        ({"rope_type": "linear", "factor": True}, 1024, "got True"),
        ({"rope_type": "linear", "factr": 2.0}, 1024, "'factr'"),
        ({"rope_type": "yarn", "beta_fast": "x"}, 1024, "beta_fast .*, got x"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 2048}, 1024, "integer under 1024, got 2048"),
        ({"rope_type": "llama3"}, 1024, "Missing required keys .*low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, 1024, "must have length 4, got 1"),
        ({"rope_type": "default", "rope_theta": -1}, 1024, "rope_theta must be a number greater than 1, got -1.0"),
    ],
    ids=str,
)
def test_what_cannot_be_scaled_to(scaling, context_length, words):
    with pytest.raises(ArgumentError, match=f"(?s)^rope_scaling.*{words}"):
        extend_context(llama(), scaling, context_length)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (hf.GPT2Config(n_embd=32, n_head=4, n_layer=1), "a model of type gpt2 has no rotary position embeddings"),
        (hf.OPTConfig(hidden_size=32, num_attention_heads=4), "a model of type opt has no rotary"),
        (llama(rope_parameters=LLAMA_3_1), "scaled by 'llama3' already: scale it further by 'llama3', or give a JSON"),
        (hf.Phi3Config(**SMALL), "must be one of \\['longrope'\\], got yarn"),
    ],
    ids=["gpt2", "opt", "llama3.1", "phi3"],
)
def test_models_that_cannot_be_scaled(config, words):
    with pytest.raises(ArgumentError, match=f"^rope_scaling.*{words}"):
        extend_context(config, "yarn", 4096)


def test_family_that_does_not_look_at_rope_type(monkeypatch):
    monkeypatch.setattr(hf.models.llama.modeling_llama, "LlamaRotaryEmbedding", torch.nn.Identity)
    with pytest.raises(ArgumentError, match="LlamaForCausalLM of this version of Transformers does not scale"):
        extend_context(llama(), "linear", 1024)


def test_transformers_logger_is_left_as_it_was(caplog):
    import logging

    logger = logging.getLogger("transformers.modeling_rope_utils")
    before = logger.level, logger.propagate, list(logger.handlers)
    extend_context(llama(), {"rope_type": "yarn", "factor": 3.0}, 1024)  # not the ratio of the lengths, but a choice
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


ROW = {"position_ids": [*range(40), *range(24)], "labels": [-100, *[5] * 39, -100, *[5] * 23]}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_first_loss_is_compared_with_the_old_rotary_embeddings(family):
    """Both losses are those of models loaded with either config; the model stays as it was."""
    plain = tiny_model(family)
    plain.config.max_position_embeddings = 32
    config = extend_context(plain.config, "linear", 64)
    scaled = type(plain)(config).double()
    scaled.load_state_dict(plain.state_dict())
    scaled.train()
    row = ROW | {"input_ids": torch.randint(1, 64, (64,), generator=torch.Generator().manual_seed(0)).tolist()}

    def loss(model, length):
        model.set_attn_implementation("sparse")
        with torch.no_grad():
            logits = model.eval()(
                torch.tensor([row["input_ids"][:length]]),
                position_ids=torch.tensor([row["position_ids"][:length]]),
                use_cache=False,
            ).logits
        return torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), torch.tensor(row["input_ids"][1:length]), reduction="none"
        )

    buffers = {name: id(buffer) for name, buffer in scaled.named_buffers()}
    found = check_first_loss(scaled, row, plain.config)
    assert scaled.training
    assert {name: id(buffer) for name, buffer in scaled.named_buffers()} == buffers
    assert found.trained == pytest.approx(loss(plain, 32).mean().item(), abs=1e-5)
    assert found.scaled == pytest.approx(loss(scaled, 64)[:31].mean().item(), abs=1e-5)
    assert found.beyond == pytest.approx(loss(scaled, 64)[31:39].mean().item(), abs=1e-5)
    assert found.trained_length == 32


def test_lines_of_a_first_loss():
    changed, unreached = 2 + 1.1 * SAME_TEXT_MARGIN, 2 + 1.1 * OTHER_TEXT_MARGIN
    assert FirstLoss(2.0, 2.0, changed, 8192).problem() is None, "another part of the text may be harder"
    assert FirstLoss(2.0, 2.0, None, 8192).problem() is None
    assert f"within 8192 tokens is {changed:.2f} with" in FirstLoss(2.0, changed, 2.0, 8192).problem()
    assert f"beyond 8192 tokens is {unreached:.2f}, within" in FirstLoss(2.0, 2.0, unreached, 8192).problem()
    assert "factor is too large" in FirstLoss(2.0, math.nan, None, 8192).problem()
    assert "factor or rope_theta is too small" in FirstLoss(2.0, 2.0, math.nan, 8192).problem()


def finetune(run_script, model, documents, output, *more):
    return run_script(
        "finetune.py", "--model", model, "--dataset", documents, "--context-length", 600, "--output", output,
        "--max-steps", 2, "--use_cpu", "true", "--disable-tqdm", "true", *more,
    )  # fmt: skip


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(map(str, range(600))))
    return tmp_path / "long.txt"


def test_command_saves_the_scaling(run_script, tiny_model_path, documents, tmp_path):
    given = ("--rope-scaling", "yarn", "--rows", "windowed", "--eval-dataset", documents, "--eval-rows", 2)
    finished = finetune(run_script, tiny_model_path, documents, tmp_path / "tuned", *given)
    assert finished.status == 0, finished.stderr
    assert "more than the 512" not in finished.stderr
    config = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").config
    assert config.rope_parameters["factor"] == 600 / 512
    assert config.max_position_embeddings == 600
    results = json.loads((tmp_path / "tuned" / "all_results.json").read_text())
    for when in ("before", "after"):
        spans = results[f"eval_by_position_{when}"]
        assert (spans[0]["start"], spans[-1]["end"], len(spans)) == (0, 600, 8)
        mean = sum(span["nll"] * span["tokens"] for span in spans) / sum(span["tokens"] for span in spans)
        assert mean == pytest.approx(results[f"eval_loss_{when}"], abs=1e-4)
    assert "of their tokens 525 .. 599" in finished.stdout

    same = ("--rope-scaling", "yarn", "--resume_from_checkpoint", "last", "--max-steps", 3)
    finished = finetune(run_script, tiny_model_path, documents, tmp_path / "tuned", *same)
    assert finished.status == 0, finished.stderr
    again = ("--rope-scaling", "linear", "--resume_from_checkpoint", "last", "--max-steps", 4)
    finished = finetune(run_script, tiny_model_path, documents, tmp_path / "tuned", *again)
    assert finished.status == 2
    assert "checkpoint-3' is of another model: its rope_parameters" in finished.stderr


def test_command_warns_of_a_bad_first_loss(run_script, tiny_model_path, documents, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.cli.finetune.check_first_loss", lambda *_: FirstLoss(2.0, 4.0, None, 512))
    given = ("--rope-scaling", "yarn")
    finished = finetune(run_script, tiny_model_path, documents, tmp_path / "tuned", *given)
    assert finished.status == 0, finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if "the loss within" in line]
    assert "the loss within 512 tokens is 4.00 with the scaled rotary embeddings, 2.00 without scaling" in line


def test_command_warns_of_a_hash_fitted_before(run_script, tiny_model_path, documents, tmp_path):
    fitted = {"hash": "calibrated", "calibrated_hash": calibrated_hash_text(2, 2, 8), "key_budget": 4}
    given = ("--rope-scaling", json.dumps({"rope_type": "yarn"}), "--sparse-attention", json.dumps(fitted))
    finished = finetune(run_script, tiny_model_path, documents, tmp_path / "tuned", *given)
    assert finished.status == 0, finished.stderr
    assert "the calibrated hash was fitted to keys under the rotary embeddings of before" in finished.stderr
    assert "convert --refit" in finished.stderr


def test_command_says_what_to_give(run_script, tiny_model_path, documents, tmp_path):
    finished = finetune(run_script, tiny_model_path, documents, tmp_path / "tuned")
    assert finished.status == 0, finished.stderr
    assert "600 tokens are more than the 512 that the model was made for" in finished.stderr
    assert "--rope-scaling yarn" in finished.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("yarm", ["unknown kind 'yarm'", "expected linear, dynamic, yarn, llama3, theta"]),
        ('{"rope_type": "linear", "factor": 0.5}', ["factor must be a number greater than 1, got 0.5"]),
        ("{", ["not valid JSON"]),
    ],
)
def test_command_refuses_before_loading(
    run_script, assert_refused, tiny_model_path, documents, tmp_path, monkeypatch, given, words
):
    monkeypatch.setattr("hf_sparse_attn.cli.finetune.load_model", None)
    finished = finetune(run_script, tiny_model_path, documents, tmp_path / "tuned", "--rope-scaling", given)
    assert_refused(finished, "--rope-scaling", *words)
    assert not (tmp_path / "tuned").exists()
