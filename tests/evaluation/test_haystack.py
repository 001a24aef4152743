import pytest

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.evaluation import haystack
from hf_sparse_attn.evaluation.haystack import comparable_words, hide_needles, make_contexts

WINDOW, GLOBALS = 40, 9


@pytest.fixture(scope="module")
def document(tiny_tokenizer):
    text = " ".join(f"line {number} of the haystack." for number in range(200))
    return {"name": "haystack", "input_ids": tiny_tokenizer(text)["input_ids"]}


def hide(document, tokenizer, length, depths, seed="0"):
    return hide_needles(
        document, tokenizer, length, depths, num_globals=GLOBALS, window_size=WINDOW, seed=seed, task="several"
    )


@pytest.mark.parametrize("length", [1000, 1301])
def test_facts_are_at_their_depths_and_nothing_else_is_changed(document, tiny_tokenizer, length):
    context = hide(document, tiny_tokenizer, length, [0, 0.5, 1])
    rest, end = [], 0
    for needle in context.needles:
        fact = tiny_tokenizer.decode(context.input_ids[needle.start : needle.end])
        assert fact == 3 * f"\nSecret word of {needle.key}: {needle.answer}" + "\n"
        assert tiny_tokenizer.decode(needle.question) == f"\nSecret word of {needle.key}:"
        assert tiny_tokenizer.decode(needle.alternatives[0]) == f" {needle.answer}"
        rest += context.input_ids[end : needle.start]
        end = needle.end
    rest += context.input_ids[end:]
    assert rest == document["input_ids"][: len(rest)]

    first, middle, last = context.needles
    question = len(context.input_ids)
    longest = max(needle.end - needle.start for needle in context.needles)
    assert first.start == GLOBALS
    assert last.start + longest == question - WINDOW + 1
    assert middle.start == pytest.approx((first.start + last.start) / 2, abs=1)


def test_the_longest_prompt_with_its_answer_has_the_context_length(document, tiny_tokenizer):
    context = hide(document, tiny_tokenizer, 1000, [0, 0.5, 1])
    prompts = [len(context.input_ids + needle.question + needle.alternatives[0]) for needle in context.needles]
    assert max(prompts) == context.context_length == 1000


@pytest.mark.parametrize("seed", range(5))
def test_no_row_of_a_question_reads_a_fact_through_globals_or_window(document, tiny_tokenizer, seed):
    context = hide(document, tiny_tokenizer, 2000, [0, 0, 1, 1], seed=str(seed))
    for needle in context.needles:
        prompt = len(context.input_ids + needle.question + needle.alternatives[0])
        for row in range(len(context.input_ids), prompt):
            static = {*range(GLOBALS), *range(row - WINDOW + 1, row + 1)}
            assert static.isdisjoint(range(needle.start, needle.end))


def test_facts_of_one_depth_follow_one_another_with_text_between(document, tiny_tokenizer):
    needles = hide(document, tiny_tokenizer, 2000, [0.25, 0.75, 0.25]).needles
    assert [needle.depth for needle in needles] == [0.25, 0.25, 0.75]
    longest = max(needle.end - needle.start for needle in needles)
    assert needles[1].start - needles[0].start == longest + haystack.GAP
    assert needles[1].end < needles[2].start


def test_alternatives_are_the_other_facts_and_words_like_them(document, tiny_tokenizer):
    context = hide(document, tiny_tokenizer, 2000, [0, 0.3, 0.6, 1])
    answers = {needle.answer for needle in context.needles}
    assert len(answers) == len({needle.key for needle in context.needles}) == 4
    for needle in context.needles:
        words = [tiny_tokenizer.decode(tokens) for tokens in needle.alternatives]
        assert words[0] == f" {needle.answer}"
        assert len(words) == len(set(words)) == haystack.NUM_ALTERNATIVES
        assert {f" {answer}" for answer in answers} <= set(words)
        assert len({len(tokens) for tokens in needle.alternatives}) == 1


def test_words_have_the_smallest_number_of_tokens_that_enough_have(tiny_tokenizer):
    words = comparable_words(tiny_tokenizer, "Anna", 20)
    assert {len(word) for word in words} == {6}, "one token a byte: 6 letters are the commonest"
    assert all(tiny_tokenizer.decode(tokens) == f" {word}" for word, tokens in words.items())
    assert {len(word) for word in comparable_words(tiny_tokenizer, "Anna", 5)} == {5}
    with pytest.raises(ValueError, match="does not split 50 of the words"):
        comparable_words(tiny_tokenizer, "Anna", 50)


def contexts(document, tokenizer, length=1200, depths=(0, 1), **arguments):
    config = SparseAttentionConfig(window_size=WINDOW, num_global_tokens=GLOBALS, dense_below=100)
    return make_contexts([document, document], tokenizer, length, depths, config, **arguments)


def test_the_seed_decides(document, tiny_tokenizer):
    first, again = (contexts(document, tiny_tokenizer, num_samples=3, num_single=1, seed=5) for _ in range(2))
    other = contexts(document, tiny_tokenizer, num_samples=3, num_single=1, seed=6)
    assert first == again
    assert len({tuple(context.input_ids) for context in first + other}) == len(first + other)


def test_samples_of_several_facts_and_of_a_single_one(document, tiny_tokenizer):
    made = contexts(document, tiny_tokenizer, num_samples=2, needles_per_depth=2, num_single=3)
    assert [context.task for context in made] == ["several"] * 2 + ["single"] * 6
    assert [[needle.depth for needle in context.needles] for context in made] == [[0, 0, 1, 1]] * 2 + [[0], [1]] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 400}, "too short for 2 facts"),
        ({"depths": (0.5, 0.501)}, "too short for 2 facts"),
        ({"length": 30}, "too short for 2 facts of .* 0 tokens"),
        ({"needles_per_depth": 20}, "at most 38 facts"),
    ],
    ids=["too short", "too close", "shorter than the question", "too many"],
)
def test_facts_that_do_not_fit_are_refused(document, tiny_tokenizer, arguments, words):
    with pytest.raises(ValueError, match=words):
        contexts(document, tiny_tokenizer, num_samples=1, **arguments)


def test_questions_that_would_read_everything_are_refused(document, tiny_tokenizer):
    config = SparseAttentionConfig(window_size=WINDOW, num_global_tokens=GLOBALS, dense_below=1200)
    with pytest.raises(ValueError, match=r"must be at least 12.*dense_below=1200") as refused:
        make_contexts([document], tiny_tokenizer, 1200, [0, 1], config, num_samples=1)
    enough = int(str(refused.value).split(":")[0].split()[-1])
    (context,) = make_contexts([document], tiny_tokenizer, enough, [0, 1], config, num_samples=1)
    assert len(context.input_ids) >= 1200 - 20
