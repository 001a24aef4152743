import json
import math

import pytest

from hf_sparse_attn.evaluation.needle import binomial_interval
from hf_sparse_attn.evaluation.tasks.paired import paired_difference, sign_flip_test, summarize
from hf_sparse_attn.evaluation.tasks.picture import plot_tasks


def prompt(pairs, task="qa1", length=1000, chance=0.1):
    """Of (dense, sparse) pairs of right answers."""

    def side(right):
        return {"right": right, "generated": right, "margin": 1.0 if right else -1.0}

    questions = [{"chance": chance, "dense": side(dense), "sparse": side(sparse)} for dense, sparse in pairs]
    return {"task": task, "context_length": length, "attended": 10, "admissible": 50, "questions": questions}


BOTH, LOST, GAINED, NEITHER = (True, True), (True, False), (False, True), (False, False)


def test_with_one_question_a_prompt_it_is_mcnemars_test():
    """5 lost, 1 gained: 2 * (1 + 6) / 64."""
    assert sign_flip_test([-1] * 5 + [1]) == pytest.approx(2 * 7 / 64)
    assert sign_flip_test([]) == 1
    assert sign_flip_test([0, 1, -1]) == 1


def test_questions_of_a_prompt_change_sides_together():
    """Two prompts lose three questions each: of four signs, two are as far from 0."""
    assert sign_flip_test([-3, -3]) == pytest.approx(0.5)
    # 2, 1 and 1: all signs equal gives 4 in 2 of 8 ways; 2 - 1 + 1 = 2 and more in 6 of 8.
    assert sign_flip_test([2, 1, 1]) == pytest.approx(2 / 8)
    assert sign_flip_test([2, -1, 1]) == pytest.approx(6 / 8)


def test_counts_and_points_by_hand():
    prompts = [prompt([BOTH, LOST, LOST, NEITHER]), prompt([BOTH, GAINED, BOTH, BOTH])]
    (cell,) = summarize(prompts)["cells"]
    assert (cell["prompts"], cell["samples"], cell["only_dense"], cell["only_sparse"]) == (2, 8, 2, 1)
    assert cell["dense"]["accuracy"] == 6 / 8
    assert cell["sparse"]["accuracy"] == 5 / 8
    difference = cell["difference"]
    assert difference["accuracy"] == difference["generation_accuracy"] == -1 / 8
    assert difference["margin"] == -2 / 8
    assert difference["p_value"] == 1
    assert difference["ci95"][0] < -1 / 8 < difference["ci95"][1]
    assert cell["density"] == 0.2


def test_without_any_difference_the_interval_is_the_exact_one():
    low, high = paired_difference([prompt([BOTH] * 8)] * 40)["interval"]
    assert high == pytest.approx(1 - 0.0125 ** (1 / 320), abs=1e-9)
    assert low == pytest.approx(-high)


def test_losses_of_whole_prompts_widen_the_interval():
    """32 of 320 questions are lost: 4 prompts lose all of theirs, or 32 prompts one each."""
    together = [prompt([LOST] * 8)] * 4 + [prompt([BOTH] * 8)] * 36
    apart = [prompt([LOST, *[BOTH] * 7])] * 32 + [prompt([BOTH] * 8)] * 8
    wide, narrow = (paired_difference(prompts) for prompts in (together, apart))
    assert wide["only_dense"] == narrow["only_dense"] == 32
    assert wide["interval"][0] < narrow["interval"][0] - 0.03
    assert wide["p_value"] == pytest.approx(narrow["p_value"]) == pytest.approx(2 / 2**32)
    assert wide["p_value_by_prompt"] == pytest.approx(2 / 2**4)
    assert narrow["p_value_by_prompt"] == pytest.approx(2 / 2**32)


def test_the_worst_task_is_among_those_that_the_dense_model_can_do():
    prompts = [
        *[prompt([BOTH] * 8, "fine")] * 10,
        *[prompt([LOST, *[BOTH] * 7], "worse")] * 10,
        *[prompt([LOST, *[NEITHER] * 7], "guessed", chance=0.125)] * 10,  # loses as much, and was never known
        *[prompt([LOST, LOST, *[BOTH] * 6], "worse", length=2000)] * 10,
    ]
    summary = summarize(prompts)
    assert [(cell["task"], cell["context_length"]) for cell in summary["cells"]] == [
        *(("fine", 1000), ("worse", 1000), ("guessed", 1000)),
        ("worse", 2000),
    ]
    assert summary["too_hard"] == ["guessed 1000"]
    worst = summary["worst"]
    assert (worst["task"], worst["context_length"], worst["difference"]["accuracy"]) == ("worse", 2000, -0.25)
    assert worst["of"] == 3
    assert worst["simultaneous_ci95"][0] < worst["difference"]["ci95"][0]
    json.dumps(summary, allow_nan=False)


def test_chance_is_not_ability():
    """20 of 160 right where chance is 1 in 8: the interval of the dense accuracy holds chance."""
    summary = summarize([prompt([BOTH, *[NEITHER] * 7], chance=0.125)] * 20)
    assert summary["worst"] is None
    assert summary["too_hard"] == ["qa1 1000"]


def test_interval_of_thousands_of_trials():
    """Their binomial coefficients are more than a float can hold."""
    low, high = binomial_interval(2000, 4000, 0.95)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 4000), rel=0.02)
    assert low < 0.5 < high


def test_picture(tmp_path):
    cells = summarize([prompt([BOTH, LOST]), prompt([NEITHER], "qa2"), prompt([BOTH], length=2000)])["cells"]
    plot_tasks(cells, tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")
