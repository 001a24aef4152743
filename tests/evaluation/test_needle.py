import copy
import json

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.evaluation.haystack import Context, Needle, make_contexts
from hf_sparse_attn.evaluation.needle import (
    binomial_interval,
    compare_retrieval,
    paired_difference,
    plot_retrieval,
    retrieve,
)
from hf_sparse_attn.loading import load_sparse_model


@pytest.fixture(scope="module")
def contexts(tiny_tokenizer):
    text = " ".join(f"line {number} of the haystack." for number in range(100))
    document = {"name": "haystack", "input_ids": tiny_tokenizer(text)["input_ids"]}
    config = SparseAttentionConfig(window_size=8, num_global_tokens=2, dense_below=0)
    return make_contexts([document], tiny_tokenizer, 600, [0, 1], config, num_samples=2, num_single=1)


@pytest.fixture(scope="module")
def sparse_model(tiny_model_path):
    """The tiny model in float64, whose rows read a window of 8 keys, two globals and 20 routed keys."""
    fields = {"key_budget": 20, "num_hash_bits": 4}
    return load_sparse_model(str(tiny_model_path), fields, dtype=torch.float64).eval()


@torch.no_grad()
def naive_margin(model, context, needle):
    """One whole forward for each alternative, no cache."""
    likelihoods = []
    for answer in needle.alternatives:
        tokens = torch.tensor([context.input_ids + needle.question + answer])
        probabilities = model(tokens, use_cache=False).logits[0].log_softmax(-1)
        rows = range(tokens.shape[1] - len(answer) - 1, tokens.shape[1] - 1)
        likelihoods.append(sum(probabilities[row, token].item() for row, token in zip(rows, answer, strict=True)))
    return likelihoods[0] - max(likelihoods[1:])


def random_context(answer_tokens, num_needles=3, length=60):
    generator = np.random.default_rng(answer_tokens)
    needles = [
        Needle(
            depth=0.5,
            start=0,
            end=1,
            question=generator.integers(256, size=3 + index).tolist(),
            alternatives=generator.integers(256, size=(5, answer_tokens)).tolist(),
            key="",
            answer="",
        )
        for index in range(num_needles)
    ]
    return Context("several", length, "random", generator.integers(256, size=length).tolist(), needles)


FAMILIES = {
    "llama": LlamaForCausalLM,
    "mistral, whose cache slides": lambda config: MistralForCausalLM(
        MistralConfig(**{name: getattr(config, name) for name in COMMON}, sliding_window=20)
    ),
}
COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "initializer_range"),
)


@pytest.mark.parametrize("answer_tokens", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_margins_are_those_of_whole_forwards(tiny_llama_config, family, implementation, answer_tokens):
    torch.manual_seed(0)
    model = FAMILIES[family](copy.deepcopy(tiny_llama_config)).double().eval()
    model.config.sparse_attention = {"window_size": 8, "num_global_tokens": 2, "key_budget": 8, "dense_below": 0}
    model.set_attn_implementation(implementation)
    context = random_context(answer_tokens)
    found = retrieve(model, context)
    expected = [naive_margin(model, context, needle) for needle in context.needles]
    assert [answer["margin"] for answer in found] == pytest.approx(expected, abs=1e-6)
    assert [answer["right"] for answer in found] == [margin > 0 for margin in expected]


@pytest.mark.parametrize("answer_tokens", [1, 3])
@pytest.mark.parametrize("changed", [None, "first", "last"])
def test_generated_is_what_generate_starts_with(tiny_llama_config, answer_tokens, changed):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(tiny_llama_config)).double().eval()
    context = random_context(answer_tokens)
    for needle in context.needles:
        prompt = torch.tensor([context.input_ids + needle.question])
        answer = model.generate(prompt, max_new_tokens=answer_tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert len(answer) == answer_tokens
        if changed:
            answer[0 if changed == "first" else -1] ^= 1
        needle.alternatives[0] = answer
    assert [answer["generated"] for answer in retrieve(model, context)] == [changed is None] * 3


def test_report_agrees_with_its_parts(sparse_model, contexts):
    result = compare_retrieval(sparse_model, contexts)
    found = {}
    for side, implementation in (("dense", "sdpa"), ("sparse", "sparse")):
        sparse_model.set_attn_implementation(implementation)
        found[side] = [answer for context in contexts for answer in retrieve(sparse_model, context)]
        for name, key in (("accuracy", "right"), ("generation_accuracy", "generated"), ("margin", "margin")):
            assert result[side][name] == pytest.approx(np.mean([answer[key] for answer in found[side]]))
        assert result[side]["seconds"] > 0
    both = list(zip(found["dense"], found["sparse"], strict=True))
    pairs = [(dense["right"], sparse["right"]) for dense, sparse in both]
    assert result["samples"] == len(pairs) == 6
    assert result["only_dense"] == pairs.count((True, False))
    assert result["only_sparse"] == pairs.count((False, True))
    assert 0 < result["sparse"]["density"] < 0.5
    margins = [
        sparse["margin"] - dense["margin"] for dense, sparse in zip(found["dense"], found["sparse"], strict=True)
    ]
    assert max(map(abs, margins)) > 1e-3, "28 of 600 keys change a random model's answers"
    difference = result["difference"]
    assert difference["margin"] == pytest.approx(np.mean(margins))
    assert difference["margin_ci95"][0] < difference["margin"] < difference["margin_ci95"][1]

    assert [(cell["task"], cell["depth"], cell["samples"]) for cell in result["cells"]] == [
        *(("several", 0, 2), ("several", 1, 2)),
        *(("single", 0, 1), ("single", 1, 1)),
    ]
    second = [found["dense"][1], found["dense"][3]]
    assert result["cells"][1]["dense"]["margin"] == pytest.approx(np.mean([answer["margin"] for answer in second]))
    assert [(task["task"], task["samples"]) for task in result["tasks"]] == [("several", 4), ("single", 2)]
    asked = [needle for context in result["contexts"] for needle in context["needles"]]
    assert [needle["sparse"]["margin"] for needle in asked] == pytest.approx([a["margin"] for a in found["sparse"]])
    assert [needle["start"] for needle in asked] == [needle.start for c in contexts for needle in c.needles]
    json.dumps(result, allow_nan=False)


def test_sparse_attention_that_covers_everything_gives_the_dense_answers(tiny_model_path, contexts):
    model = load_sparse_model(str(tiny_model_path), {"window_size": 1000}, dtype=torch.float64).eval()
    result = compare_retrieval(model, contexts)
    assert result["sparse"]["density"] == 1
    assert result["only_dense"] == result["only_sparse"] == 0
    for cell in result["cells"]:
        assert cell["sparse"] == pytest.approx(cell["dense"], abs=1e-9)


def test_model_is_left_with_sparse_attention(sparse_model, contexts):
    compare_retrieval(sparse_model, contexts[:2])
    assert sparse_model.config._attn_implementation == "sparse"


def test_likelihood_that_is_not_finite_names_the_document(tiny_model_path, contexts):
    model = load_sparse_model(str(tiny_model_path))
    torch.nn.init.constant_(model.lm_head.weight, float("inf"))
    with pytest.raises(ValueError, match="document 'haystack' is not finite with sdpa attention"):
        compare_retrieval(model, contexts[:1])


def asked(both, only_dense, only_sparse, neither=0):
    def entry(dense, sparse):
        return {side: {"right": right, "generated": right, "margin": 1.0 if right else -1.0}
                for side, right in (("dense", dense), ("sparse", sparse))}  # fmt: skip

    kinds = ((True, True), (True, False), (False, True), (False, False))
    counts = (both, only_dense, only_sparse, neither)
    return [entry(*kind) for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]


def test_sign_test_and_mean_by_hand():
    result = paired_difference(asked(both=90, only_dense=5, only_sparse=1, neither=4))
    assert result["accuracy"] == pytest.approx(-0.04)
    assert result["margin"] == pytest.approx(-0.08)
    assert result["p_value"] == pytest.approx(2 * (1 + 6) / 64)
    assert result["ci95"][0] < -0.04 < result["ci95"][1]
    assert paired_difference(asked(both=9, only_dense=1, only_sparse=1))["p_value"] == 1


def test_interval_without_any_difference_says_what_could_have_been_missed():
    low, high = paired_difference(asked(both=50, only_dense=0, only_sparse=0))["ci95"]
    # Nothing in 50 trials: the largest share under which that has a probability of 0.0125.
    assert high == pytest.approx(1 - 0.0125 ** (1 / 50), abs=1e-9)
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0, 0.3085), (10, 10, 0.6915, 1), (5, 10, 0.1871, 0.8129), (1, 20, 0.0013, 0.2487)],
)
def test_binomial_interval_is_the_published_one(successes, trials, low, high):
    assert binomial_interval(successes, trials, level=0.95) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_writes_a_picture(tmp_path, sparse_model, contexts, suffix):
    path = tmp_path / f"needle{suffix}"
    cells = compare_retrieval(sparse_model, contexts[-2:])["cells"]
    plot_retrieval([cells[0], cells[1] | {"context_length": 900}], path)  # a grid with holes
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
