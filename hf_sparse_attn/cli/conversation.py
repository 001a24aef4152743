"""Questions about a long document, one after the other: it is read once and stays in one `SparseCache`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from hf_sparse_attn.cache import SparseCache, SparseLayer
from hf_sparse_attn.loading import library_errors
from hf_sparse_attn.tracing import input_device


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it took.

    Args:
        text: the answer.
        context: tokens of the conversation so far, this answer included.
        read: tokens that were read for it; those before were in the cache.
        reading_seconds: time to the first token.
        generated: tokens of the answer.
        ms_per_token: mean time of each further one; NaN for a single token.
    """

    text: str
    context: int
    read: int
    reading_seconds: float
    generated: int
    ms_per_token: float


class Conversation:
    """A chat whose earlier turns stay in the cache.

    Args:
        model: with attn_implementation="sparse", of a tokenizer with a chat template.
        tokenizer: its tokenizer.
        document: text that stands before the first question; "" for none.
        max_new_tokens: of each answer.

    Raises:
        ValueError: for a tokenizer without a chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        document: str = "",
        max_new_tokens: int = 200,
    ) -> None:
        check_chat_template(tokenizer)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._document = document
        self._messages: list[dict[str, str]] = []
        self.cache = SparseCache(model.config)
        self._cached: list[int] = []  # tokens whose keys the cache holds

    def ask(self, question: str, streamer: BaseStreamer | None = None) -> Answer:
        """The model's answer, greedy; `streamer` is shown its tokens as they come.

        After an error or Ctrl-C the question counts as not asked, and the next one reads the conversation anew.
        """
        try:
            return self._ask(question, streamer)
        except BaseException:
            self._forget()  # nobody knows how far the layers of the cache have come
            raise

    def _ask(self, question: str, streamer: BaseStreamer | None) -> Answer:
        begun = self._messages or not self._document
        text = question if begun else f"{self._document}\n\n{question}"
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        # An answer may be spelt in other tokens once it stands in the conversation, or be rewritten by the template.
        same = self._keep(_common_prefix(self._cached, ids[:-1]))
        clock = _Clock(streamer)
        start = time.perf_counter()
        inputs = torch.tensor([ids], device=input_device(self.model))
        output: Any = self.model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=self.cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=clock,
        )
        sequence = output[0].tolist()
        generated = len(sequence) - len(ids)
        self._cached = sequence[: self.cache.get_seq_length()]
        answer = str(self.tokenizer.decode(sequence[len(ids) :], skip_special_tokens=True)).strip()
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        first, last = clock.times[0], clock.times[-1]
        pace = 1e3 * (last - first) / (generated - 1) if generated > 1 else float("nan")
        return Answer(answer, len(sequence), len(ids) - same, first - start, generated, pace)

    def _keep(self, num_tokens: int) -> int:
        """Shorten the cache to its first tokens, or forget all where layers hold no more than a window or a state."""
        if num_tokens < len(self._cached):
            if all(isinstance(layer, SparseLayer) for layer in self.cache.layers):
                self.cache.crop(num_tokens - len(self._cached))
                self._cached = self._cached[:num_tokens]
            else:
                self._forget()
        return len(self._cached)

    def _forget(self) -> None:
        self.cache, self._cached = SparseCache(self.model.config), []


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether a model's tokenizer knows how a chat is written.

    Raises:
        ValueError: it does not, or its template cannot be used.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; take a model that was tuned for chat")
    with library_errors("the tokenizer's chat template"):
        messages = [{"role": "user", "content": "Hello"}]
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


class _Clock(BaseStreamer):
    """Notes when each token comes, and hands it on."""

    def __init__(self, streamer: BaseStreamer | None) -> None:
        self.streamer = streamer
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
