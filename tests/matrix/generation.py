"""Paths through `generate`: each chosen token and its logits are those of the specification."""

import torch
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.specification import specified

from hf_sparse_attn import SparseCache
from matrix.caches import new_sparse_static

STEPS = 9


def check_greedy(family, rows, new_cache=None, **options):
    """Rows of one batch, padded on the left where they differ in length."""
    ids, mask, _ = padded_batch(rows, "left", 0)
    model = tiny_model(family)
    if new_cache is not None:
        options["past_key_values"] = new_cache(model.config)
    output = generate(model, ids, mask, **options)
    assert_specified_steps(output, family, rows)
    for row_steps, sequence in zip(torch.stack(output.logits, 1), output.sequences, strict=True):
        assert torch.equal(row_steps.argmax(-1), sequence[ids.shape[1] :])


def assert_specified_steps(output, family, rows):
    """The logits of every step are the specification's for the tokens before it."""
    for row, sequence, row_steps in zip(rows, output.sequences, torch.stack(output.logits, 1), strict=True):
        steps = len(row_steps)
        expected = specified(family, torch.cat([row, sequence[-steps:]])[:-1])[-steps:]
        torch.testing.assert_close(row_steps.double(), expected, rtol=1e-5, atol=1e-5)  # generate keeps float32


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    defaults = {"do_sample": False, "output_logits": True, "max_new_tokens": STEPS, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, **{**defaults, **options})


def greedy(family):
    """Greedy search, with a dynamic cache, prompts of one length."""
    check_greedy(family, list(tokens(21, 2)))


def greedy_static(family):
    """Greedy search, with `StaticCache` and `SparseStaticCache`."""
    check_greedy(family, list(tokens(21, 2)), cache_implementation="static")
    check_greedy(family, list(tokens(21, 2)), new_cache=new_sparse_static)


def greedy_padded(family):
    """Greedy search over prompts of several lengths, padded on the left; dynamic, static and sparse static cache."""
    rows = [tokens(length, seed=length)[0] for length in (23, 13, 2)]
    for cache in ("dynamic", "static"):
        check_greedy(family, rows, cache_implementation=cache)
    check_greedy(family, rows, new_cache=new_sparse_static)


def prefill_in_chunks(family):
    """Greedy search with `prefill_chunk_size`, dynamic and static cache."""
    for cache in ("dynamic", "static"):
        check_greedy(family, list(tokens(21, 2)), cache_implementation=cache, prefill_chunk_size=8)


def sampling(family):
    """Sampling with a seed draws the tokens that the specification's probabilities give."""
    model, ids = tiny_model(family), tokens(21, 2)
    torch.manual_seed(1)
    output = generate(model, ids, do_sample=True, top_k=0, max_new_tokens=5)
    assert_specified_steps(output, family, ids)
    draws = torch.Generator().manual_seed(1)
    for step, tokens_of_step in zip(output.logits, output.sequences[:, 21:].T, strict=True):
        assert torch.equal(torch.multinomial(step.softmax(-1), 1, generator=draws)[:, 0], tokens_of_step)


def beams(family):
    """Beam search finds the beams, and their scores, that it finds with the specification and without a cache."""
    ids = tokens(21)
    model = tiny_model(family)
    options = {"num_beams": 3, "max_new_tokens": 5, "num_return_sequences": 3, "output_scores": True}
    oracle = tiny_model(family)
    oracle.config.sparse_attention["implementation"] = "reference"
    expected = generate(oracle, ids, use_cache=False, **options)
    for cache in ({}, {"past_key_values": SparseCache(model.config)}):
        found = generate(model, ids, **options, **cache)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


def prompt_lookup(family):
    """Greedy search that verifies several tokens found in the prompt at once."""
    check_greedy(family, list(tokens(5).repeat(1, 5)), prompt_lookup_num_tokens=3)


def assisted(family):
    """Greedy search that verifies the tokens of an assistant of the same family, of which some are wrong."""
    assistant = tiny_model(family, window_size=2, key_budget=1)
    check_greedy(family, list(tokens(21)), assistant_model=assistant)


def greedy_sparse(family):
    """Greedy search with `SparseCache`: prompts of one length and of several, in chunks, and with tokens of the prompt
    or of an assistant verified."""
    check_greedy(family, list(tokens(21, 2)), new_cache=SparseCache)
    check_greedy(family, [tokens(length, seed=length)[0] for length in (23, 13, 2)], new_cache=SparseCache)
    check_greedy(family, list(tokens(21, 2)), new_cache=SparseCache, prefill_chunk_size=8)
    check_greedy(family, list(tokens(5).repeat(1, 5)), new_cache=SparseCache, prompt_lookup_num_tokens=3)
    assistant = tiny_model(family, window_size=2, key_budget=1)
    check_greedy(family, list(tokens(21)), new_cache=SparseCache, assistant_model=assistant)


PATHS = {
    "greedy": greedy,
    "greedy, static cache": greedy_static,
    "greedy, left padding": greedy_padded,
    "greedy, sparse cache": greedy_sparse,
    "prefill_chunk_size": prefill_in_chunks,
    "sampling": sampling,
    "beam search": beams,
    "prompt lookup": prompt_lookup,
    "assisted": assisted,
}
