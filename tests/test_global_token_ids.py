"""Global tokens by token id: the specification's answer on every path, and one clear error where ids are not known."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.families import SPARSE, tiny_model
from helpers.operation import make_pattern
from helpers.specification import TOLERANCE, assert_specified, cached_logits, cached_specification, logits
from matrix import PATHS, declared
from test_composite import path as composite  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaModel, StaticCache

from hf_sparse_attn import (
    SparseAttentionConfig,
    SparseCache,
    configure,
    load_model,
    mark_global_tokens,
    sparse_attention,
)
from hf_sparse_attn.cache.policies import Recency
from hf_sparse_attn.integration import merge_sparse_attention
from hf_sparse_attn.ops import reference
from hf_sparse_attn.patterns import Marked, static_positions

IDS = [3, 11, 17, 29, 42]  # 3 is the padding of `padded_batch`
UNKNOWN = "call hf_sparse_attn.mark_global_tokens"
CPU = torch.device("cpu")
# What says nothing of marks, or makes patterns by itself.
LEFT_OUT = {"record_density", "cache with a policy", "torch.compile of a decode step"}
QUICK = {
    "llama": {
        "forward",
        "later tokens",
        "left padding",
        "packed by position_ids",
        "dynamic cache",
        "sparse cache",
        "static cache",
        "left-padded batch in a cache",
        "right-padded batch in a cache",
        "cropped cache",
        "rows of a cache",
        "greedy, sparse cache",
        "beam search",
        "assisted",
        "4D mask with padding",
        "gradients with padding",
        "gradient checkpointing",
    },
    "mistral-sliding": {"static cache", "left-padded batch in a cache"},
    "qwen2-mixed": {"sparse cache", "cropped cache"},
}
CELLS = [
    pytest.param(family, path, marks=[] if path in QUICK[family] else pytest.mark.nightly)
    for family in QUICK
    for path in PATHS
    if path not in LEFT_OUT and declared(family, path).symbol == "yes"
]


@pytest.fixture
def by_id(monkeypatch):
    """Every tiny model has global tokens by id, the specification's too."""
    cached_specification.cache_clear()
    monkeypatch.setitem(SPARSE, "global_token_ids", IDS)
    yield
    cached_specification.cache_clear()


def places(row):
    return [i for i, token in enumerate(row.tolist()) if token in IDS]


@pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "path"), CELLS, ids=lambda value: value.replace(" ", "_"))
def test_paths_of_the_support_matrix(by_id, family, path):
    PATHS[path](family)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["auto", "torch", "reference"])
def test_they_are_static_keys_where_the_tokens_stand(family, implementation):
    """Told by `global_token_indices`, which know nothing of hooks; some are far beyond each row's window."""
    ids = tokens(40)
    assert len(places(ids[0])) > 3
    named, told = tiny_model(family, global_token_ids=IDS), tiny_model(family, global_token_indices=places(ids[0]))
    for model in (named, told):
        model.config.sparse_attention["implementation"] = implementation
    found = logits(named, ids)
    torch.testing.assert_close(found, logits(told, ids), **TOLERANCE)
    assert (found - logits(tiny_model(family), ids)).abs().max() > 0.1


def test_each_row_and_document_has_its_own():
    """Rows of a batch and packed documents, each told by its own indices."""
    rows = [tokens(length, seed=length)[0] for length in (33, 21)]
    alone = [logits(tiny_model(global_token_indices=places(row)), row[None])[0] for row in rows]
    model = tiny_model(global_token_ids=IDS)
    ids, mask, position_ids = padded_batch(rows, "mixed", 6)
    together = logits(model, ids, attention_mask=mask, position_ids=position_ids)
    packed = logits(model, torch.cat(rows)[None], position_ids=torch.cat([torch.arange(33), torch.arange(21)])[None])
    for i, expected in enumerate(alone):
        torch.testing.assert_close(together[i][mask[i].bool()], expected, **TOLERANCE)
        torch.testing.assert_close(packed[0].split([33, 21])[i], expected, **TOLERANCE)


@pytest.mark.parametrize("marked", [True, False])
def test_a_later_token_changes_nothing_before(marked):
    """A later token that becomes a global one, or is one no more."""
    ids = tokens(44)
    cut = next(i for i in range(25, 44) if (int(ids[0, i]) in IDS) != marked)
    changed = ids.clone()
    changed[0, cut:] = IDS[1] if marked else 5
    model = tiny_model(global_token_ids=IDS)
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


def test_a_cache_made_by_the_forward_goes_on(by_id):
    ids, model = tokens(40, 2), tiny_model()
    with torch.no_grad():
        first = model(ids[:, :25])
        found = model(ids[:, 25:], past_key_values=first.past_key_values).logits
        as_tuple = model.model(ids[:, :25], return_dict=False)[1]
        again = model(ids[:, 25:], past_key_values=as_tuple).logits
    for part, other, row in zip(found, again, ids, strict=True):
        assert_specified(part, "llama", row)
        assert_specified(other, "llama", row)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_of_a_cache_go_on_by_themselves(by_id, copied):
    ids, other, model = tokens(40), tokens(40, seed=1), tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :25], past_key_values=cache)
        branch = copied(cache)
        assert isinstance(branch, DynamicCache)
        if copied is not copy.copy:  # whose layers are the same
            model(other[:, 25:], past_key_values=cache)
        assert_specified(model(ids[:, 25:], past_key_values=branch).logits[0], "llama", ids[0])


def test_a_cache_is_used_again_after_reset(by_id):
    model, cache = tiny_model(), StaticCache(config=tiny_model().config, max_cache_len=40)
    for seed in (0, 1):
        ids = tokens(40, seed=seed)
        assert_specified(cached_logits(model, ids, (17, 9), cache)[0], "llama", ids[0])
        cache.reset()


def test_a_forward_that_failed_leaves_nothing_behind(by_id):
    """Its tokens never came into the cache, so they are not those of later keys."""
    ids, model = tokens(40), tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(RuntimeError):
            model(tokens(20, seed=1), past_key_values=cache, attention_mask=torch.ones(1, 40).to("meta"))
        assert cache.get_seq_length() == 20
        assert_specified(model(ids[:, 20:], past_key_values=cache).logits[0], "llama", ids[0])


def test_other_ids_take_effect_amid_a_cache():
    """What a cache remembers are tokens, not which of them were global."""
    ids, model = tokens(40), tiny_model(global_token_ids=[5])
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :25], past_key_values=cache)
        configure(model, global_token_ids=IDS)
        found = model(ids[:, 25:], past_key_values=cache).logits
        other = tiny_model(global_token_ids=[5])
        expected_cache = DynamicCache(config=other.config)
        other(ids[:, :25], past_key_values=expected_cache)
        configure(other, global_token_ids=[], global_token_indices=places(ids[0]))
        expected = other(ids[:, 25:], past_key_values=expected_cache).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_two_models_do_not_touch_each_other():
    ids = tokens(40)
    first, second, plain = tiny_model(global_token_ids=IDS), tiny_model(global_token_ids=[5, 9]), tiny_model()
    alone = [logits(model, ids) for model in (first, second, plain)]
    caches = [DynamicCache(config=first.config) for _ in range(3)]
    with torch.no_grad():
        pieces = [
            model(ids[:, i : i + 8], past_key_values=cache).logits
            for i in range(0, 40, 8)
            for model, cache in zip((first, second, plain), caches, strict=True)
        ]
    for i, expected in enumerate(alone):
        torch.testing.assert_close(torch.cat(pieces[i::3], 1), expected, **TOLERANCE)
    assert not torch.equal(alone[0], alone[1])


def test_copies_of_a_model_are_marked_once():
    model = copy.deepcopy(tiny_model(global_token_ids=IDS))
    mark_global_tokens(model)
    mark_global_tokens(torch.nn.Sequential(model))
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    assert torch.equal(logits(model, tokens(40)), logits(tiny_model(global_token_ids=IDS), tokens(40)))


def test_positional_arguments(by_id):
    model, ids, cache = tiny_model(), tokens(40), DynamicCache()
    with torch.no_grad():
        model.model(ids[:, :20], None, None, cache)
        hidden = model.model(ids[:, 20:], None, None, cache)[0]
    assert_specified(model.lm_head(hidden)[0].detach(), "llama", ids[0])


class TestRefused:
    def unmarked(self):
        model = LlamaModel(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                attn_implementation="sparse",
            )
        )
        model.config.sparse_attention = {"global_token_ids": IDS}
        return model

    def test_a_model_that_nobody_marked(self):
        """Even where every row is dense, so that a lack does not show late."""
        model = self.unmarked()
        with pytest.raises(ValueError, match=UNKNOWN):
            model(tokens(8))
        mark_global_tokens(model)
        model(tokens(8))

    def test_the_operation_without_a_model(self):
        x = torch.randn(1, 2, 8, 4)
        with pytest.raises(ValueError, match="name positions by global_token_indices"):
            sparse_attention(x, x, x, config=SparseAttentionConfig(global_token_ids=IDS, dense_below=0))

    def test_embeddings_without_ids(self):
        model = tiny_model(global_token_ids=IDS)
        embeddings = model.get_input_embeddings()(tokens(8))
        with pytest.raises(ValueError, match="global_token_ids needs input_ids"):
            model(inputs_embeds=embeddings)
        configure(model, global_token_ids=[])
        model(inputs_embeds=embeddings)

    @pytest.mark.parametrize("spoil", ["unknown", "cropped and filled by another", "reset and filled by another"])
    def test_cached_tokens_whose_ids_are_not_known(self, spoil):
        ids, model, plain = tokens(40), tiny_model(global_token_ids=IDS), tiny_model()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            if spoil != "unknown":
                model(ids[:, :20], past_key_values=cache)
                cache.reset() if spoil.startswith("reset") else cache.crop(-10)
            plain(ids[:, :20], past_key_values=cache)
            with pytest.raises(ValueError, match=r"cache holds \d+ tokens of 1 rows, and the ids of (none|10) "):
                model(ids[:, 20:], past_key_values=cache)

    def test_rows_of_another_batch(self):
        ids, model = tokens(20, 2), tiny_model(global_token_ids=IDS)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="cache holds 20 tokens of 1 rows, and the ids of 20 of 2 rows are known"):
            model(ids[:1], past_key_values=cache)

    def test_a_policy(self):
        config = tiny_model(global_token_ids=IDS).config
        with pytest.raises(ValueError, match="policy cannot go with global_token_ids"):
            SparseCache(config, policy=Recency(), budget=8)
        model = tiny_model()
        cache = SparseCache(model.config, policy=Recency(), budget=8)
        configure(model, global_token_ids=IDS)
        with pytest.raises(ValueError, match="policy does not take global_token_ids"), torch.no_grad():
            model(tokens(8), past_key_values=cache)

    def test_compiled_with_a_cache(self):
        model = tiny_model(global_token_ids=IDS)
        torch.compiler.reset()
        step = torch.compile(model.forward, backend="eager")
        with pytest.raises(ValueError, match="disable_compile=True"), torch.no_grad():
            step(tokens(8), past_key_values=StaticCache(config=model.config, max_cache_len=16))

    def test_a_model_that_hands_nothing_on(self):
        class Plain(LlamaModel):
            def forward(self, input_ids=None):
                return super().forward(input_ids)

        config = self.unmarked().config
        with pytest.raises(ValueError, match="Plain, which hands nothing on"):
            mark_global_tokens(Plain(config))
        config.sparse_attention = {}
        mark_global_tokens(Plain(config))
        with pytest.raises(ValueError, match="needs a Transformers model, got Linear"):
            mark_global_tokens(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (5, "must be a list of integers"),
        ([-1], "must be an integer of at least 0"),
        ([True], "must be an integer of at least 0"),
        (["a"], "must be an integer of at least 0"),
        ([7, 5, 7], "must not name a token twice, got 7 again"),
    ],
)
def test_impossible_values(given, told):
    with pytest.raises(ValueError, match=f"global_token_ids {told}"):
        SparseAttentionConfig(global_token_ids=given)


def test_tokens_that_the_model_does_not_have():
    model = tiny_model()
    for change in (merge_sparse_attention, lambda _, fields: configure(model, **fields)):
        with pytest.raises(ValueError, match="global_token_ids must be below the model's vocab_size=64, got 64"):
            change(model.config, {"global_token_ids": [63, 64]})
    model.config.sparse_attention = {"global_token_ids": [99]}
    with pytest.raises(ValueError, match="vocab_size=64, got 99"):
        mark_global_tokens(model)


def test_a_saved_checkpoint(tmp_path):
    ids, model = tokens(40), tiny_model(global_token_ids=IDS)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse").eval()
    with pytest.raises(ValueError, match=UNKNOWN):
        logits(stock, ids)
    mark_global_tokens(stock)
    assert torch.equal(logits(stock, ids), logits(model, ids))
    assert torch.equal(logits(load_model(str(tmp_path)).eval(), ids), logits(model, ids))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(dense, ids) - logits(model, ids)).abs().max() > 0.1


def test_another_attention_is_not_told():
    model = tiny_model(global_token_ids=IDS)
    model.set_attn_implementation("eager")
    seen = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.extend(kwargs), with_kwargs=True)
    model(inputs_embeds=model.get_input_embeddings()(tokens(8)))
    assert "position_ids" in seen
    assert not any("marks" in name for name in seen)


def test_a_vision_language_model(composite, tmp_path):  # noqa: F811
    fields = {"window_size": 8, "num_global_tokens": 0, "key_budget": 0, "dense_below": 0}
    ids = tokens(60)
    model = load_model(composite, {**fields, "global_token_ids": IDS}).eval()
    indices = load_model(composite, {**fields, "global_token_indices": places(ids[0])}).eval()
    with torch.no_grad():
        whole, expected = model(input_ids=ids).logits, indices(input_ids=ids).logits
        cache = SparseCache(model.config)
        steps = [model(input_ids=ids[:, i : i + 20], past_key_values=cache).logits for i in (0, 20, 40)]
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_positions_are_those_that_the_rule_admits():
    marks = torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.3
    for offset in (0, 7):
        marked = Marked(marks, offset)
        for start, stop in [(0, 0), (0, 60), (3, 4), (8, 41), (55, 90), (5, 2)]:
            position = torch.arange(start, max(start, stop))
            expected = [p for p in position.tolist() if offset <= p < offset + 50 and marks[p - offset]]
            assert marked.positions(start, stop, CPU).tolist() == expected
            assert position[marked.admits(position)].tolist() == expected
    config = SparseAttentionConfig(num_global_tokens=1, global_token_ids=[4])
    assert static_positions(config, 9, CPU, 0, Marked(torch.tensor([True, False, True]))).tolist() == [0, 2]
    with pytest.raises(ValueError, match=UNKNOWN):
        static_positions(config, 9, CPU)


def test_the_specifications_own_keys():
    """Each later row reads every marked key, by the formula alone."""
    ids = tokens(30)[0]
    config = SparseAttentionConfig(**SPARSE | {"key_budget": 0, "num_global_tokens": 0}, global_token_ids=IDS)

    pattern = replace(make_pattern(config, 2, 1, 8), marked=Marked.in_document(ids, config.global_token_ids))
    scored, _ = reference.scored_keys(torch.randn(2, 30, 8), torch.randn(1, 30, 8), pattern, 0)
    for p in range(30):
        expected = {j for j in range(p + 1) if j > p - 5 or int(ids[j]) in IDS}
        assert set(scored[0, p].nonzero().flatten().tolist()) == expected
