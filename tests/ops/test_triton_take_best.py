"""The keys that a row takes of its buckets, against sorted scores; in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from hf_sparse_attn.ops.triton.choose_buckets import take_best

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, BUCKETS = 4, 64


@triton.jit
def take_best_kernel(score, available, taken, budget, BUCKETS: tl.constexpr):  # noqa: N803
    place = tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS)
    tl.store(taken + place, take_best(tl.load(score + place), tl.load(available + place), budget))


def taken_by_kernel(score, available, budget):
    taken = torch.full_like(available, -1, device=DEVICE)
    take_best_kernel[(ROWS,)](score.to(DEVICE), available.to(DEVICE), taken, budget, BUCKETS)
    return taken.cpu()


def taken_in_order(score, available, budget):
    """Bucket after bucket from the best down, among equal ones from the highest number down."""
    taken = torch.zeros_like(available)
    for row, scores in enumerate(score.tolist()):
        left = budget
        for bucket in sorted(range(BUCKETS), key=lambda bucket: (scores[bucket], bucket), reverse=True):
            taken[row, bucket] = min(int(available[row, bucket]), left)
            left -= int(taken[row, bucket])
    return taken


def zeros(score):
    score[:, ::2] = 0.0
    score[:, 1::3] = -0.0


def infinities(score):
    score[:, ::5] = torch.inf
    score[1] = torch.inf
    score[2, ::3] = -torch.inf


def neighbours(score):
    """Numbers side by side at both ends of a range that spans all sizes."""
    one = torch.ones_like(score)
    step = torch.finfo(score.dtype).eps * torch.arange(BUCKETS)
    score.copy_(torch.where(score > 0, one + step, -one - step))
    score[:, 0] = 1e30


def outlier(score):
    score[:, 7] = -1e37


SCORES = {
    "different": lambda score: None,
    "ties": lambda score: score.mul_(2).round_().div_(2),
    "all alike": lambda score: score.fill_(-0.75),
    "of all sizes": lambda score: score.mul_(10.0 ** torch.arange(-32, 32)),
    "denormal": lambda score: score.mul_(torch.finfo(score.dtype).tiny / 64),
    "largest numbers": lambda score: score.clamp_(-2, 2).mul_(torch.finfo(score.dtype).max / 16),
    "too far apart for a difference": lambda score: score.sign_().mul_(torch.finfo(score.dtype).max),
    "side by side": neighbours,
    "one far away": outlier,
    "zeros": zeros,
    "infinities": infinities,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", SCORES.values(), ids=SCORES.keys())
def test_like_sorted_scores(change, dtype):
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(ROWS, BUCKETS, generator=generator, dtype=dtype)
    change(score)
    available = torch.randint(0, 9, (ROWS, BUCKETS), generator=generator, dtype=torch.int32)
    available[3] = 0
    available[score == -torch.inf] = 0
    for budget in (0, 1, 2, 40, 100, int(available[0].sum()), 1000):
        expected = taken_in_order(score, available, budget)
        assert torch.equal(taken_by_kernel(score, available, budget), expected), budget


def test_buckets_without_keys_do_not_matter():
    score = torch.randn(ROWS, BUCKETS, generator=torch.Generator().manual_seed(0))
    available = torch.ones(ROWS, BUCKETS, dtype=torch.int32)
    available[:, ::4] = 0
    expected = taken_in_order(score, available, 20)
    for nothing in (torch.nan, torch.inf, -torch.inf, 1e38, -1e38):
        score[:, ::4] = nothing
        assert torch.equal(taken_by_kernel(score, available, 20), expected), nothing


def test_one_bucket_holds_more_than_the_budget():
    score = torch.linspace(-1, 1, BUCKETS).expand(ROWS, BUCKETS).contiguous()
    available = torch.full((ROWS, BUCKETS), 2**20, dtype=torch.int32)
    taken = taken_by_kernel(score, available, 1000)
    assert taken[:, -1].tolist() == [1000] * ROWS
    assert not taken[:, :-1].any()
