"""Checks of what the attention promises, shared by the tests and by the broken variants that must fail them."""

import contextlib
import copy
import dataclasses
import functools
import json
from itertools import pairwise
from unittest import mock

import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hf_sparse_attn import SparseAttentionConfig, ops, record_density
from hf_sparse_attn.hashing import BucketHash, encode_calibrated_hash
from hf_sparse_attn.integration import observe
from hf_sparse_attn.ops import reference
from hf_sparse_attn.ops.numba import index as numba_index
from hf_sparse_attn.patterns import layer_pattern

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 2, 4, 2, 8, 64
ONE_LAYER_OF_EACH = {"sliding_window": 14, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**ONE_LAYER_OF_EACH, "head_dim": HEAD_DIM, "query_pre_attn_scalar": 5, "tie_word_embeddings": False}
# batched_mm: the experts' default kernel does not take float64.
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": None}),
    "mistral-sliding": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 14}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "qwen2-mixed": (
        hf.Qwen2Config,
        hf.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 14, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": HEAD_DIM}),
    "phi3": (
        hf.Phi3Config,
        hf.Phi3ForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-sliding": (hf.Phi3Config, hf.Phi3ForCausalLM, {"sliding_window": 14}),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {**GEMMA, "attn_logit_softcapping": 3.0}),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, GEMMA),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, EXPERTS),
    "gpt_oss": (
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        {**ONE_LAYER_OF_EACH, **EXPERTS, "head_dim": HEAD_DIM, "rope_parameters": YARN},
    ),
}
# Every part of the pattern is in play at 40 tokens: window, globals, routed keys, pages.
SPARSE = {
    "window_size": 5,
    "num_global_tokens": 2,
    "key_budget": 6,
    "min_weight": 0.03,
    "num_hash_bits": 2,
    "page_size": 4,
    "dense_below": 0,
}
SCALING = 0.4  # of `attend`
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
        **copy.deepcopy(extra),
    )
    if implementation == "sparse":
        config.sparse_attention = {**SPARSE, **sparse}
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_(0, 0.3)  # padding's is zero: no bucket of a zero query is best
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # as large as the scores' own logsumexp, so that they take half of the mass
                parameter.normal_(3.0)
            elif parameter.ndim == 1:  # biases start at zero and norms at one
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


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
    """Rows of unequal length in one batch, `extra` columns wider than the longest; ids, mask and position_ids.

    side: "left", "right", or "mixed": every row starts somewhere else, with padding on both sides.
    """
    width = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        padding = width - len(row)
        start = {"left": padding, "right": 0, "mixed": padding * (i + 1) // (len(rows) + 1)}[side]
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def packed_documents(lengths=(21, 1, 38)):
    """Documents to be packed into one row, and the position_ids [1, tokens] that tell them apart."""
    rows = [tokens(length, seed=length)[0] for length in lengths]
    return rows, torch.cat([torch.arange(length) for length in lengths])[None]


@functools.cache
def cached_specification(family, ids, position_ids, own_window, fields):
    model = tiny_model(family, **json.loads(fields))
    model.config.sparse_attention["implementation"] = "reference"
    if not own_window:
        for layer in model.model.layers:
            holder = layer.self_attn if hasattr(layer.self_attn, "sliding_window") else model.config
            holder.sliding_window = None
    row = torch.tensor([ids])
    # Under a mask, position_ids do not say what is packed.
    return logits(model, row, position_ids=torch.tensor([position_ids]), attention_mask=torch.ones_like(row))[0]


def specified(family, ids, position_ids=None, own_window=True, **sparse):
    """Logits [tokens, vocabulary] of a document `ids` [tokens] alone, in one plain forward of the specification.

    own_window: whether the sliding windows of the family itself hold.
    """
    position_ids = range(len(ids)) if position_ids is None else position_ids.tolist()
    return cached_specification(family, tuple(ids.tolist()), tuple(position_ids), own_window, json.dumps(sparse))


def assert_specified(found, family, ids, position_ids=None, **options):
    """`found` [tokens, vocabulary] are the specification's logits of a document, or of its last tokens."""
    torch.testing.assert_close(found, specified(family, ids, position_ids, **options)[-len(found) :], **TOLERANCE)


def assert_each_specified(found, family, rows, **options):
    """`found` [1, tokens, vocabulary] holds each document's own logits, one after another."""
    for part, row in zip(found[0].split([len(row) for row in rows]), rows, strict=True):
        assert_specified(part, family, row, **options)


@contextlib.contextmanager
def softmax_in_float64():
    """Keep the softmax that models ask for in float32 in the dtype of its input."""
    softmax = torch.nn.functional.softmax
    with mock.patch("torch.nn.functional.softmax", lambda scores, dim=None, dtype=None: softmax(scores, dim)):
        yield


def dense_logits(family, ids, **kwargs):
    """Logits of the family's own eager attention, its softmax in float64."""
    with softmax_in_float64():
        return logits(tiny_model(family, "eager"), ids, **kwargs)


def check_matches_reference(family="llama", length=40, **sparse):
    """The fast implementation gives the logits of the specification, which differ from dense attention's."""
    ids = tokens(length, 2)
    expected = torch.stack([specified(family, row, **sparse) for row in ids])
    assert (expected - dense_logits(family, ids))[:, 20:].abs().amax() > 1e-2
    torch.testing.assert_close(logits(tiny_model(family, **sparse), ids), expected, **TOLERANCE)


def check_full_coverage(family="llama", **sparse):
    """Rows that read everything, by way of the window, give the logits of the family's own dense attention."""
    ids = tokens(40, 2)
    model = tiny_model(family, **{"window_size": 60, **sparse})
    with softmax_in_float64():
        ours = logits(model, ids)
    torch.testing.assert_close(ours, dense_logits(family, ids), **TOLERANCE)


def check_chunks(
    family="llama", sizes=(7, 13), length=40, new_cache=lambda config: DynamicCache(config=config), **sparse
):
    """A forward in pieces with a cache gives the logits of the specification."""
    ids = tokens(length, 2)
    model = tiny_model(family, **sparse)
    found = cached_logits(model, ids, sizes, new_cache(model.config))
    for part, row in zip(found, ids, strict=True):
        assert_specified(part, family, row, **sparse)


def check_padding(family="llama", side="left", extra=3, **sparse):
    """Padded rows of several lengths in one batch give each row's own logits; padding gives finite numbers.

    Under position_ids as `generate` makes them, and under those of the columns, which do not show the padding.
    """
    model = tiny_model(family, **sparse)
    rows = [tokens(length, seed=length)[0] for length in (40, 33, 21, 1)]
    ids, mask, positions = padded_batch(rows, side, extra)
    for position_ids in (positions, torch.arange(ids.shape[1]).expand_as(ids)):
        together = logits(model, ids, attention_mask=mask, position_ids=position_ids)
        assert together.isfinite().all()
        for i, row in enumerate(rows):
            columns = mask[i].bool()
            assert_specified(together[i][columns], family, row, position_ids[i, columns], **sparse)


def check_packed(family="llama", **sparse):
    """Documents packed into one row, told apart by position_ids, give each document's own logits."""
    rows, position_ids = packed_documents()
    together = logits(tiny_model(family, **sparse), torch.cat(rows)[None], position_ids=position_ids)
    assert_each_specified(together, family, rows, **sparse)


def check_position_ids(family="llama", **sparse):
    """position_ids that start anew, repeat or fall under a mask of ones or with a cache: one document, as to any other
    attention of Transformers, in one piece and in two."""
    ids = tokens(60)
    _, anew = packed_documents()
    for position_ids in (anew, anew // 2, torch.arange(60)[None] // 3, torch.arange(60).flip(0)[None]):
        model = tiny_model(family, **sparse)
        assert_specified(
            logits(model, ids, position_ids=position_ids, attention_mask=torch.ones_like(ids))[0],
            family,
            ids[0],
            position_ids[0],
            **sparse,
        )
        inputs = {"position_ids": position_ids, "attention_mask": torch.ones_like(ids)}
        with softmax_in_float64():
            everything = logits(tiny_model(family, **{**sparse, "window_size": 60}), ids, **inputs)
        torch.testing.assert_close(everything, dense_logits(family, ids, **inputs), **TOLERANCE)
        if family == "gpt_oss":  # its model does not ask Transformers what is packed: without a mask, position_ids tell
            continue
        for cuts in ((0, 60), (0, 31, 60)):
            cache, pieces = DynamicCache(config=model.config), []
            with torch.no_grad():
                for start, stop in pairwise(cuts):
                    inputs = {"position_ids": position_ids[:, start:stop], "past_key_values": cache, "use_cache": True}
                    pieces.append(model(ids[:, start:stop], **inputs).logits)
            assert_specified(torch.cat(pieces, 1)[0], family, ids[0], position_ids[0], **sparse)


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
    for implementation in ("auto", "reference"):
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
    attended = scored = admissible = 0

    def count(observed, query, key, value, scaling, _output):
        nonlocal attended, scored, admissible
        layer_idx = observed.layer_idx
        assert observed.sliding_window == windows[layer_idx]
        config = SparseAttentionConfig.from_dict(model.config.sparse_attention)
        pattern = make_pattern(config, query.shape[1], key.shape[1], key.shape[-1], layer_idx, windows[layer_idx])
        for q, k in zip(query, key, strict=True):
            layer = model.model.layers[layer_idx].self_attn
            others = {"softcap": getattr(layer, "attn_logit_softcapping", None), "sinks": getattr(layer, "sinks", None)}
            attended += int(reference.attended_keys(q, k, pattern, 0, scaling=scaling, **others).sum())
            scored += int(reference.scored_keys(q, k, pattern, 0)[0].sum())
        for p in range(length):
            admissible += query.shape[0] * query.shape[1] * min(p + 1, windows[layer_idx] or length)

    with observe(model, count), record_density(model) as recorder:
        logits(model, tokens(length, 2))
    assert 0 < attended < scored < admissible
    assert (recorder.attended, recorder.scored, recorder.admissible) == (attended, scored, admissible)
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
    "position-ids": check_position_ids,
    "later-tokens": check_later_tokens,
    "gradients": check_gradients,
    "density": check_density,
}


def make_pattern(
    config, num_heads, num_kv_heads, head_dim, layer_idx=0, sliding_window=None, dtype=torch.float64, device="cpu"
):
    return layer_pattern(
        config, layer_idx, num_heads, num_kv_heads, head_dim, torch.device(device), dtype, sliding_window
    )


class KeyMask:
    """A recorder that writes down S(row) as a boolean mask and refuses a key that is read twice."""

    def __init__(self, num_heads, num_queries, num_keys, query_offset=0, key_offset=0):
        self.count = torch.zeros(num_heads, num_queries, num_keys, dtype=torch.int64)
        self.query_offset, self.key_offset = query_offset, key_offset

    def add(self, pattern, head, position, attended, num_scored, keys):
        row, column = attended.cpu().nonzero(as_tuple=True)
        keys, position = keys().cpu()[row, column] - self.key_offset, position.cpu()
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


def count_hashed_keys(monkeypatch):
    """A list of how many keys are hashed each time, many at once or few."""
    hashed, many, few = [], BucketHash.assign, numba_index.hash_keys
    monkeypatch.setattr(BucketHash, "assign", lambda self, key: hashed.append(key.shape[1]) or many(self, key))
    monkeypatch.setattr(numba_index, "hash_keys", lambda key, *args: hashed.append(key.shape[1]) or few(key, *args))
    return hashed


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage, in bytes, that any operation returned; all in one thread, the only one it sees."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __enter__(self):
        self.num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_num_threads(self.num_threads)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def attend(query, key, value, pattern, implementation="torch", query_offset=None, key_offset=0, **others):
    """`ops.document_attention` with an implementation of one's choice; the last query at the last key."""
    pattern = dataclasses.replace(pattern, config=pattern.config.replace(implementation=implementation))
    return ops.document_attention(
        query,
        key,
        value,
        pattern=pattern,
        query_offset=key_offset + key.shape[1] - query.shape[1] if query_offset is None else query_offset,
        key_offset=key_offset,
        scaling=SCALING,
        **others,
    )
