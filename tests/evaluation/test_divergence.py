"""The divergence of chunked logits against whole ones in float64, its summary, and the tokens that lost most."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from hf_sparse_attn import logits
from hf_sparse_attn.evaluation.divergence import Predictions, divergence, summarize, worst_tokens
from hf_sparse_attn.evaluation.perplexity import compare_perplexity
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
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied embeddings": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gemma3, capped": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=64, final_logit_softcapping=2.0)
    ),
}
FIELDS = {"window_size": 16, "num_global_tokens": 1, "key_budget": 0, "dense_below": 0}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    made = FAMILIES[request.param]().eval()
    made.config.sparse_attention = FIELDS
    made.set_attn_implementation("sparse")
    return made


def documents(count, length):
    generator = torch.Generator().manual_seed(0)
    return [
        {"name": f"document {index}", "input_ids": torch.randint(256, (length,), generator=generator).tolist()}
        for index in range(count)
    ]


def whole_logs(model, document, implementation):
    """Log-probabilities [N - 1, V] in float64."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(torch.tensor([document["input_ids"]])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("rows", [1, 14, 1000])
def test_report_agrees_with_whole_logits_in_float64(model, rows, monkeypatch):
    monkeypatch.setattr(logits, "LEAST_ROWS", 1)
    monkeypatch.setattr(logits, "CHUNK_BYTES", rows * 4 * 256)
    read = documents(2, 50)
    result = compare_perplexity(model, read)

    dense, sparse = (torch.stack([whole_logs(model, one, name) for one in read]) for name in ("sdpa", "sparse"))
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    expected = {"mean": kl.mean(), **{n: kl.quantile(q) for n, q in (("median", 0.5), ("p99", 0.99), ("p99.9", 0.999))}}
    assert list(result["kl"]) == list(expected)
    for name, figure in expected.items():
        assert result["kl"][name] == pytest.approx(figure.item(), rel=1e-4), name
    assert len(set(result["kl"].values())) == 4
    agreement = (dense.argmax(-1) == sparse.argmax(-1)).double().mean().item()
    assert result["top1_agreement"] == pytest.approx(agreement)
    assert 0.1 < agreement < 1
    assert [one["kl"] for one in result["documents"]] == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert result["by_position"][0]["kl"] == pytest.approx(kl[:, :6].mean().item(), rel=1e-4)

    targets = torch.tensor([one["input_ids"][1:] for one in read])[..., None]
    own_dense, own_sparse = (logs.gather(-1, targets)[..., 0] for logs in (dense, sparse))
    lost = own_dense - own_sparse
    assert len(result["worst_tokens"]) == 10
    for rank, index in enumerate(lost.flatten().argsort(descending=True)[:10].tolist()):
        document, place = divmod(index, 49)
        found = result["worst_tokens"][rank]
        assert (found["document"], found["position"]) == (f"document {document}", place + 1)
        assert found["dense_logprob"] == pytest.approx(own_dense[document, place].item(), abs=1e-4)
        assert found["sparse_logprob"] == pytest.approx(own_sparse[document, place].item(), abs=1e-4)
        assert found["kl"] == pytest.approx(kl[document, place].item(), rel=1e-4)
        assert "before" not in found


def test_two_forwards_a_document_and_few_logits_at_once(model, monkeypatch):
    monkeypatch.setattr(logits, "LEAST_ROWS", 1)
    monkeypatch.setattr(logits, "CHUNK_BYTES", 10 * 4 * 256)
    forwards, rows = [], []
    model.base_model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    model.get_output_embeddings().register_forward_hook(lambda _, given, out: rows.append(out.shape[-2]))
    compare_perplexity(model, documents(3, 50))
    assert len(forwards) == 6
    assert max(rows) == 5  # half a chunk, as there are two sides
    assert sum(rows) == 6 * (49 + 1)  # each row once, and one that the forward makes by itself


def test_sides_are_not_mixed_up_by_their_turns(tiny_model_path):
    """The second document's sparse forward comes first."""
    model = load_sparse_model(str(tiny_model_path))
    first, second = documents(2, 40)
    both, alone = compare_perplexity(model, [first, second]), compare_perplexity(model, [second])
    for name in ("dense_nll", "sparse_nll", "kl"):
        assert both["documents"][1][name] == pytest.approx(alone["documents"][0][name], rel=1e-5), name


class TestDivergence:
    def test_tiny_ones_keep_their_digits(self):
        """In float32, the sum of p log(p / q) would be noise around 1e-7."""
        torch.manual_seed(0)
        dense = torch.randn(50, 5000, dtype=torch.float64)
        sparse = dense + 1e-3 * torch.randn(50, 5000, dtype=torch.float64)
        a, b = dense.log_softmax(-1), sparse.log_softmax(-1)
        expected = (a.exp() * (a - b)).sum(-1)
        assert expected.max() < 1e-6
        found = divergence(dense.float().log_softmax(-1), sparse.float().log_softmax(-1))
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0)

    def test_far_apart(self):
        dense = torch.tensor([[0.0, -200.0, -1.0], [0.0, 0.0, 0.0]]).log_softmax(-1)
        sparse = torch.tensor([[-200.0, 0.0, -1.0], [50.0, 0.0, -50.0]]).log_softmax(-1)
        a, b = dense.double(), sparse.double()
        expected = (a.exp() * (a - b)).sum(-1)
        torch.testing.assert_close(divergence(dense, sparse).double(), expected, rtol=1e-5, atol=0)

    def test_words_that_neither_side_allows_count_nothing(self):
        dense = torch.tensor([[0.0, 1.0, -torch.inf]]).log_softmax(-1)
        sparse = torch.tensor([[1.0, 0.0, -torch.inf]]).log_softmax(-1)
        torch.testing.assert_close(divergence(dense, sparse), divergence(dense[:, :2], sparse[:, :2]))

    def test_a_word_that_dense_never_says(self):
        dense, sparse = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
        torch.testing.assert_close(divergence(dense, sparse), torch.tensor([2.0]).log())


def predictions(dense, sparse):
    dense, sparse = torch.tensor(dense), torch.tensor(sparse)
    return Predictions(dense, sparse, torch.arange(dense.numel()).view_as(dense).float(), dense == sparse)


def test_summary_of_known_figures():
    kl = torch.arange(1001.0).flip(0).view(7, 143)
    agrees = kl < 1000
    assert summarize(Predictions(kl, kl, kl, agrees)) == {
        "kl": {"mean": 500, "median": 500, "p99": pytest.approx(990), "p99.9": pytest.approx(999)},
        "top1_agreement": pytest.approx(1000 / 1001),
    }


class TestWorstTokens:
    TEXT = "The price was 5 \u20ac, \u4f60\n said"

    def worst(self, tokenizer, text, positions):
        """The tokens at these positions, which lose less and less."""
        ids = tokenizer(text)["input_ids"]
        sparse = torch.ones(len(ids) - 1)
        for rank, position in enumerate(positions):
            sparse[position - 1] += len(positions) - rank
        found = predictions([[1.0] * len(sparse)], [sparse.tolist()])
        document = {"name": "a", "input_ids": ids}
        return worst_tokens(found, [document], tokenizer, len(positions))

    def test_in_their_text(self, tiny_tokenizer):
        offset = len("The price was 5 ")
        found = self.worst(tiny_tokenizer, self.TEXT, [4, offset, 3])
        assert [(token["before"], token["token"]) for token in found] == [
            ("The ", "p"),
            ("The price was 5 ", "\u20ac"),
            ("The", " "),
        ]
        assert found[0] == {
            "document": "a",
            "position": 4,
            "dense_logprob": -1,
            "sparse_logprob": -4,
            "kl": 3,
            "before": "The ",
            "token": "p",
        }

    def test_a_later_part_of_a_character(self, tiny_tokenizer):
        (token,) = self.worst(tiny_tokenizer, "5 \u20ac.", [3])
        assert (token["before"], token["token"]) == ("5 \u20ac", "\ufffd")

    def test_the_text_before_is_cut(self, tiny_tokenizer):
        (token,) = self.worst(tiny_tokenizer, "x" * 100 + "a" * 39 + "bc", [139])
        assert (token["before"], token["token"]) == ("x" + "a" * 39, "b")

    def test_fewer_tokens_than_are_asked_for(self):
        ids = {"name": "a", "input_ids": [1, 2, 3]}
        found = worst_tokens(predictions([[0.0, 0.0]], [[0.0, 1.0]]), [ids])
        assert [token["position"] for token in found] == [2, 1]

    def test_of_documents(self):
        both = [{"name": name, "input_ids": [1, 2, 3]} for name in "ab"]
        found = worst_tokens(predictions([[0.0, 9.0], [0.0, 0.0]], [[0.0, 9.0], [1.0, 0.0]]), both, count=1)
        assert (found[0]["document"], found[0]["position"], found[0]["kl"]) == ("b", 1, 2)
