"""What choices cost, against sums written out row by row; the choices themselves, against all that there are."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.operation import make_pattern

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.calibration import budget_allocation as allocation
from hf_sparse_attn.calibration.budget_allocation import (
    BUDGETS,
    MIN_WEIGHTS,
    NUM_SAMPLED_ROWS,
    Costs,
    allocate,
    by_head,
    first_row,
    fitting_dense_below,
    fitting_window_size,
    least_density,
    measure_layer,
    sampled_blocks,
)
from hf_sparse_attn.ops import reference
from hf_sparse_attn.patterns import row_patterns, static_positions

CONFIG = SparseAttentionConfig(window_size=8, num_global_tokens=2, num_hash_bits=3, page_size=16, dense_below=0)
ROWS, TOKENS = 1000, 1024  # of `curves`


def choices(monkeypatch, budgets=BUDGETS, min_weights=MIN_WEIGHTS):
    monkeypatch.setattr(allocation, "BUDGETS", budgets)
    monkeypatch.setattr(allocation, "MIN_WEIGHTS", min_weights)


def drawn_layer(num_tokens, num_heads, num_kv_heads, config, sliding_window=None, head_dim=8, seed=0):
    """Queries of the sampled rows, keys, values, a sensitivity and a pattern, in float32; all random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sampled = torch.cat([torch.arange(*block) for block in sampled_blocks(config, num_tokens)])
    gradients = normal(num_heads, 20, head_dim)
    return {
        "rows": normal(num_heads, len(sampled), head_dim),
        "key": normal(num_kv_heads, num_tokens, head_dim),
        "value": normal(num_kv_heads, num_tokens, head_dim),
        "sensitivity": gradients.transpose(1, 2) @ gradients / 20,
        "pattern": make_pattern(config, num_heads, num_kv_heads, head_dim, 0, sliding_window, torch.float32),
        "scaling": 0.7,
    }


def written_out(rows, key, value, sensitivity, pattern, scaling):
    """`measure_layer`'s loss, pairs read through the buckets, and fixed pairs of one head, row by row in float64."""
    rows, key, value, sensitivity = (x.double() for x in (rows, key, value, sensitivity))
    config, num_tokens = pattern.config, key.shape[1]
    num_heads, num_kv_heads = len(rows), len(key)
    key_of, value_of = (x.repeat_interleave(num_heads // num_kv_heads, 0) for x in (key, value))
    loss = torch.zeros(num_heads, len(allocation.BUDGETS), len(allocation.MIN_WEIGHTS), dtype=torch.float64)
    read = torch.zeros_like(loss)
    done = 0
    for start, stop in sampled_blocks(config, num_tokens):
        query = rows[:, done : done + stop - start]
        done += stop - start
        for b, budget in enumerate(allocation.BUDGETS):
            limited = replace(pattern, budgets=[budget] * num_kv_heads)
            scored, routed = reference.scored_keys(query, key, limited, start)
            for head, i in itertools.product(range(num_heads), range(stop - start)):
                p = start + i
                oldest = 0 if pattern.sliding_window is None else max(0, p - pattern.sliding_window + 1)
                scores = torch.full((num_tokens,), -torch.inf, dtype=torch.float64)
                scores[oldest : p + 1] = key_of[head, oldest : p + 1] @ query[head, i] * scaling
                dense = scores.softmax(0)
                always = scored[head, i] & ~routed[head, i]
                for w, min_weight in enumerate(allocation.MIN_WEIGHTS):
                    kept = always | (routed[head, i] & (dense >= min_weight))
                    weights = scores.masked_fill(~kept, -torch.inf).softmax(0)
                    error = (weights - dense) @ value_of[head]
                    loss[head, b, w] += error @ sensitivity[head] @ error / 2
                    read[head, b, w] += int((kept & ~always).sum())
    sparse_rows = num_tokens - min(config.dense_below, num_tokens)
    static = set(static_positions(config, num_tokens, rows.device).tolist())
    fixed = 0
    for p in range(num_tokens):
        oldest = 0 if pattern.sliding_window is None else max(0, p - pattern.sliding_window + 1)
        keys = set(range(oldest, p + 1))
        always = static | set(range(p - config.window_size + 1, p + 1))
        for own in row_patterns(config):
            always |= set(torch.arange(num_tokens)[own.admits(p, torch.arange(num_tokens))].tolist())
        fixed += len(keys if p < config.dense_below else keys & always)
    return loss * sparse_rows / done, read * sparse_rows / done, fixed


def assert_written_out(layer):
    costs = measure_layer(**layer)
    loss, read, fixed = written_out(**layer)
    assert costs.loss.dtype == costs.read.dtype == torch.float64
    torch.testing.assert_close(costs.loss, loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(costs.read, read, rtol=1e-6, atol=1e-6)
    assert float(costs.fixed) == fixed
    return costs


class TestMeasureLayer:
    @pytest.mark.parametrize(
        ("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (3, 1)], ids=["one query head", "group of 3", "one KV head"]
    )
    def test_losses_and_pairs_are_those_of_single_rows(self, monkeypatch, num_heads, num_kv_heads):
        choices(monkeypatch, (0, 24), (0.0, 1e-3, 1e-2))
        costs = assert_written_out(drawn_layer(200, num_heads, num_kv_heads, CONFIG))
        assert costs.group == num_heads // num_kv_heads
        read, loss = costs.read, costs.loss
        assert (read[:, 0] == 0).all()
        assert (loss[:, 0] == loss[:, 0, :1]).all(), "without routed keys the smallest weight does not matter"
        assert (read[:, 1, 0] > 0.99 * 24 * costs.rows).all()
        assert (read[:, 1, 1:] < read[:, 1, :-1]).all(), "a larger smallest weight leaves keys out"
        assert (loss[:, 1, 0] < loss[:, 0, 0]).all()

    def test_budgets_between(self, monkeypatch):
        """Of the last bucket, a smaller budget takes the most recent keys, as the attention itself does."""
        choices(monkeypatch, (0, 4, 8, 16, 24), (0.0, 1e-2))
        assert_written_out(drawn_layer(200, 4, 2, CONFIG))

    @pytest.mark.parametrize("sliding_window", [100, 30, 8, 5], ids=lambda window: f"window {window}")
    def test_the_models_own_window(self, monkeypatch, sliding_window):
        """Down to windows that are no wider than the local one and leave nothing to route."""
        choices(monkeypatch, (0, 64), (0.0, 1e-2))
        costs = assert_written_out(drawn_layer(200, 4, 2, CONFIG, sliding_window))
        assert float(costs.admissible) == sum(min(p + 1, sliding_window) for p in range(200))
        assert bool((costs.read[:, 1, 0] > 0).all()) == (sliding_window > 8)

    def test_fewer_keys_than_the_budget(self, monkeypatch):
        """With everything routed and nothing left out, rows read all keys: no error is left."""
        choices(monkeypatch, (0, 24, 1000), (0.0,))
        costs = measure_layer(**drawn_layer(200, 4, 2, CONFIG))
        assert (costs.loss[:, 2] < 1e-9 * costs.loss[:, 1]).all()
        assert (costs.loss[:, 1] < costs.loss[:, 0]).all()
        choices(monkeypatch, (0, 1000), (0.0, 1e-2))
        assert_written_out(drawn_layer(200, 4, 2, CONFIG))

    def test_strided_and_single_static_keys(self, monkeypatch):
        choices(monkeypatch, (0, 24), (0.0, 1e-2))
        assert_written_out(drawn_layer(200, 4, 2, CONFIG.replace(stride=7, global_token_indices=(50, 51, 160))))

    @pytest.mark.parametrize("sliding_window", [None, 60])
    def test_keys_of_a_rows_own(self, monkeypatch, sliding_window):
        """They are read in any case, and candidates among them count once."""
        choices(monkeypatch, (0, 24, 300), (0.0, 1e-2))
        config = CONFIG.replace(num_random_keys=5, block_size=12, num_neighbouring_blocks=1, slash_distances=(3, 40))
        assert_written_out(drawn_layer(200, 4, 2, config, sliding_window))

    def test_dense_rows(self, monkeypatch):
        choices(monkeypatch, (0, 24), (0.0, 1e-2))
        config = CONFIG.replace(dense_below=60)
        costs = assert_written_out(drawn_layer(220, 4, 2, config))
        assert (costs.rows, costs.tokens) == (160, 220)
        assert float(costs.admissible) == 220 * 221 // 2
        assert costs.least_density == pytest.approx(least_density(config, {0: None}, 220))

    def test_a_head_that_the_loss_does_not_feel_costs_nothing(self):
        layer = drawn_layer(200, 4, 2, CONFIG)
        layer["sensitivity"][1] = 0
        costs = measure_layer(**layer)
        assert (costs.loss[1] == 0).all()
        assert (costs.loss[[0, 2, 3], 0] > 0).all()
        assert torch.equal(costs.read, measure_layer(**drawn_layer(200, 4, 2, CONFIG)).read)

    def test_weights_that_underflow(self, monkeypatch):
        """A row whose weights of all keys that it may read are 0 beside that of one it never finds."""
        choices(monkeypatch, (0, 8), (0.0, 1e-2))
        layer = drawn_layer(200, 4, 2, CONFIG)
        layer["rows"] *= 1e4
        costs = measure_layer(**layer)
        assert costs.loss.isfinite().all()
        assert (costs.loss[:, 0] > 0).all()

    def test_shapes(self):
        costs = measure_layer(**drawn_layer(200, 4, 2, CONFIG))
        assert costs.loss.shape == costs.read.shape == (4, len(BUDGETS), len(MIN_WEIGHTS))
        assert costs.fixed.shape == costs.admissible.shape == ()


def test_by_head_adds_up_to_the_choice(monkeypatch):
    choices(monkeypatch, (0, 24), (0.0, 1e-2))
    layers = {i: measure_layer(**drawn_layer(220, 4, 2, CONFIG)) for i in (0, 1, 3)}
    costs = Costs.stack(layers, 4)
    choice = replace(allocate(costs, 0.4, UNLIMITED), dense_layers=(1,))
    density, loss = by_head(costs, choice)
    assert density.shape == loss.shape == (4, 4)
    assert (density[1] == 1).all()
    assert (loss[1] == 0).all()
    assert density[2].isnan().all()
    assert loss[2].isnan().all()
    for layer in (0, 3):
        for head in range(4):
            budget = allocation.BUDGETS.index(choice.key_budget[layer][head // 2])
            weight = allocation.MIN_WEIGHTS.index(choice.min_weight[layer][head])
            read = costs.fixed[layer] + costs.read[layer, head, budget, weight]
            assert density[layer, head] == read / costs.admissible[layer]
            assert loss[layer, head] == costs.loss[layer, head, budget, weight] / costs.tokens


@pytest.mark.parametrize("page_size", [1, 3, 8, 12, 64])
@pytest.mark.parametrize("dense_below", [0, 100])
def test_sampled_rows_are_sparse_rows_spread_over_the_document(page_size, dense_below):
    config = CONFIG.replace(page_size=page_size, dense_below=dense_below)
    first = first_row(config)
    for num_rows in (first + 2 * NUM_SAMPLED_ROWS, 1000):
        blocks = sampled_blocks(config, num_rows)
        rows = [row for block in blocks for row in range(*block)]
        assert 0.9 * NUM_SAMPLED_ROWS < len(rows) <= NUM_SAMPLED_ROWS
        assert len(set(rows)) == len(rows)
        assert first <= min(rows) < first + (num_rows - first) / 4
        assert num_rows - 16 <= max(rows) < num_rows
        assert all(start // (16 * page_size) == (stop - 1) // (16 * page_size) for start, stop in blocks)


@pytest.mark.parametrize(
    "fields",
    [{}, {"dense_below": 30}, {"dense_below": 500}, {"num_global_tokens": 0}, {"window_size": 300}],
    ids=str,
)
def test_least_density_counts_dense_rows_window_and_globals(fields):
    config = CONFIG.replace(**fields)
    read = 0
    for p in range(200):
        keys = {*range(config.num_global_tokens), *range(p - config.window_size + 1, p + 1)}
        read += p + 1 if p < config.dense_below else len(keys & set(range(p + 1)))
    assert least_density(config, {0: None}, 200) == pytest.approx(read / (200 * 201 / 2))


@pytest.mark.parametrize(
    ("num_tokens", "density", "own_window", "expected"),
    [
        (8192, 0.38, None, 2048),  # a sixteenth of the pairs, a sixth of 0.38 being slightly more
        (8192, 0.37, None, 1024),
        (8192, 0.1, None, 1024),
        (8192, 0.08, None, 512),
        (8192, 0.001, None, 256),  # the window
        (4096, 0.19, None, 512),
        (131072, 0.02, None, 2048),
        (8192, 0.08, 512, 512),
        (8192, 0.08, 1024, 1024),  # which stays a local layer
        (8192, 0.08, 4096, 512),  # and which is none
    ],
)
def test_dense_rows_take_a_sixth_at_most(num_tokens, density, own_window, expected):
    windows = {0: None, 1: own_window}
    assert fitting_dense_below(SparseAttentionConfig(), windows, num_tokens, density) == expected


@pytest.mark.parametrize(
    ("num_tokens", "density", "expected"),
    [
        (8192, 1.0, 256),
        (8192, 0.37, 256),  # takes 0.0615
        (8192, 0.36, 128),
        (8192, 0.19, 128),
        (8192, 0.12, 64),
        (8192, 0.001, 64),
        (4096, 0.19, 64),
        (131072, 0.03, 256),
    ],
)
def test_the_window_takes_a_sixth_at_most(num_tokens, density, expected):
    assert fitting_window_size(SparseAttentionConfig(), num_tokens, density) == expected


@pytest.mark.parametrize("window_size", [100, 64, 1])
def test_the_window_is_made_no_larger_and_not_less_than_64(window_size):
    assert fitting_window_size(SparseAttentionConfig(window_size=window_size), 8192, 0.001) == window_size


def test_dense_below_is_never_made_larger():
    config = SparseAttentionConfig(window_size=512, dense_below=300)
    assert fitting_dense_below(config, {0: None}, 8192, 0.001) == 300


def drawn_costs(layers, heads, group, seed=0, budgets=None):
    """Losses that fall with the budget and rise with the smallest weight, reads that do the opposite."""
    generator = torch.Generator().manual_seed(seed)
    budgets = allocation.BUDGETS if budgets is None else budgets
    shape = layers, heads, len(budgets), len(allocation.MIN_WEIGHTS)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    scale = 10 ** (4 * uniform(layers, heads, 1, 1) - 2)
    loss = scale * (uniform(*shape).sort(2, descending=True).values + uniform(*shape).sort(3).values)
    share = uniform(*shape).sort(3, descending=True).values
    share[..., 0] = 1
    read = ROWS * torch.tensor(budgets, dtype=torch.float64)[:, None] * share
    loss[:, :, 0] = loss[:, :, 0, :1]
    fixed = torch.full((layers,), ROWS * 100.0, dtype=torch.float64)
    return Costs(loss, read, fixed, torch.full_like(fixed, ROWS * 6000.0), ROWS, TOKENS, group)


def curves(*layers, group=1, admissible=6000.0):
    """Costs that a function of the budget gives for each head: [[head, ...], ...]; the smallest weight is 0."""
    loss = torch.tensor(
        [[[head(budget) for budget in allocation.BUDGETS] for head in heads] for heads in layers], dtype=torch.float64
    )
    read = ROWS * torch.tensor(allocation.BUDGETS, dtype=torch.float64).expand_as(loss)
    fixed = torch.full((len(layers),), ROWS * 100.0, dtype=torch.float64)
    pairs = torch.full_like(fixed, ROWS * admissible)
    return Costs(loss[..., None], read[..., None], fixed, pairs, ROWS, TOKENS, group)


def falling(start, keys):
    """A loss that falls in a straight line to 0 at `keys` keys."""
    return lambda budget: start * max(0.0, 1 - budget / keys)


def step(height, keys):
    """A loss that goes away at `keys` keys, and not before."""
    return lambda budget: 0.0 if budget >= keys else height


NOTHING, UNLIMITED = falling(0.0, 1), 10**6


@pytest.fixture
def unweighted(monkeypatch):
    choices(monkeypatch, min_weights=(0.0,))


@pytest.mark.usefixtures("unweighted")
class TestAllocateCurves:
    def test_a_head_without_loss_gets_nothing(self):
        choice = allocate(curves([NOTHING, falling(1.0, 2048)]), 0.5, UNLIMITED)
        assert choice.key_budget == ((0, 2048),)
        assert choice.loss == 0

    def test_a_head_whose_loss_does_not_fall_gets_nothing(self):
        choice = allocate(curves([lambda budget: 0.5, falling(0.1, 512)]), 0.5, UNLIMITED)
        assert choice.key_budget == ((0, 512),)
        assert choice.loss == 0.5 / TOKENS

    def test_a_head_whose_loss_grows_gets_nothing(self):
        assert allocate(curves([lambda budget: 1 + budget]), 0.5, UNLIMITED).key_budget == ((0,),)

    def test_the_steeper_head_comes_first(self):
        costs = curves([falling(0.1, 1024), falling(0.9, 1024)])
        assert allocate(costs, (100 + 512) / 6000, UNLIMITED).key_budget == ((0, 1024),)

    def test_the_steeper_layer_comes_first(self):
        costs = curves([falling(0.9, 1024)], [falling(0.1, 1024)])
        assert allocate(costs, (100 + 512) / 6000, UNLIMITED).key_budget == ((1024,), (0,))

    def test_a_plateau_is_jumped(self):
        """Its first steps bring nothing; the way to 512 as a whole brings more per key than the other head does."""
        costs = curves([step(1.0, 512), falling(0.5, 2048)])
        assert allocate(costs, (100 + 256) / 6000, UNLIMITED).key_budget == ((512, 0),)

    def test_query_heads_of_a_group_share_the_budget(self):
        """Together the group's heads lose more than the other KV head's, each of them less."""
        costs = curves([falling(0.4, 1024), falling(0.4, 1024), falling(0.5, 1024), NOTHING], group=2)
        choice = allocate(costs, (100 + 512) / 6000, UNLIMITED)
        assert choice.key_budget == ((1024, 0),)
        assert [len(layer) for layer in choice.min_weight] == [4]

    def test_a_layer_whose_loss_falls_only_when_nearly_all_is_read_becomes_dense(self):
        costs = curves([falling(1.0, 512)], [lambda budget: 500.0], [falling(1.0, 512)])
        choice = allocate(costs, 0.5, UNLIMITED)
        assert choice.dense_layers == (1,)
        assert choice.key_budget[0] == choice.key_budget[2] == (512,)
        assert choice.loss == 0
        assert choice.density == pytest.approx((6000 + 2 * (100 + 512)) / (3 * 6000))
        assert choice.mean_key_budget == pytest.approx(2 * 512 / 3), "dense layers find no keys"

    def test_a_density_of_one_reads_everything_that_costs(self):
        choice = allocate(curves([falling(1.0, 2 * allocation.BUDGETS[-1])], [NOTHING]), 1.0, UNLIMITED)
        assert choice.dense_layers == (0,)
        assert choice.loss == 0

    def test_keys_to_find_are_the_limit(self):
        costs = curves([falling(1.0, 1024), falling(0.5, 1024)])
        choice = allocate(costs, 0.9, 512)
        assert choice.key_budget == ((1024, 0),)
        assert choice.mean_key_budget == 512

    def test_least_density_leaves_no_routed_key(self):
        costs = curves([falling(1.0, 1024)], [falling(0.5, 1024)])
        choice = allocate(costs, costs.least_density, UNLIMITED)
        assert choice.key_budget == ((0,), (0,))
        assert choice.dense_layers == ()
        assert choice.density == costs.least_density == pytest.approx(100 / 6000)

    def test_unreachable_density(self):
        with pytest.raises(ValueError, match=r"^a density of 0\.01 cannot be reached: .* 0\.0167; make window_size"):
            allocate(curves([falling(1.0, 1024)]), 0.01, UNLIMITED)


def summed(costs, choice):
    """Density, loss per token and mean budget of a choice, looked up head by head."""
    loss = pairs = found = 0.0
    for i, (budgets, weights) in enumerate(zip(choice.key_budget, choice.min_weight, strict=True)):
        if i in choice.dense_layers:
            pairs += len(weights) * float(costs.admissible[i])
            continue
        found += sum(budgets)
        for head, weight in enumerate(weights):
            place = (
                i,
                head,
                allocation.BUDGETS.index(budgets[head // costs.group]),
                allocation.MIN_WEIGHTS.index(weight),
            )
            loss += float(costs.loss[place])
            pairs += float(costs.fixed[i] + costs.read[place])
    num_budgets = sum(map(len, choice.key_budget))
    return pairs / (costs.loss.shape[1] * float(costs.admissible.sum())), loss / costs.tokens, found / num_budgets


class TestAllocate:
    @pytest.mark.parametrize("key_budget", [0, 200, UNLIMITED])
    @pytest.mark.parametrize("group", [1, 3])
    def test_limits_hold_and_the_choice_says_what_it_costs(self, group, key_budget):
        costs = drawn_costs(4, 6, group)
        for density in (costs.least_density, 0.03, 0.13, 0.7, 1.0):
            choice = allocate(costs, density, key_budget)
            assert choice.density <= density
            assert choice.mean_key_budget <= key_budget
            assert (choice.density, choice.loss, choice.mean_key_budget) == pytest.approx(summed(costs, choice))
            assert [len(layer) for layer in choice.key_budget] == [6 // group] * 4

    @pytest.mark.parametrize("density", [0.03, 0.13, 0.7])
    def test_without_smallest_weights(self, density):
        costs = drawn_costs(4, 6, 2)
        choice = allocate(costs, density, UNLIMITED, fit_min_weight=False)
        alone = replace(costs, loss=costs.loss[..., :1], read=costs.read[..., :1])
        assert choice == allocate(alone, density, UNLIMITED)
        assert not any(map(any, choice.min_weight))
        assert choice.loss > allocate(costs, density, UNLIMITED).loss

    def test_more_density_never_costs_more(self):
        costs = drawn_costs(4, 6, 2)
        found = [allocate(costs, 0.0167 + i / 100, UNLIMITED) for i in range(0, 99, 3)]
        losses = [choice.loss for choice in found]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] > 2 * losses[10] > 4 * losses[25]
        densities = [choice.density for choice in found]
        assert densities == sorted(densities)

    def test_more_keys_to_find_never_cost_more(self):
        costs = replace(drawn_costs(4, 6, 2), admissible=torch.full((4,), 1e12))  # no layer becomes dense
        losses = [allocate(costs, 1e-5, key_budget).loss for key_budget in (0, 64, 300, 1000, UNLIMITED)]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] > 2 * losses[2] > 2 * losses[-1]

    @pytest.mark.parametrize("group", [1, 2])
    @pytest.mark.parametrize("seed", range(4))
    def test_choices_are_corners_of_the_convex_hull_of_all(self, monkeypatch, group, seed):
        """At every density it is the last corner that fits; hence no other choice both reads and loses less."""
        choices(monkeypatch, (0, 500, 2000), (0.0, 1e-3, 1e-2))
        costs = drawn_costs(2, 2 * group, group, seed)
        corners = lower_hull(*all_choices(costs))
        assert len(corners) >= 5
        total = costs.loss.shape[1] * float(costs.admissible.sum())
        for density in (costs.least_density, *(i / 40 for i in range(1, 41))):
            choice = allocate(costs, density, UNLIMITED)
            pairs, loss = [corner for corner in corners if corner[0] / total <= density * (1 + 1e-12)][-1]
            assert (choice.density, choice.loss) == pytest.approx((pairs / total, loss / TOKENS), rel=1e-9, abs=1e-12)


def lower_hull(pairs, loss):
    """Corners (pairs, loss) from which more pairs bring less loss, ever more slowly."""
    corners = []
    for point in sorted(zip(pairs.tolist(), loss.tolist(), strict=True)):
        if corners and point[1] >= corners[-1][1]:
            continue
        while len(corners) > 1 and slope(corners[-2], point) <= slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return corners


def slope(left, right):
    return (right[1] - left[1]) / max(right[0] - left[0], 1e-12)


def all_choices(costs):
    """Pairs read and loss in nats of every choice of two layers of two KV heads: two flat tensors."""
    num_heads, group = costs.loss.shape[1], costs.group
    layers = []
    for i in range(2):
        kv_heads = []
        for kv_head in range(2):
            options = []
            for budget in range(len(allocation.BUDGETS)):
                for weights in itertools.product(range(len(allocation.MIN_WEIGHTS)), repeat=group):
                    heads = [(i, kv_head * group + j, budget, w) for j, w in enumerate(weights)]
                    options.append([sum(float(x[h]) for h in heads) for x in (costs.read, costs.loss)])
            kv_heads.append(torch.tensor(options, dtype=torch.float64))
        sparse = (kv_heads[0][:, None] + kv_heads[1]).flatten(0, 1)  # [choices, 2]
        sparse[:, 0] += num_heads * costs.fixed[i]
        dense = torch.tensor([[num_heads * float(costs.admissible[i]), 0.0]], dtype=torch.float64)
        layers.append(torch.cat([sparse, dense]))
    return (layers[0][:, None] + layers[1]).flatten(0, 1).T


class TestCosts:
    def test_documents_add_up(self):
        one, two = (measure_layer(**drawn_layer(length, 4, 2, CONFIG, seed=length)) for length in (200, 260))
        both = one + two
        for name in ("loss", "read", "fixed", "admissible"):
            assert torch.equal(getattr(both, name), getattr(one, name) + getattr(two, name))
        assert (both.rows, both.tokens, both.group) == (460, 460, 2)

    def test_layers_without_attention_cost_nothing(self):
        layers = {i: measure_layer(**drawn_layer(200, 4, 2, CONFIG, seed=i)) for i in (1, 3)}
        costs = Costs.stack(layers, 5)
        assert len(costs.loss) == len(costs.read) == len(costs.fixed) == len(costs.admissible) == 5
        for i in range(5):
            for name in ("loss", "read", "fixed", "admissible"):
                expected = getattr(layers[i], name) if i in layers else torch.zeros_like(getattr(layers[1], name))
                assert torch.equal(getattr(costs, name)[i], expected)
        assert (costs.rows, costs.tokens, costs.group) == (200, 200, 2)
        assert costs.least_density == pytest.approx(layers[1].least_density)
        choice = allocate(costs, 0.9, UNLIMITED)
        assert choice.dense_layers == ()
        assert [choice.key_budget[i] for i in (0, 2, 4)] == [(0, 0)] * 3
