"""The check of Triton's kernels before their first use, in Triton's interpreter, with kernels that are broken."""

import logging

import pytest
import torch
from helpers.cases import inputs, pattern_of
from helpers.operation import attend

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.benchmarking import gpu_check
from hf_sparse_attn.ops import dispatch, self_check
from hf_sparse_attn.ops.common.call import AttentionCall

pytest.importorskip("triton")
from hf_sparse_attn.ops.triton import chunks
from hf_sparse_attn.ops.triton import index as triton_index
from hf_sparse_attn.ops.triton import launch as triton_launch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CONFIG = SparseAttentionConfig(
    window_size=10, num_global_tokens=3, key_budget=12, min_weight=0.01, page_size=16, dense_below=9
)
TRIAL = self_check.Trial(self_check.Kind(DEVICE, torch.float32, 8, 2), 1, 37, CONFIG, (3, 2), 0.4, 5.0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """The first calls of a process, on a device whose kernels are checked."""
    monkeypatch.setattr(self_check, "_problems", {})
    monkeypatch.setattr(self_check, "_applies_to", lambda device: True)
    monkeypatch.setattr(dispatch, "_best", lambda device: "triton")
    self_check._tell_once.cache_clear()


@pytest.fixture
def no_kernel_runs(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(triton_launch, "launch", fail)


@pytest.fixture
def trials(monkeypatch):
    """All trials that the check makes; kernels pass them."""
    made = []
    monkeypatch.setattr(self_check, "find_problem", lambda backend, trial: made.append(trial))
    return made


def backend():
    return dispatch.find_backend("triton", DEVICE)


def call(implementation="auto", dtype=torch.float32, num_heads=4, dim=8, **fields):
    """Attention over 40 tokens, of which all rows are sparse unless `fields` say otherwise."""
    pattern = pattern_of(fields, num_heads=num_heads, dim=dim, dtype=torch.float32, device=DEVICE)
    tensors = [x.to(dtype) for x in inputs(40, 40, num_heads=num_heads, dim=dim, device=DEVICE)]
    return attend(*tensors, pattern, implementation)


def test_right_kernels_pass():
    assert self_check.share_off(backend(), TRIAL) == {"forward": 0, "backward": 0, "decoding": 0}
    assert self_check.find_problem(backend(), TRIAL) is None


@pytest.mark.parametrize(
    ("module", "launcher", "place", "part"),
    [
        (chunks, "fwd", 0, "forward"),
        (chunks, "bwd_dq", 0, "backward"),
        (chunks, "bwd_dkv_older", 1, "backward"),
        (triton_index, "decode", 0, "decoding"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_value_is_found(module, launcher, place, part, monkeypatch):
    """What the launcher of a kernel fills is off by a tenth in one row."""
    launch = getattr(module, launcher)

    def launch_wrong(*args, **kwargs):
        result = launch(*args, **kwargs)
        args[place][0, 0] += 0.1 + args[place][0, 0].abs()
        return result

    monkeypatch.setattr(module, launcher, launch_wrong)
    off = self_check.share_off(backend(), TRIAL)
    assert off[part] > 0
    others = {"forward": (), "backward": ("forward", "decoding"), "decoding": ("forward", "backward")}[part]
    assert all(off[other] == 0 for other in others)
    monkeypatch.setattr(self_check, "share_off", lambda *_: off)
    told = self_check.find_problem(backend(), TRIAL)
    assert f"of the rows of {part}" in told
    assert told.endswith("differ from PyTorch's operations by more than 0.001")


def test_rounding_may_decide_one_trial(monkeypatch):
    shares = [{"forward": 0.1}, {"forward": 0.0}]
    monkeypatch.setattr(self_check, "share_off", lambda backend, trial, seed: shares[seed])
    assert self_check.find_problem(backend(), TRIAL) is None


def test_what_is_not_finite_is_off():
    x = torch.ones(1, 4, 3)
    wrong = x.clone()
    wrong[0, 2, 1] = torch.nan
    assert self_check._share_off([wrong], [x.double()], 0.05) == 0.25


def test_auto_falls_back_with_one_warning(no_kernel_runs, caplog):
    with caplog.at_level(logging.WARNING, "hf_sparse_attn"):
        outputs = [call() for _ in range(2)]
    told = [record.getMessage() for record in caplog.records]
    where = f"torch.float32 on {DEVICE}, head_dim 8, 2 query heads per KV head"
    assert len(told) == 1
    assert f"not right for {where}: RuntimeError: no kernel image is available;" in told[0]
    assert "`hf-sparse-attn info --gpu`" in told[0]
    assert "PyTorch's operations, which are slower" in told[0]
    assert all(torch.equal(output, call("torch")) for output in outputs)


def test_decoding_falls_back(no_kernel_runs):
    """An index that Triton's kernels were to fill is left alone."""
    pattern = pattern_of({}, dtype=torch.float32, device=DEVICE)
    tensors = [x.float() for x in inputs(40, 40, device=DEVICE)]
    index = triton_index.Index(pattern, 2, 0)
    output = attend(tensors[0][:, -1:], *tensors[1:], pattern, "auto", index=index)
    torch.testing.assert_close(output, call("torch")[:, -1:])
    assert index.length == 0


def test_an_error_where_it_is_asked_for_by_name(no_kernel_runs):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r'implementation="triton": the Triton kernels are not right .* "torch"'):
            call("triton")


def test_results_are_kept_by_dtype_head_dim_and_group(trials, monkeypatch):
    monkeypatch.setattr(triton_launch, "launch", lambda *args, **kwargs: None)
    different = [{}, {"dtype": torch.float16}, {"dim": 16}, {"num_heads": 6}]
    for fields in different + different:
        call(**fields)
    assert [trial.kind[1:] for trial in trials] == [
        (torch.float32, 8, 2),
        (torch.float16, 8, 2),
        (torch.float32, 16, 2),
        (torch.float32, 8, 3),
    ]


def test_constants_are_those_of_the_call(trials):
    pattern = pattern_of({"min_weight": 0.0, "page_size": 24}, dtype=torch.float32, device=DEVICE)
    query, key, _ = inputs(40, 40, device=DEVICE)
    self_check.checked(backend(), query.float(), key.float(), AttentionCall(pattern, 0, 0, 0.3, 9.0))
    assert (trials[0].codebooks, trials[0].scaling, trials[0].softcap) == ((3, 2), 0.3, 9.0)
    assert (trials[0].config.page_size, trials[0].config.min_weight) == (24, 0.0)


def test_dense_rows_check_nothing(trials):
    call(dense_below=40)
    call("torch")
    assert not trials


def test_a_kernel_that_is_interpreted_is_not_checked(trials, monkeypatch):
    monkeypatch.undo()
    assert self_check._applies_to(torch.device("cuda", 0))
    assert not self_check._applies_to(torch.device("cpu"))


def test_modes_of_the_caller_do_not_reach_the_check(monkeypatch):
    seen = []

    def find_problem(backend, trial):
        (torch.ones(2, requires_grad=True) ** 2).sum().backward()
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))

    def never(x):
        pytest.fail("checkpointing sees the check")

    monkeypatch.setattr(self_check, "find_problem", find_problem)
    pattern, (query, key, _) = pattern_of({}, device=DEVICE), inputs(40, 40, device=DEVICE)
    hooks = torch.autograd.graph.saved_tensors_hooks(never, never)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), hooks:
        self_check.checked(backend(), query, key, AttentionCall(pattern))
    assert seen == [(True, False, False)]


def test_a_graph_that_is_captured_is_not_checked(trials, monkeypatch, caplog):
    pattern, (query, key, _) = pattern_of({}, device=DEVICE), inputs(40, 40, device=DEVICE)
    monkeypatch.setattr(self_check, "_hindrance", lambda device: "a CUDA graph is captured")
    for _ in range(2):
        assert self_check.checked(backend(), query, key, AttentionCall(pattern)) is backend()
    assert not trials
    assert [record.getMessage() for record in caplog.records] == [
        f"Triton kernels run before they are checked for torch.float64 on {query.device}, head_dim 8, 2 query heads "
        "per KV head: a CUDA graph is captured; run a forward before it"
    ]
    monkeypatch.setattr(self_check, "_hindrance", lambda device: None)
    self_check.checked(backend(), query, key, AttentionCall(pattern))
    assert len(trials) == 1


def test_nothing_is_checked_inside_a_backward(trials, caplog):
    pattern, (query, key, _) = pattern_of({}, device=DEVICE), inputs(40, 40, device=DEVICE)
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda grad: self_check.checked(backend(), query, key, AttentionCall(pattern)) and None)
    leaf.sum().backward()
    assert not trials
    assert "a backward runs" in caplog.text


class TestAtLength:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setattr(gpu_check, "DTYPES", (torch.float32,))
        monkeypatch.setattr(gpu_check, "SHAPES", ((2, 1, 8),))
        monkeypatch.setattr(gpu_check, "CHECKED_LENGTHS", (41,))
        monkeypatch.setattr(gpu_check, "TIMED_LENGTHS", (33,))

    def test_rows(self):
        checked, timed = gpu_check.check_gpu(DEVICE, lambda line: None)
        assert checked["problem"] is None
        assert checked["off"] == {"forward": 0, "backward": 0, "decoding": 0}
        assert (checked["dtype"], checked["num_heads"], checked["seq_len"]) == ("float32", 2, 41)
        assert timed["problem"] is None
        assert all(timed[f"{name}_ms"] > 0 for name in ("sparse", "dense", "both_sparse", "both_dense"))

    def test_a_problem_is_a_row(self, no_kernel_runs, monkeypatch):
        checked, _ = gpu_check.check_gpu(DEVICE, lambda line: None)
        assert checked["problem"] == "RuntimeError: no kernel image is available"

    def test_rows_that_differ(self, monkeypatch):
        monkeypatch.setattr(gpu_check, "share_off", lambda *_: {"forward": 0.0, "backward": 0.5, "decoding": 0.005})
        checked, _ = gpu_check.check_gpu(DEVICE, lambda line: None)
        assert checked["problem"] == "50.0% of the rows of backward differ by more than 0.001"
