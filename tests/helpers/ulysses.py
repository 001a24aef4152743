"""Sequence parallelism in the way of Ulysses, over two processes: DeepSpeed's own, or a small one in its place."""

import sys
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers import families
from helpers.batches import tokens
from helpers.families import tiny_model
from hf_sparse_attn import split_heads
from hf_sparse_attn.integration import sparse_attention_forward

STATE = "deepspeed.runtime.sequence_parallel.parallel_state_sp"


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts):
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts.contiguous())
        return received

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad)


def exchanging(attention, module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """Attention over all tokens with this process's part of the heads: [batch, heads, part of the tokens, head_dim]."""
    size = distributed.get_world_size()
    gathered = [torch.empty_like(position_ids) for _ in range(size)]
    distributed.all_gather(gathered, position_ids.contiguous())

    def part_of_heads(x):
        if x.shape[1] < size:  # as DeepSpeed repeats KV heads
            x = x.repeat_interleave(size // x.shape[1], 1)
        received = _AllToAll.apply(torch.stack(x.chunk(size, 1)))
        return torch.cat(received.unbind(), 2)

    given = {"position_ids": torch.cat(gathered, 1), **kwargs}
    output, _ = attention(module, *map(part_of_heads, (query, key, value)), None, **given)
    return torch.cat(_AllToAll.apply(torch.stack(output.chunk(size, 1))).unbind(), 2), None


@contextmanager
def _own(model, told):
    """A small Ulysses; which part it is says "a stand-in" for DeepSpeed's module, "split_heads" or "nobody"."""

    def attention(*args, **kwargs):
        return exchanging(sparse_attention_forward, *args, **kwargs)

    stand_in = ModuleType(STATE)
    stand_in._SEQUENCE_PARALLEL_GROUP = distributed.group.WORLD
    stand_in.get_sequence_parallel_rank = distributed.get_rank
    stand_in.get_sequence_parallel_world_size = distributed.get_world_size
    if told == "split_heads":
        split_heads(model, distributed.get_rank(), distributed.get_world_size())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sparse", attention)
        if told == "a stand-in":
            patch.setitem(sys.modules, STATE, stand_in)
        yield


@contextmanager
def _deepspeed(model, told):
    import deepspeed.comm
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.comm.init_distributed("gloo", verbose=False)
    UlyssesSPAttentionHF.register_with_transformers(model, "sparse", distributed.get_world_size(), 1)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sparse")
        parallel_state_sp._release_sequence_parallel_groups()


def _ulysses(model, told):
    return (_deepspeed if told == "deepspeed" else _own)(model, told)


def check_equal(rank, told, cases, length, dtype, tolerance, compiled=False):
    """Loss and gradients over all tokens are those of one process, documents packed.

    cases: (family, fields of SparseAttentionConfig) each.
    """
    size = distributed.get_world_size()
    ids = tokens(length)
    lengths = (length // 3, 1, length // 2 + 3)
    position_ids = torch.cat([torch.arange(n) for n in (*lengths, length - sum(lengths))])[None]
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)

    def part_of_loss(model, part):
        mine = [x.chunk(size, 1)[rank] if part else x for x in (ids, position_ids, targets)]
        logits = model(mine[0], position_ids=mine[1], use_cache=False).logits
        return F.cross_entropy(logits[0], mine[2][0], ignore_index=-100, reduction="sum") / (length - 1)

    for family, fields in cases:
        single, model = (tiny_model(family, dtype=dtype, **fields).train() for _ in range(2))
        expected = part_of_loss(single, False)
        expected.backward()
        with _ulysses(model, told):
            loss = part_of_loss(torch.compile(model, backend="eager") if compiled else model, True)
            loss.backward()
        found = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
        for x in found:
            distributed.all_reduce(x)
        wanted = [expected.detach(), *(parameter.grad for parameter in single.parameters())]
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, **tolerance, msg=lambda m, f=family: f"{f}: {m}")


def check_refused(rank, told, num_heads, num_kv_heads, message):
    """One clear error in every process, before any of them waits for another."""
    with mock.patch.multiple(families, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads):
        model = tiny_model()
    ids = tokens(40).chunk(distributed.get_world_size(), 1)[rank]
    with _ulysses(model, told), pytest.raises(ValueError, match=message), torch.no_grad():
        model(ids, position_ids=torch.arange(20)[None] + 20 * rank, use_cache=False)


def check_others_go_on(rank):
    """A layer with fewer heads than its model's config says, by its own projection, is no part of another."""
    model = tiny_model()
    ids = tokens(40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.config.num_attention_heads *= 2
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
