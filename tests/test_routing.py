import pytest
import torch
from helpers.operation import SCALING, KeyMask, attend, calibrated_hash_text, make_pattern

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.ops import reference
from hf_sparse_attn.patterns import static_positions
from hf_sparse_attn.patterns.seeded_random import SeededRandom, seeded_draws
from hf_sparse_attn.routing import CHUNK_PAGES, BucketIndex, _expand, rank

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 90
# 90 rows are more than one chunk of pages at page sizes 1 and 4, and less than a page at 128.
PATTERNS = {
    "pages of 4": {},
    "pages of 1": {"page_size": 1},
    "pages of 3, chunk ends inside a block": {"page_size": 3},
    "one page of 128": {"page_size": 128},
    "window of 1": {"window_size": 1},
    "window wider than a page": {"window_size": 21},
    "no globals": {"num_global_tokens": 0},
    "explicit globals": {"global_token_indices": (7, 40, 41, 500)},
    "strided": {"stride": 9},
    "last keys of each stride": {"stride": 9, "stride_offset": 7, "stride_width": 2},
    "dilated window": {"dilated_window_size": 6, "dilation": 5},
    "slashes": {"slash_distances": (3, 20, 51)},
    "blocks": {"block_size": 8, "num_neighbouring_blocks": 2, "block_offset": 3},
    "random blocks": {"block_size": 5, "num_random_blocks": 2, "block_offset": 2},
    "patterns by head": {"stride": 9, "by_kv_head": ({"window_size": 3}, {"block_size": 11})},
    "random": {"num_random_keys": 5},
    "random without routing": {"num_random_keys": 5, "key_budget": 0},
    "budgets by head": {"key_budget": ((3, 11),)},
    "one KV head without budget": {"key_budget": ((0, 90),)},
    "budget over everything": {"key_budget": 200},
    "smallest weight": {"key_budget": 20, "min_weight": 0.02},
    "smallest weights by head, random keys": {
        "key_budget": 40,
        "min_weight": ((0.0, 0.01, 0.05, 0.5),),
        "num_random_keys": 5,
    },
    "many buckets": {"num_hash_bits": 7, "key_budget": 20},
    "two buckets": {"num_hash_bits": 1},
    "calibrated": {"hash": "calibrated", "calibrated_hash": calibrated_hash_text()},
    "dense rows": {"dense_below": 37},
    "dense layer": {"dense_layers": (0,)},
    "sliding window": {"sliding_window": 30},
    "sliding window inside the window": {"sliding_window": 4},
    "sliding window of the window's size": {"sliding_window": 6},
    "sliding window one wider than the window": {"sliding_window": 7, "page_size": 1},
    "sliding window narrower than a page": {"sliding_window": 20, "page_size": 64},
    "sliding window of dense_below": {"sliding_window": 31, "dense_below": 31},
    "sliding window one wider than dense_below": {"sliding_window": 31, "dense_below": 30},
    "everything at once": {
        "sliding_window": 50,
        "stride": 11,
        "stride_offset": 4,
        "stride_width": 2,
        "num_random_keys": 3,
        "dilated_window_size": 2,
        "dilation": 9,
        "slash_distances": (13,),
        "block_size": 6,
        "num_random_blocks": 1,
        "global_token_indices": (13, 60),
        "dense_below": 20,
        "key_budget": ((3, 11),),
    },
}


def pattern_of(fields, dtype=torch.float64):
    fields = {"window_size": 6, "num_global_tokens": 2, "key_budget": 9, "num_hash_bits": 3, "page_size": 4} | fields
    sliding_window = fields.pop("sliding_window", None)
    config = SparseAttentionConfig(**{"dense_below": 0} | fields)
    return make_pattern(config, HEADS, KV_HEADS, DIM, sliding_window=sliding_window, dtype=dtype)


def inputs(num_queries=LENGTH, num_keys=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, num_queries, DIM), (KV_HEADS, num_keys, DIM), (KV_HEADS, num_keys, DIM))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attended_keys(query, key, pattern, query_offset, key_offset=0):
    """S(row) as the reference says."""
    return reference.attended_keys(query, key, pattern, query_offset, key_offset, scaling=SCALING)


def read_keys(query, key, value, pattern, query_offset=None, key_offset=0):
    """S(row) as the torch implementation really reads it."""
    query_offset = key_offset + key.shape[1] - query.shape[1] if query_offset is None else query_offset
    recorder = KeyMask(HEADS, query.shape[1], key.shape[1], query_offset, key_offset)
    attend(query, key, value, pattern, query_offset=query_offset, key_offset=key_offset, recorder=recorder)
    return recorder.mask


def in_blocks(p, config):
    """The keys of the blocks that the row at position p reads, which are numbered from 0."""
    missing = -config.block_offset % config.block_size
    own = (p + missing) // config.block_size
    numbers = set(range(own - config.num_neighbouring_blocks, own + 1))
    if own:
        drawn = seeded_draws(torch.tensor([own]), config.num_random_blocks, config.seed) % own
        numbers |= set(drawn[0].tolist())
    return {j for j in range(p + 1) if (j + missing) // config.block_size in numbers}


def by_the_rules(query, key, pattern):
    """S(row) of one document as Python sets, from the config's docstring alone."""
    sliding_window = pattern.sliding_window or 2 * LENGTH
    bucket = pattern.bucket_hash.assign(key).tolist()
    rows = {}
    for head in range(HEADS):
        group = HEADS // KV_HEADS
        kv_head, config = head // group, pattern.config
        if config.by_kv_head:  # two parts of two KV heads
            config = config.replace(by_kv_head=(), **dict(config.by_kv_head[kv_head]))
        for p in range(query.shape[1]):
            admissible = set(range(max(0, p - sliding_window + 1), p + 1))
            if min(p + 1, sliding_window) <= config.dense_below or 0 in config.dense_layers:
                rows[head, p] = admissible
                continue
            static = {j for j in range(p + 1) if j < config.num_global_tokens or j in config.global_token_indices}
            for offset in range(config.stride_width if config.stride else 0):
                static |= set(range(config.stride_offset + offset, p + 1, config.stride))
            window = set(range(p - config.window_size + 1, p + 1))
            drawn = set(SeededRandom(config.num_random_keys, config.seed, None).keys(torch.tensor([p]))[0].tolist())
            drawn |= {p - i * config.dilation for i in range(1, config.dilated_window_size + 1)}
            drawn |= {p - distance for distance in config.slash_distances}
            if config.block_size:
                drawn |= in_blocks(p, config)
            page_start = p // config.page_size * config.page_size
            page_end = page_start + config.page_size - 1
            scores = {}
            for b in set(bucket[kv_head]):
                known = [
                    j
                    for j in range(max(0, page_end - sliding_window + 1), page_start)
                    if bucket[kv_head][j] == b and j not in static
                ]
                if known:
                    scores[b] = float(query[kv_head * group :][:group, p].sum(0) @ key[kv_head, known].mean(0))
            routed = []
            for b in sorted(scores, key=scores.get, reverse=True):
                members = [
                    j
                    for j in range(p - config.window_size, -1, -1)
                    if j in admissible and j not in static and bucket[kv_head][j] == b
                ]
                routed += members[: pattern.budgets[kv_head] - len(routed)]
            fixed = (static | window | drawn) & admissible
            scored = sorted(fixed | set(routed))
            weights = (SCALING * query[head, p] @ key[kv_head, scored].T).softmax(-1).tolist()
            heavy = {j for j, weight in zip(scored, weights, strict=True) if weight >= pattern.min_weights[head]}
            rows[head, p] = fixed | heavy & set(routed)
    return rows


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS.keys())
def test_reference_follows_the_rules(fields):
    query, key, _ = inputs()
    pattern = pattern_of(fields)
    attended = attended_keys(query, key, pattern, 0)
    for (head, p), expected in by_the_rules(query, key, pattern).items():
        assert set(attended[head, p].nonzero().flatten().tolist()) == expected, (head, p)


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS.keys())
def test_selection_is_the_reference_set(fields):
    query, key, value = inputs()
    pattern = pattern_of(fields)
    assert torch.equal(read_keys(query, key, value, pattern), attended_keys(query, key, pattern, 0))


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("num_queries", [1, 23], ids=["one query", "23 queries"])
def test_selection_of_the_last_rows_alone(fields, num_queries):
    query, key, value = inputs()
    pattern = pattern_of(fields)
    expected = attended_keys(query, key, pattern, 0)[:, -num_queries:]
    assert torch.equal(read_keys(query[:, -num_queries:], key, value, pattern), expected)


@pytest.mark.parametrize("dropped", [1, 17, 40], ids=lambda dropped: f"{dropped} dropped")
@pytest.mark.parametrize("name", ["sliding window", "everything at once", "sliding window inside the window"])
def test_keys_that_a_sliding_cache_has_dropped_change_no_row(name, dropped):
    """The rows that no longer see them read the same positions."""
    query, key, value = inputs()
    pattern = pattern_of(PATTERNS[name])
    first_row = dropped + pattern.sliding_window - 1
    everything = read_keys(query, key, value, pattern)
    assert not everything[:, first_row:, :dropped].any()
    rest = read_keys(query[:, first_row:], key[:, dropped:], value[:, dropped:], pattern, key_offset=dropped)
    assert torch.equal(rest, everything[:, first_row:, dropped:])


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS.keys())
def test_missing_first_keys_without_a_sliding_window(fields):
    """Not what a model does, but the index must not mistake slots for positions."""
    query, key, value = inputs()
    pattern = pattern_of(fields)
    dropped, first_row = 19, 50
    query, key, value = query[:, first_row:], key[:, dropped:], value[:, dropped:]
    expected = attended_keys(query, key, pattern, first_row, dropped)
    assert torch.equal(read_keys(query, key, value, pattern, first_row, dropped), expected)


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("cut", [7, 33, 64, 89])
def test_later_keys_and_queries_decide_nothing(fields, cut):
    query, key, value = inputs()
    pattern = pattern_of(fields)
    before = read_keys(query, key, value, pattern)[:, :cut]
    other_query, other_key, _ = inputs(seed=1)
    query = torch.cat([query[:, :cut], other_query[:, cut:]], 1)
    key = torch.cat([key[:, :cut], 50 * other_key[:, cut:]], 1)
    assert torch.equal(read_keys(query, key, value, pattern)[:, :cut], before)


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS.keys())
def test_the_document_going_on_changes_no_row(fields):
    query, key, value = inputs()
    pattern = pattern_of(fields)
    everything = read_keys(query, key, value, pattern)
    for length in (1, 5, 63, 64, 65):
        shorter = read_keys(query[:, :length], key[:, :length], value[:, :length], pattern)
        assert torch.equal(shorter, everything[:, :length, :length])


def test_float32_takes_the_same_number_of_keys_per_row():
    """Near ties may break differently, but the budget is used up whenever enough keys are known."""
    query, key, value = (x.float() for x in inputs())
    fields = {"key_budget": 9, "num_global_tokens": 0}
    single = read_keys(query, key, value, pattern_of(fields, torch.float32)).sum(-1)
    double = read_keys(query.double(), key.double(), value.double(), pattern_of(fields)).sum(-1)
    assert torch.equal(single[:, 40:], double[:, 40:])
    assert (single[:, 60:] == 6 + 9).all()


def test_more_buckets_are_looked_at_when_the_first_do_not_fill_the_budget():
    """With 2**9 buckets of about one key each, the 64 best hold fewer than 80 keys."""
    query, key, value = inputs(20, 300)
    pattern = pattern_of({"num_hash_bits": 9, "key_budget": 80, "min_weight": 0})
    expected = attended_keys(query, key, pattern, 280)
    assert (expected.sum(-1) == 80 + 6 + 2).all()
    assert len(pattern.bucket_hash.assign(key)[0].unique()) > 128
    assert torch.equal(read_keys(query, key, value, pattern), expected)


def test_select_pads_with_keys_that_do_not_count():
    query, key, _ = inputs()
    pattern = pattern_of({"key_budget": 30})
    bucket = pattern.bucket_hash.assign(key)
    index = BucketIndex(key[0], bucket[0], static_positions(pattern.config, LENGTH, key.device), 0, 0, pattern)
    start, stop = 3, CHUNK_PAGES * 4 - 1
    routed, count = index.rows(start, stop).select(query[:2, start:stop].sum(0), 30)
    assert routed.shape == (stop - start, 30)
    assert routed.min() >= 0
    assert routed.max() < LENGTH
    expected = attended_keys(query, key, pattern, 0)[0]
    for i, p in enumerate(range(start, stop)):
        taken = routed[i, : count[i]].tolist()
        older = set(expected[p].nonzero().flatten().tolist()) - {0, 1} - set(range(p - 5, p + 1))
        assert len(taken) == len(set(taken))
        assert set(taken) == older
    assert count[0] == 0
    assert count[-1] == 30


def runs(*rows, width):
    """Arguments of _expand for rows of (start, length) runs."""
    start, length = torch.tensor(rows, dtype=torch.int32).unbind(-1)
    return start, length, (length.cumsum(-1) - length).int(), width


def test_expand_writes_the_runs_side_by_side():
    rows = ([(10, 3), (2, 1), (20, 2)], [(5, 2), (30, 4), (0, 0)], [(7, 6), (1, 0), (1, 0)])
    assert _expand(*runs(*rows, width=6)).tolist() == [
        [10, 11, 12, 2, 20, 21],
        [5, 6, 30, 31, 32, 33],
        [7, 8, 9, 10, 11, 12],
    ]


def test_expand_leaves_the_columns_behind_the_last_run_arbitrary():
    rows = ([(10, 2), (4, 1), (0, 0)], [(0, 0), (0, 0), (0, 0)])
    expanded = _expand(*runs(*rows, width=5))
    assert expanded.shape == (2, 5)
    assert expanded[0, :3].tolist() == [10, 11, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_sorts_and_carries_the_bucket(dtype):
    scores = torch.randn(37, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    scores[3] = -1e30
    ranked = rank(scores.clone(), 16)
    bucket = ranked.view(torch.int64 if dtype == torch.float64 else torch.int32) & 15
    torch.testing.assert_close(scores.gather(-1, bucket.long()), ranked, rtol=1e-5, atol=0)
    assert (ranked.diff(dim=-1) >= 0).all()
    assert torch.equal(bucket.sort(-1).values, torch.arange(16).expand_as(bucket).to(bucket))
