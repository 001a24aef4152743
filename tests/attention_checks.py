"""Checks of what the attention promises, shared by the tests and by the broken variants that must fail them."""

import dataclasses
import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_sparse_attn import SparseAttentionConfig, ops, record_density
from hf_sparse_attn.hashing import encode_calibrated_hash
from hf_sparse_attn.integration import observe
from hf_sparse_attn.ops import reference
from hf_sparse_attn.routing import layer_pattern

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-sliding": (MistralConfig, MistralForCausalLM, {"sliding_window": 14}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-mixed": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 14, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 2, 4, 2, 8, 64
# Every part of the pattern is in play at 40 tokens: window, globals, routed keys, pages.
SPARSE = {
    "window_size": 5,
    "num_global_tokens": 2,
    "key_budget": 4,
    "num_hash_bits": 2,
    "page_size": 4,
    "dense_below": 0,
}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def tiny_model(family="llama", implementation="sparse", dtype=torch.float64, **sparse):
    """A random model; the same weights for every attention implementation. `sparse` changes fields of SPARSE."""
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=NUM_HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=implementation,
        **extra,
    )
    if implementation == "sparse":
        config.sparse_attention = {**SPARSE, **sparse}
    torch.manual_seed(0)
    return model_class(config).to(dtype).eval()


def tokens(length, batch_size=1, seed=0):
    return torch.randint(1, VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def calibrated_hash_text(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, seed=0):
    """A calibrated hash of two codebooks of four codewords each, fitted to nothing."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_layers, num_kv_heads, head_dim, 2, 4, generator=generator)
    return encode_calibrated_hash(weight, torch.randn(num_layers, num_kv_heads, 2, 4, generator=generator))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def cached_logits(model, ids, sizes, cache=None):
    """Logits of a forward in pieces of the given sizes, the last one repeated to the end."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces, start = [], 0
    for size in (*sizes, *[sizes[-1]] * ids.shape[1]):
        if start == ids.shape[1]:
            break
        piece = ids[:, start : start + size]
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
        start += piece.shape[1]
    return torch.cat(pieces, 1)


def padded_batch(rows, side, extra):
    """Rows of unequal length in one batch, `extra` columns wider than the longest; ids, mask and position_ids."""
    width = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = row
        mask[i, columns] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def check_matches_reference(family="llama", length=40, **sparse):
    """The fast implementation gives the logits of the specification, which differ from dense attention's."""
    ids = tokens(length, 2)
    model, oracle = tiny_model(family, **sparse), tiny_model(family, **sparse)
    oracle.config.sparse_attention["implementation"] = "reference"
    expected = logits(oracle, ids)
    assert (expected - logits(tiny_model(family, "sdpa"), ids))[:, 20:].abs().amax() > 1e-2
    torch.testing.assert_close(logits(model, ids), expected, **TOLERANCE)


def check_full_coverage(family="llama", **sparse):
    """Rows that read everything, by way of the window, give the logits of dense attention."""
    ids = tokens(40, 2)
    model = tiny_model(family, **{"window_size": 60, **sparse})
    torch.testing.assert_close(logits(model, ids), logits(tiny_model(family, "sdpa"), ids), **TOLERANCE)


def check_chunks(family="llama", sizes=(7, 13), length=40, **sparse):
    """A forward in pieces with a cache gives the logits of one forward."""
    ids = tokens(length, 2)
    model = tiny_model(family, **sparse)
    torch.testing.assert_close(cached_logits(model, ids, sizes), logits(model, ids), **TOLERANCE)


def check_padding(family="llama", side="left", extra=3, **sparse):
    """Padded rows of several lengths in one batch give each row's own logits; padding gives finite numbers.

    Under position_ids as `generate` makes them, and under those of the columns, which do not show the padding.
    """
    model = tiny_model(family, **sparse)
    rows = [tokens(length, seed=length)[0] for length in (40, 33, 1)]
    ids, mask, positions = padded_batch(rows, side, extra)
    for position_ids in (positions, torch.arange(ids.shape[1]).expand_as(ids)):
        together = logits(model, ids, attention_mask=mask, position_ids=position_ids)
        assert together.isfinite().all()
        for i, row in enumerate(rows):
            columns = mask[i].bool()
            alone = logits(model, row[None], position_ids=position_ids[i, columns][None])[0]
            torch.testing.assert_close(together[i][columns], alone, **TOLERANCE)


def check_packed(family="llama", **sparse):
    """Documents packed into one row, told apart by position_ids, give each document's own logits."""
    model = tiny_model(family, **sparse)
    rows = [tokens(length, seed=length)[0] for length in (21, 1, 38)]
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    together = logits(model, torch.cat(rows)[None], position_ids=position_ids)[0]
    for part, row in zip(together.split([len(row) for row in rows]), rows, strict=True):
        torch.testing.assert_close(part, logits(model, row[None])[0], **TOLERANCE)


def check_later_tokens(family="llama", length=44, **sparse):
    """Changing the tokens from any place on changes no earlier logit, to the last bit."""
    model = tiny_model(family, **sparse)
    ids = tokens(length)
    before = logits(model, ids)
    for cut in (1, 6, 21, 32, length - 1):
        changed = ids.clone()
        changed[:, cut:] = changed[:, cut:] % (VOCABULARY - 1) + 1
        after = logits(model, changed)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


def check_gradients(family="llama", **sparse):
    """Gradients of all weights are those of the specification."""
    gradients = []
    for implementation in ("torch", "reference"):
        model = tiny_model(family, implementation="sparse", **sparse)
        model.config.sparse_attention["implementation"] = implementation
        ids = tokens(40, seed=1)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, **TOLERANCE)


def check_density(family="llama", length=40, **sparse):
    """The recorded pairs are those that the specification counts from the model's own queries and keys."""
    model = tiny_model(family, **sparse)
    model_window = getattr(model.config, "sliding_window", None)
    windows = [getattr(layer.self_attn, "sliding_window", model_window) for layer in model.model.layers]
    attended = admissible = 0

    def count(observed, query, key, value, scaling):
        nonlocal attended, admissible
        layer_idx = observed.layer_idx
        assert observed.sliding_window == windows[layer_idx]
        config = SparseAttentionConfig.from_dict(model.config.sparse_attention)
        pattern = make_pattern(config, query.shape[1], key.shape[1], key.shape[-1], layer_idx, windows[layer_idx])
        for q, k in zip(query, key, strict=True):
            attended += int(reference.attended_keys(q, k, pattern, 0).sum())
        for p in range(length):
            admissible += query.shape[0] * query.shape[1] * min(p + 1, windows[layer_idx] or length)

    with observe(model, count), record_density(model) as recorder:
        logits(model, tokens(length, 2))
    assert 0 < attended < admissible
    assert (recorder.attended, recorder.admissible) == (attended, admissible)
    assert recorder.density == attended / admissible


# One of each kind, quick enough to be run against every broken variant.
CHECKS = {
    "reference": check_matches_reference,
    "reference-sliding": functools.partial(check_matches_reference, "mistral-sliding"),
    "full-coverage": check_full_coverage,
    "chunks": check_chunks,
    "left-padding": check_padding,
    "right-padding": functools.partial(check_padding, side="right"),
    "packed": check_packed,
    "later-tokens": check_later_tokens,
    "gradients": check_gradients,
    "density": check_density,
}


def make_pattern(config, num_heads, num_kv_heads, head_dim, layer_idx=0, sliding_window=None, dtype=torch.float64):
    return layer_pattern(
        config, layer_idx, num_heads, num_kv_heads, head_dim, torch.device("cpu"), dtype, sliding_window
    )


class KeyMask:
    """A recorder that writes down S(row) as a boolean mask and refuses a key that is read twice."""

    def __init__(self, num_heads, num_queries, num_keys, query_offset=0, key_offset=0):
        self.count = torch.zeros(num_heads, num_queries, num_keys, dtype=torch.int64)
        self.query_offset, self.key_offset = query_offset, key_offset

    def add(self, pattern, head, position, attended, keys):
        row, column = attended.nonzero(as_tuple=True)
        keys = keys()[row, column] - self.key_offset
        assert (keys >= 0).all()
        assert (keys < self.count.shape[-1]).all()
        ones = torch.ones_like(keys)
        self.count[head].index_put_((position[row] - self.query_offset, keys), ones, accumulate=True)

    def add_dense(self, pattern, heads, start, stop):
        position = torch.arange(start, stop)[:, None]
        key = torch.arange(self.count.shape[-1]) + self.key_offset
        admissible = key <= position
        if pattern.sliding_window is not None:
            admissible &= key > position - pattern.sliding_window
        self.count[heads.start : heads.stop, start - self.query_offset : stop - self.query_offset] += admissible

    @property
    def mask(self):
        assert self.count.max() <= 1, "a row reads a key twice"
        return self.count.bool()


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage, in bytes, that any operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def attend(query, key, value, pattern, implementation="torch", query_offset=None, key_offset=0, recorder=None):
    """`ops.document_attention` with an implementation of one's choice; the last query at the last key."""
    pattern = dataclasses.replace(pattern, config=pattern.config.replace(implementation=implementation))
    return ops.document_attention(
        query,
        key,
        value,
        pattern=pattern,
        query_offset=key_offset + key.shape[1] - query.shape[1] if query_offset is None else query_offset,
        key_offset=key_offset,
        scaling=0.4,
        recorder=recorder,
    )
