import copy

import pytest
import torch
from helpers.chat import TEMPLATE
from helpers.families import tiny_model
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.generation.streamers import BaseStreamer

from hf_sparse_attn.cli.conversation import Conversation

DOCUMENT = "The lamp is in the attic. " * 4


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model():
    model = tiny_model(dense_below=20)
    model.resize_token_embeddings(256)
    return model


def plain_answer(model, tokenizer, messages, num_tokens):
    """Without any cache."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()


def test_each_turn_is_answered_as_if_all_were_read_anew(model, chat_tokenizer):
    conversation, messages = Conversation(model, chat_tokenizer, DOCUMENT, max_new_tokens=12), []
    for question in ("Where is the lamp?", "Who put it there?", "When?"):
        text = f"{DOCUMENT}\n\n{question}" if not messages else question
        messages.append({"role": "user", "content": text})
        answer = conversation.ask(question)
        assert answer.text == plain_answer(model, chat_tokenizer, messages, 12)
        messages.append({"role": "assistant", "content": answer.text})
        assert answer.generated == 12
        assert answer.reading_seconds > 0
        assert answer.ms_per_token > 0


def test_the_document_is_read_once(model, chat_tokenizer):
    conversation = Conversation(model, chat_tokenizer, DOCUMENT, max_new_tokens=4)
    first, second = (conversation.ask(question) for question in ("Where is the lamp?", "Who put it there?"))
    assert first.read > len(DOCUMENT)
    assert second.read < 60
    assert second.context > first.context


def test_without_a_document(model, chat_tokenizer):
    answer = Conversation(model, chat_tokenizer, max_new_tokens=1).ask("Why?")
    assert answer.read == len("[user]Why?[assistant]")
    assert answer.generated == 1
    assert answer.ms_per_token != answer.ms_per_token  # of one token there is no pace


def test_a_tokenizer_without_a_template(model, tiny_tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, tiny_tokenizer)


@pytest.fixture
def sliding_model():
    config = MistralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=32,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sparse").eval()


@pytest.mark.parametrize("name", ["model", "sliding_model"])
def test_template_that_rewrites_earlier_turns(request, chat_tokenizer, name):
    """All is read anew where the layers no longer hold what stands before the change."""
    model = request.getfixturevalue(name)
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }} A:{% else %}{{ m.content[:2] }} {% endif %}"
        "{% endfor %}"
    )
    conversation, messages = Conversation(model, chat_tokenizer, DOCUMENT, max_new_tokens=12), []
    for question in ("Where is the lamp?", "Who put it there?", "When?"):
        messages.append({"role": "user", "content": f"{DOCUMENT}\n\n{question}" if not messages else question})
        answer = conversation.ask(question)
        assert answer.text == plain_answer(model, chat_tokenizer, messages, 12)
        messages.append({"role": "assistant", "content": answer.text})
    assert (answer.read > len(DOCUMENT)) == (name == "sliding_model")


class Interrupting(BaseStreamer):
    """Ends the answer after some tokens."""

    def __init__(self, error):
        self.error, self.seen = error, 0

    def put(self, value):
        self.seen += 1
        if self.seen > 3:
            raise self.error

    def end(self):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no room")], ids=["interrupted", "failed"])
@pytest.mark.parametrize("turn", [0, 1])
def test_conversation_goes_on_after_a_question_that_failed(model, chat_tokenizer, error, turn):
    conversation, untroubled = (Conversation(model, chat_tokenizer, DOCUMENT, max_new_tokens=8) for _ in range(2))
    for index, question in enumerate(("Where is the lamp?", "Who put it there?", "When?")):
        if index == turn:
            with pytest.raises(type(error)):
                conversation.ask("Why?", Interrupting(error))
        assert conversation.ask(question).text == untroubled.ask(question).text


def test_a_template_that_cannot_be_used(model, chat_tokenizer):
    for template in ("{% for m in", "{{ raise_exception('never') }}"):
        chat_tokenizer.chat_template = template
        with pytest.raises(ValueError, match="the tokenizer's chat template cannot be read"):
            Conversation(model, chat_tokenizer)
