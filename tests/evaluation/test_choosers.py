"""Keys chosen by dense scores, against the rules in plain Python."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaForCausalLM

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.evaluation.choosers import NUM_VOTERS, PAGE_SIZE, oracle, quest, voted
from hf_sparse_attn.integration import choosing
from hf_sparse_attn.ops import AttentionCall, document_attention, find_candidates
from hf_sparse_attn.patterns import layer_pattern
from hf_sparse_attn.recording import DensityRecorder

N, WINDOW, GLOBALS, SCALING = 90, 20, 3, 0.4


def pattern_of(budget, num_heads=4, num_kv_heads=2, head_dim=8, window=WINDOW, sliding_window=None):
    config = SparseAttentionConfig(
        window_size=window, num_global_tokens=GLOBALS, key_budget=budget, min_weight=0.0, dense_below=0
    )
    shape = num_heads, num_kv_heads, head_dim, torch.device("cpu"), torch.float64
    return layer_pattern(config, 0, *shape, sliding_window)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(heads, N, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]


def free(row, window=WINDOW, first=0):
    """The keys that a row may choose."""
    return range(max(GLOBALS, first), max(row - window + 1, GLOBALS))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("offset", [0, 70])
def test_oracle(tensors, softcap, sliding_window, offset):
    query, key, _ = tensors
    pattern = pattern_of(7, sliding_window=sliding_window)
    found = oracle(query[:, offset:], key, AttentionCall(pattern, offset, scaling=SCALING, softcap=softcap))
    assert found.shape == (2, N - offset, 7)
    assert found.dtype == torch.int32
    for kv_head in range(2):
        for row in range(offset, N):
            first = 0 if sliding_window is None else max(0, row - sliding_window + 1)
            weight = torch.zeros(N, dtype=torch.float64)
            for head in (2 * kv_head, 2 * kv_head + 1):
                scores = key[kv_head, first : row + 1] @ query[head, row] * SCALING
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                weight[first : row + 1] += scores.softmax(0)
            best = sorted(free(row, first=first), key=lambda column: -weight[column])[:7]
            chosen = found[kv_head, row - offset]
            assert sorted(chosen[chosen >= 0].tolist()) == sorted(best)


def test_quest_by_hand():
    """Three pages; the best bound belongs to one whose single keys are worse than those of another."""
    key = torch.zeros(1, 3 * PAGE_SIZE + 20, 2, dtype=torch.float64)
    key[0, 0], key[0, 1] = torch.tensor([3.0, -3.0]), torch.tensor([-3.0, 3.0])  # bound 6, each key 0
    key[0, PAGE_SIZE] = torch.tensor([2.0, 2.0])  # bound 4
    key[0, 2 * PAGE_SIZE] = torch.tensor([-9.0, -9.0])  # bound 0, for its other keys
    query = torch.ones(1, key.shape[1], 2, dtype=torch.float64)
    pattern = pattern_of(2 * PAGE_SIZE, 1, 1, 2, window=1)
    chosen = quest(query, key, AttentionCall(pattern))[0]
    last = set(chosen[-1].tolist())
    assert last == {*range(GLOBALS, 2 * PAGE_SIZE), -1}
    assert (chosen[PAGE_SIZE - 2] == -1).all()  # the first page has a later key
    assert set(chosen[2 * PAGE_SIZE - 2].tolist()) == {*range(GLOBALS, PAGE_SIZE), -1}


def test_quest(tensors):
    query, key, _ = tensors
    found = quest(query, key, AttentionCall(pattern_of(PAGE_SIZE), scaling=SCALING))
    for kv_head in range(2):
        for row in range(N):
            bounds = []
            for page in range(N // PAGE_SIZE):
                keys = key[kv_head, page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                products = [keys * query[head, row] for head in (2 * kv_head, 2 * kv_head + 1)]
                bounds.append(float(sum(product.amax(0).sum() for product in products)))
            whole = [column for column in free(row) if (column // PAGE_SIZE + 1) * PAGE_SIZE <= row + 1]
            best = max({column // PAGE_SIZE for column in whole}, key=lambda page: bounds[page], default=None)
            chosen = found[kv_head, row]
            assert chosen[chosen >= 0].tolist() == [column for column in whole if column // PAGE_SIZE == best]


@pytest.mark.parametrize("offset", [0, 20])
def test_voted(tensors, offset):
    """Counted by hand; each row may read what most rows of its block found, and nothing that it may not see."""
    query, key, _ = tensors
    pattern = pattern_of(7, window=5)
    given = {"pattern": pattern, "query_offset": offset, "key_offset": 0}
    own = find_candidates(query[:, offset:], key, **given)
    found = voted(query[:, offset:], key, AttentionCall(pattern, offset, scaling=SCALING))
    assert found.dtype == torch.int32
    differing = 0
    for kv_head in range(2):
        for start in range(0, N - offset, NUM_VOTERS):
            rows = range(start, min(start + NUM_VOTERS, N - offset))
            ballots = [column for row in rows for column in own[kv_head, row].tolist() if column >= 0]
            elected = sorted(set(ballots), key=lambda column: (-ballots.count(column), column))[:7]
            for row in rows:
                chosen = found[kv_head, row]
                expected = set(elected) & set(free(row + offset, 5))
                assert set(chosen[chosen >= 0].tolist()) == expected
                differing += expected != set(own[kv_head, row].tolist()) - {-1}
    assert differing > 50


@pytest.mark.parametrize("choose", [oracle, quest])
def test_enough_keys_are_dense_attention(tensors, choose):
    """Nothing is read twice, and nothing is left out."""
    query, key, value = tensors
    recorder = DensityRecorder()
    given = {"pattern": pattern_of(N), "query_offset": 0, "key_offset": 0, "scaling": SCALING}
    found = document_attention(query, key, value, **given, recorder=recorder, choose=choose)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)
    assert torch.allclose(found, expected)
    assert recorder.density == 1


@pytest.mark.parametrize("choose", [oracle, quest])
def test_in_a_model(tiny_llama_config, choose):
    """The same in one shot and after a cached prefix; strictly causal; another model does without it."""
    fields = {"window_size": 20, "num_global_tokens": 3, "key_budget": 16, "min_weight": 0.0, "dense_below": 0}
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(copy.deepcopy(tiny_llama_config), attn_implementation="sparse")
    model.config.sparse_attention = SparseAttentionConfig(**fields).to_dict()
    ids = torch.randint(5, model.config.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).logits
        with choosing(model, choose):
            whole = model(ids).logits
            changed = model(ids.clone().index_fill_(1, torch.tensor([99]), 4)).logits
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split([60, 39, 1], 1)]
        assert torch.equal(model(ids).logits, plain)
    assert not torch.allclose(whole, plain, atol=1e-4)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert torch.equal(changed[:, :99], whole[:, :99])
