import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from hf_sparse_attn.evaluation.perplexity import compare_perplexity, paired_difference, token_nll
from hf_sparse_attn.loading import load_sparse_model

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda config: LlamaForCausalLM(config),
    "gemma2, which caps its logits": lambda config: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)
    ),
    "granite, which scales them": lambda config: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
}


def random_documents(count, length):
    generator = torch.Generator().manual_seed(0)
    return [
        {"name": f"document {index}", "input_ids": torch.randint(256, (length,), generator=generator).tolist()}
        for index in range(count)
    ]


@pytest.mark.parametrize("chunk_size", [1, 7, 39, 40, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_nll_is_the_models_own_loss(tiny_llama_config, family, chunk_size):
    torch.manual_seed(0)
    model = FAMILIES[family](tiny_llama_config).eval()
    input_ids = torch.randint(256, (1, 40))
    with torch.no_grad():
        logits = model(input_ids).logits[0, :-1].float()
    expected = F.cross_entropy(logits, input_ids[0, 1:], reduction="none")
    torch.testing.assert_close(token_nll(model, input_ids, chunk_size), expected, rtol=1e-5, atol=1e-5)


def test_sparse_attention_that_covers_everything_costs_nothing(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path), {"window_size": 64})
    result = compare_perplexity(model, random_documents(2, 64))
    assert result["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert result["delta_nll"]["ci95"] == pytest.approx([0, 0], abs=1e-5)
    assert result["sparse"]["density"] == 1


def test_report_agrees_with_its_parts(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path))
    documents = random_documents(3, 81)
    result = compare_perplexity(model, documents)

    losses = {}
    for implementation in ("sdpa", "sparse"):
        model.set_attn_implementation(implementation)
        losses[implementation] = torch.stack(
            [token_nll(model, torch.tensor([document["input_ids"]])) for document in documents]
        )
    assert result["context_length"] == 81
    assert result["tokens"] == 240
    assert result["dense"]["nll"] == pytest.approx(losses["sdpa"].mean().item(), rel=1e-5)
    assert result["sparse"]["nll"] == pytest.approx(losses["sparse"].mean().item(), rel=1e-5)
    assert result["sparse"]["perplexity"] == pytest.approx(math.exp(result["sparse"]["nll"]))
    assert result["dense"]["seconds"] > 0
    assert result["sparse"]["seconds"] > 0
    delta = result["delta_nll"]
    assert delta["mean"] == pytest.approx(result["sparse"]["nll"] - result["dense"]["nll"])
    assert delta["ci95"][0] < delta["mean"] < delta["ci95"][1]
    assert abs(delta["mean"]) > 1e-3, "a window of 8 changes a random model's loss"
    assert result["perplexity_ratio"] == pytest.approx(math.exp(delta["mean"]))

    spans = result["by_position"]
    assert [(span["start"], span["end"]) for span in spans] == [(i, i + 10) for i in range(1, 81, 10)]
    assert sum(span["dense_nll"] for span in spans) / 8 == pytest.approx(result["dense"]["nll"])
    assert spans[7]["ratio"] == pytest.approx(math.exp((losses["sparse"] - losses["sdpa"])[:, 70:].mean().item()))

    assert [document["name"] for document in result["documents"]] == ["document 0", "document 1", "document 2"]
    assert result["documents"][1]["sparse_nll"] == pytest.approx(losses["sparse"][1].mean().item(), rel=1e-5)


def test_density_counts_the_pairs_of_window_and_globals(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path))
    result = compare_perplexity(model, random_documents(1, 50))
    attended = sum(len({0, 1} & set(range(row + 1)) | set(range(max(0, row - 7), row + 1))) for row in range(50))
    assert result["sparse"]["density"] == pytest.approx(attended / (50 * 51 / 2))


def test_model_is_left_with_sparse_attention(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path))
    compare_perplexity(model, random_documents(2, 20))
    assert model.config._attn_implementation == "sparse"


def test_two_tokens_are_enough(tiny_model_path):
    result = compare_perplexity(load_sparse_model(str(tiny_model_path)), random_documents(1, 2))
    assert result["tokens"] == 1
    assert len(result["by_position"]) == 1


def test_loss_that_is_not_finite_names_the_document(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path))
    torch.nn.init.constant_(model.lm_head.weight, float("inf"))
    with pytest.raises(ValueError, match="the loss of document 'document 0' is not finite with sdpa attention"):
        compare_perplexity(model, random_documents(1, 20))


def test_interval_of_a_constant_difference_is_a_point():
    result = paired_difference(torch.full((2, 1000), 0.25, dtype=torch.float64))
    assert result["mean"] == 0.25
    assert result["ci95"] == pytest.approx([0.25, 0.25])


def test_interval_holds_the_true_mean_of_correlated_tokens_about_as_often_as_it_says():
    # Passages of 64 tokens share most of their difference: an interval that took tokens for independent would be
    # about five times too narrow and hold the true mean in a third of all trials.
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(40):
        passages = torch.randn(2, 128, 1, generator=generator, dtype=torch.float64)
        noise = 0.5 * torch.randn(2, 128, 64, generator=generator, dtype=torch.float64)
        low, high = paired_difference((passages + noise).flatten(1))["ci95"]
        held += low < 0 < high
    assert held >= 34
