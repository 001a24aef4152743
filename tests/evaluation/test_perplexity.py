import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from hf_sparse_attn import logits
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
def test_token_nll_is_the_models_own_loss(tiny_llama_config, family, chunk_size, monkeypatch):
    monkeypatch.setattr(logits, "LEAST_ROWS", 1)
    monkeypatch.setattr(logits, "CHUNK_BYTES", chunk_size * 4 * 256)
    torch.manual_seed(0)
    model = FAMILIES[family](tiny_llama_config).eval()
    input_ids = torch.randint(256, (1, 40))
    with torch.no_grad():
        expected = F.cross_entropy(model(input_ids).logits[0, :-1], input_ids[0, 1:], reduction="none")
    torch.testing.assert_close(token_nll(model, input_ids), expected, rtol=1e-5, atol=1e-5)


def test_sparse_attention_that_covers_everything_costs_nothing(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path), {"window_size": 64})
    result = compare_perplexity(model, random_documents(2, 64))
    assert result["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert result["delta_nll"]["ci95"] == pytest.approx([0, 0], abs=1e-5)
    assert 0 <= result["kl"]["p99.9"] < 1e-9
    assert result["top1_agreement"] == 1
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
    assert sum(span["kl"] for span in spans) / 8 == pytest.approx(result["kl"]["mean"])
    assert spans[7]["ratio"] == pytest.approx(math.exp((losses["sparse"] - losses["sdpa"])[:, 70:].mean().item()))

    assert [document["name"] for document in result["documents"]] == ["document 0", "document 1", "document 2"]
    assert result["documents"][1]["sparse_nll"] == pytest.approx(losses["sparse"][1].mean().item(), rel=1e-5)
    rises = (losses["sparse"] - losses["sdpa"]).mean(1)
    assert [document["perplexity_ratio"] for document in result["documents"]] == pytest.approx(rises.exp().tolist())
    assert result["worst_document"] == f"document {int(rises.argmax())}"


def test_density_counts_the_pairs_of_window_and_globals(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path))
    result = compare_perplexity(model, random_documents(1, 50))
    attended = sum(len({0, 1} & set(range(row + 1)) | set(range(max(0, row - 7), row + 1))) for row in range(50))
    assert result["sparse"]["density"] == pytest.approx(attended / (50 * 51 / 2))


def test_scored_density_counts_keys_that_are_too_light_to_be_read(tiny_model_path):
    """Every key is scored when the buckets may give them all, whatever of them is then read."""
    fields = {"window_size": 4, "num_global_tokens": 0, "key_budget": 1000, "page_size": 1}
    found = []
    for min_weight in (0.0, 0.01, 0.1):
        model = load_sparse_model(str(tiny_model_path), {**fields, "min_weight": min_weight})
        found.append(compare_perplexity(model, random_documents(2, 60))["sparse"])
    assert [sparse["scored_density"] for sparse in found] == [1, 1, 1]
    assert 1 == found[0]["density"] > found[1]["density"] > found[2]["density"] > 0


def test_without_smallest_weights_what_is_scored_is_read(tiny_model_path):
    model = load_sparse_model(str(tiny_model_path), {"min_weight": 0.0, "key_budget": 8})
    sparse = compare_perplexity(model, random_documents(2, 60))["sparse"]
    assert sparse["scored_density"] == sparse["density"] < 1


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]], ids=str)
def test_worst_document_goes_by_the_difference_and_not_by_the_loss(tiny_model_path, order):
    model = load_sparse_model(str(tiny_model_path))
    documents = random_documents(3, 60)
    expected = compare_perplexity(model, documents)
    result = compare_perplexity(model, [documents[i] for i in order])
    assert result["worst_document"] == expected["worst_document"]
    assert max(expected["documents"], key=lambda document: document["sparse_nll"])["name"] != result["worst_document"]


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
    with pytest.raises(ValueError, match="the loss of document 'document 0' is not finite with dense attention"):
        compare_perplexity(model, random_documents(1, 20))


def test_interval_of_a_constant_difference_is_a_point():
    result = paired_difference(torch.full((2, 1000), 0.25, dtype=torch.float64))
    assert result["mean"] == 0.25
    assert result["ci95"] == pytest.approx([0.25, 0.25])


def held(draw, trials=40):
    """In how many trials the interval of what `draw(generator)` gives, whose true mean is 0, holds it."""
    generator = torch.Generator().manual_seed(0)
    intervals = [paired_difference(draw(generator))["ci95"] for _ in range(trials)]
    return sum(low < 0 < high for low, high in intervals)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_interval_holds_the_true_mean_of_correlated_tokens_about_as_often_as_it_says():
    # Passages of 64 tokens share most of their difference: an interval that took tokens for independent would be
    # about five times too narrow and hold the true mean in a third of all trials.
    def draw(generator):
        return (normal(generator, 2, 128, 1) + 0.5 * normal(generator, 2, 128, 64)).flatten(1)

    assert held(draw) >= 34


def test_interval_holds_the_true_mean_of_documents_that_differ():
    # Documents differ five times as much as passages: an interval over passages alone would hold it in few trials.
    def draw(generator):
        return normal(generator, 12, 1) + 0.2 * normal(generator, 12, 64).repeat_interleave(64, 1)

    assert held(draw) >= 32


def test_interval_is_no_wider_than_its_level():
    # A normal interval of the same data: +-1.96 standard errors of documents' means, apart from the resampling.
    generator = torch.Generator().manual_seed(0)
    difference = normal(generator, 12, 1) + 0.2 * normal(generator, 12, 4096)
    low, high = paired_difference(difference)["ci95"]
    expected = 2 * 1.96 * float(difference.mean(1).std(correction=0)) / 12**0.5
    assert (high - low) == pytest.approx(expected, rel=0.1)


def test_interval_is_the_same_every_time_and_says_what_was_drawn():
    difference = normal(torch.Generator().manual_seed(0), 3, 1000)
    assert paired_difference(difference) == paired_difference(difference)
    assert paired_difference(difference)["method"] == "bootstrap over 3 documents and, in each, 8 blocks of 125 tokens"


def test_blocks_of_uneven_length_count_by_their_tokens():
    # 8 blocks of 10 tokens, and one of 7 that alone differs and is drawn about once.
    difference = torch.zeros(1, 87, dtype=torch.float64)
    difference[0, -7:] = 1
    result = paired_difference(difference)
    assert result["mean"] == pytest.approx(7 / 87)
    assert result["ci95"][0] == 0
    assert 0.1 < result["ci95"][1] < 0.4
