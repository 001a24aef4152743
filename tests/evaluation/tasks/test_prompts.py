"""Each task's texts and questions, looked at as somebody would who checks them by hand."""

import random
import re
from collections import Counter

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_sparse_attn.evaluation.tasks import TASKS, Haystack, Vocabulary, needles, prompt_of
from hf_sparse_attn.evaluation.tasks.variables import interleaved
from hf_sparse_attn.evaluation.tasks.words import RATIO

LENGTH = 4000
LISTS = ("common_words", "frequent_words")


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer):
    return Vocabulary(tiny_tokenizer)


@pytest.fixture(scope="module")
def haystack():
    """Lines of many lengths; no word of them is an answer."""
    return Haystack([(str(i), " ".join(f"line {n * n} of text {i}." for n in range(900))) for i in range(2)])


@pytest.fixture(scope="module")
def prompts(vocabulary, haystack):
    return {task: [prompt_of(task, LENGTH, sample, vocabulary, haystack) for sample in range(3)] for task in TASKS}


def of(prompts, task):
    return [(prompt, question) for prompt in prompts[task] for question in prompt.questions]


@pytest.mark.parametrize("task", TASKS)
def test_the_longest_prompt_has_exactly_the_length(prompts, tiny_tokenizer, task):
    for prompt in prompts[task]:
        lengths = [
            len(tiny_tokenizer(prompt.text + question.text + answer)["input_ids"])
            for question in prompt.questions
            for answer in question.alternatives[:2]
        ]
        assert max(lengths) == LENGTH


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_those_of_the_text(prompts, tiny_tokenizer, task):
    for prompt in prompts[task]:
        assert prompt.text.endswith("\n")
        for question, tokens, answers in zip(prompt.questions, prompt.question_ids, prompt.answer_ids, strict=True):
            assert len(answers) == len(question.alternatives)
            for answer, text in zip(answers, question.alternatives, strict=True):
                whole = tiny_tokenizer(prompt.text + question.text + text)["input_ids"]
                assert [*prompt.input_ids, *tokens, *answer] == whole


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_prompt_and_another_one_another(prompts, vocabulary, haystack, task):
    assert prompt_of(task, LENGTH, 1, vocabulary, haystack) == prompts[task][1]
    texts = {prompt.text for prompt in prompts[task]}
    texts.add(prompt_of(task, LENGTH, 1, vocabulary, haystack, seed=5).text)
    assert len(texts) == 4
    assert len({tuple(tuple(question.right) for question in prompt.questions) for prompt in prompts[task]}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_alternatives_differ_and_right_ones_stand_in_the_text(prompts, task):
    for prompt, question in of(prompts, task):
        assert len(set(question.alternatives)) == len(question.alternatives)
        assert 0 < question.chance < 0.6
        for answer in question.right:
            assert re.search(rf"\b{answer.strip()}\b", prompt.text)
            assert answer not in question.text  # it would be repeated
        present = [bool(re.search(rf"\b{answer.strip()}\b", prompt.text)) for answer in question.alternatives]
        # To find what stands in the text is no better than chance says.
        assert len(question.right) / sum(present) <= question.chance + 1e-9


@pytest.mark.parametrize("task", [task for task in TASKS if task not in LISTS])
def test_the_haystack_is_what_lies_between_the_facts(prompts, haystack, task):
    for prompt in prompts[task]:
        rest = [line for line in prompt.text.split("\n\n", 1)[1].split("\n") if "line" in line]
        assert sum(map(len, rest)) > 0.4 * len(prompt.text)
        assert all(line in haystack.text for line in rest)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in (*LISTS, "niah_multivalue")])
def test_facts_lie_anywhere(vocabulary, haystack, task):
    depths = [depth for sample in range(12) for depth in prompt_of(task, 4500, sample, vocabulary, haystack).depths]
    assert min(depths) < 0.35
    assert max(depths) > 0.8
    assert len(set(depths)) > 40


def test_depth_is_where_the_fact_is(prompts):
    for prompt in prompts["niah_multikey"]:
        for question, depth in zip(prompt.questions, prompt.depths, strict=True):
            key = re.search(r"word of (.*)\?", question.text)[1]
            assert prompt.text.index(f"The special magic word of {key} is:") == round(depth * len(prompt.text))


def test_single_facts_are_stated_once(prompts):
    for prompt, question in of(prompts, "niah_single"):
        statement = question.text.rsplit("Answer: ", 1)[1]
        assert prompt.text.count(f"\n{statement}{question.right[0]}.\n") == 1
        assert prompt.text.count(statement) == 1
        assert question.chance == 1 / 16


@pytest.mark.parametrize("task", ["niah_multikey", "niah_multiquery"])
def test_a_key_has_its_own_value(prompts, task):
    for prompt, question in of(prompts, task):
        statement = question.text[question.text.rindex("The special magic word of") :]
        assert prompt.text.count(f"\n{statement}{question.right[0]}.\n") == 1
        assert len(question.alternatives) == 16
        assert len(re.findall("The special magic word of", prompt.text)) == 16


def test_multiquery_answers_what_was_asked_before(prompts):
    for prompt in prompts["niah_multiquery"]:
        for first, second in zip(prompt.questions[:3], prompt.questions[1:4], strict=True):
            assert second.text.startswith(f"{first.text}{first.right[0]}. The special")


def test_all_values_of_a_key_are_right_until_they_are_listed(prompts):
    for prompt, question in of(prompts, "niah_multivalue"):
        key = re.search(r"words of (.*)\?", question.text)[1]
        stated = set(re.findall(rf"One of the special magic words of {key} is: (\w+)\.", prompt.text))
        known = set(re.findall(r" (\w+),", question.text))
        assert len(stated) == 4
        assert known < stated
        assert {answer.strip() for answer in question.right} == stated - known
        assert not {answer.strip() for answer in question.wrong} & stated
        assert len(question.wrong) == 12


def test_variables_of_a_chain(prompts):
    """Follow the assignments as they stand in the text."""
    for prompt, question in of(prompts, "variable_tracking"):
        values = {}
        for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", prompt.text, re.MULTILINE):
            values[name] = values.get(value, value)
        asked = re.search(r"assigned the value (\d+)", question.text)[1]
        holding = {name for name, value in values.items() if value == asked}
        known = set(re.findall(r" (\w+),", question.text))
        assert len(holding) == 5
        assert 1 <= len(known) <= 4
        assert {answer.strip() for answer in question.right} == holding - known
        assert {answer.strip() for answer in question.wrong} == set(values) - holding


def test_common_words_are_the_most_common_ones(prompts):
    for prompt, question in of(prompts, "common_words"):
        words = re.findall(r"(\d+)\. (\w+)", prompt.text.split("\n\n")[-1])
        assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
        counts = Counter(word for _, word in words)
        top = {word for word, _ in counts.most_common(10)}
        known = set(re.findall(r" (\w+),", question.text))
        assert {answer.strip() for answer in question.right} == top - known
        least = {counts[answer.strip()] for answer in question.wrong}
        assert len(least) == 1
        assert {counts[word] for word in top} == {RATIO * least.pop()}


def test_frequent_words_are_the_most_frequent_ones(prompts):
    for prompt in prompts["frequent_words"]:
        counts = Counter(prompt.text.split("\n\n")[-1].split())
        assert counts.most_common(1)[0][0] == "..."
        top = {word for word, _ in counts.most_common(4)} - {"..."}
        listed = []
        for question in prompt.questions:
            known = frozenset(re.findall(r" (\w+),", question.text))
            listed.append(known)
            assert {answer.strip() for answer in question.right} == top - known
            assert all(0 < counts[answer.strip()] < min(counts[word] for word in top) for answer in question.wrong)
        assert len(set(listed)) == 7


def test_people_are_where_they_went_last(prompts):
    for prompt, question in of(prompts, "qa1"):
        person = re.search(r"Where is (\w+)\?", question.text)[1]
        places = re.findall(rf"^{person} \w+ to the (\w+)\.$", prompt.text, re.MULTILINE)
        assert len(places) == 3
        assert question.right == [f" {places[-1]}"]


def test_objects_are_where_they_were_carried(prompts):
    """Play the story."""
    dropped = 0
    for prompt, question in of(prompts, "qa2"):
        asked = re.search(r"Where is the (\w+)\?", question.text)[1]
        place_of, carrier, place = {}, None, None
        for person, verb, thing in re.findall(r"^(\w+) ([a-z ]+) the (\w+)\.$", prompt.text, re.MULTILINE):
            if verb.endswith("to"):
                place_of[person] = thing
            elif thing == asked and carrier is None and place is None:
                carrier = person
            elif thing == asked:
                place, carrier = place_of[person], None
        dropped += place is not None
        assert question.right == [f" {place or place_of[carrier]}"]
    assert dropped == 12


def test_interleaving_keeps_each_order():
    found = interleaved(random.Random(0), ["abc", "de", "f"])
    assert sorted(found) == list("abcdef")
    assert "".join(found).replace("d", "").replace("e", "").replace("f", "") == "abc"
    assert len({"".join(interleaved(random.Random(seed), ["abc", "de", "f"])) for seed in range(50)}) > 10


@pytest.mark.parametrize("task", TASKS)
def test_a_text_that_is_too_short(vocabulary, haystack, task):
    with pytest.raises(ValueError, match="too short for"):
        prompt_of(task, 500, 0, vocabulary, haystack)


def test_too_few_documents(vocabulary):
    with pytest.raises(ValueError, match=r"more than its documents have: \d+ tokens"):
        prompt_of("qa1", LENGTH, 0, vocabulary, Haystack([("short", "A few words. " * 50)]))


def test_a_tokenizer_that_changes_what_was_read(tiny_tokenizer, haystack):
    class Rewriting(Vocabulary):
        def whole(self, text):
            return super().whole(text)[: 4 * (len(text) // 4)]

    with pytest.raises(ValueError, match=r"splits a text in another way when more follows|no text has exactly"):
        prompt_of("qa1", LENGTH, 0, Rewriting(tiny_tokenizer), haystack)


def test_alike_takes_the_smallest_number_of_tokens(vocabulary):
    assert vocabulary.alike(["abc", "ab", "bc", "a", "cde"], 2) == ["ab", "bc"]
    with pytest.raises(ValueError, match="does not split 4 of the words"):
        vocabulary.alike(["abc", "ab", "bc", "a", "cde"], 4)


def test_words_that_a_tokenizer_does_not_know_are_not_asked_for(haystack):
    """They all are the same token, so that any answer would be as likely as any other."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, ":": 1, "tiger": 2, "piano": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert vocabulary.alike(["zebra", "tiger", "lion", "piano"], 2) == ["tiger", "piano"]
    for task in TASKS:
        with pytest.raises(ValueError, match="apart"):
            prompt_of(task, LENGTH, 0, vocabulary, haystack)


def test_keys_share_no_word():
    keys = needles._keys(random.Random(0), 16)
    parts = [part for key in keys for part in key.replace(" of ", " ").split()]
    assert len(set(parts)) == len(parts) == 48
