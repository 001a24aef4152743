import pytest
import torch

from hf_sparse_attn.evaluation.tasks import Haystack, Vocabulary, prompt_of
from hf_sparse_attn.evaluation.tasks.asking import ask, ask_both
from hf_sparse_attn.loading import load_sparse_model


@pytest.fixture(scope="module")
def sparse_model(tiny_model_path):
    fields = {"key_budget": 20, "num_hash_bits": 4}
    return load_sparse_model(str(tiny_model_path), fields, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer):
    haystack = Haystack([("text", " ".join(f"line {number} of the haystack." for number in range(200)))])
    return prompt_of("niah_multivalue", 2200, 0, Vocabulary(tiny_tokenizer), haystack)


@torch.no_grad()
def likelihoods(model, tokens, answers):
    """One whole forward for each alternative, no cache; with whether each token is the likeliest."""
    found = []
    for answer in answers:
        logits = model(torch.tensor([tokens + answer]), use_cache=False).logits[0, len(tokens) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
        found.append((chosen, logits.argmax(-1).tolist() == answer))
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "sparse"])
def test_answers_are_those_of_whole_forwards(sparse_model, prompt, implementation):
    sparse_model.set_attn_implementation(implementation)
    answers = ask(sparse_model, prompt)
    assert len(answers) == 16
    for index in (0, 3, 6):
        num_right = len(prompt.questions[index].right)
        tokens = prompt.input_ids + prompt.question_ids[index]
        whole = [likelihood for likelihood, _ in likelihoods(sparse_model, tokens, prompt.answer_ids[index])]
        margin = max(whole[:num_right]) - max(whole[num_right:])
        assert answers[index]["margin"] == pytest.approx(margin, abs=1e-6)
        assert answers[index]["right"] == (margin > 0)


def test_any_right_answer_may_be_generated(sparse_model, prompt):
    """The last right one is made what greedy decoding gives."""
    sparse_model.set_attn_implementation("sdpa")
    tokens = torch.tensor([prompt.input_ids + prompt.question_ids[0]])
    length = len(prompt.answer_ids[0][0])
    greedy = sparse_model.generate(tokens, max_new_tokens=length, do_sample=False)[0, tokens.shape[1] :].tolist()
    kept = prompt.answer_ids[0][3]
    assert not ask(sparse_model, prompt)[0]["generated"]
    try:
        prompt.answer_ids[0][3] = greedy
        assert ask(sparse_model, prompt)[0]["generated"]
        prompt.answer_ids[0][3], prompt.answer_ids[0][4] = kept, greedy  # the first wrong one
        assert not ask(sparse_model, prompt)[0]["generated"]
    finally:
        prompt.answer_ids[0][3] = kept


@pytest.mark.parametrize("sparse_first", [False, True])
def test_both_sides(sparse_model, prompt, sparse_first):
    result = ask_both(sparse_model, prompt, sparse_first)
    assert sparse_model.config._attn_implementation == "sparse"
    assert [question["sparse"] for question in result["questions"]] == ask(sparse_model, prompt)
    sparse_model.set_attn_implementation("sdpa")
    assert [question["dense"] for question in result["questions"]] == ask(sparse_model, prompt)
    assert 0 < result["attended"] / result["admissible"] < 0.1
    assert result["questions"][1]["chance"] == 3 / 15
    assert min(result["dense_seconds"], result["sparse_seconds"]) > 0
