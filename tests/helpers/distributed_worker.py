"""What two processes check together over gloo on the CPU."""

import multiprocessing
import os
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.specification import TOLERANCE, logits
from hf_sparse_attn.logits import loss_in_chunks

WORLD_SIZE = 2
TIMEOUT = timedelta(seconds=60)


class TwoProcesses:
    """Two processes that know each other; started once for several checks, because that takes longer than any of them.

    Args:
        tmp_path_factory: pytest's; makes a directory for the file through which the processes meet.
    """

    def __init__(self, tmp_path_factory):
        self.tmp_path_factory = tmp_path_factory
        self.executors = []

    def run(self, function, *arguments):
        """Call `function(rank, *arguments)`, one of this module's, in both; an error in either is raised here."""
        if not self.executors:
            store = str(self.tmp_path_factory.mktemp("processes") / "store")
            spawn = multiprocessing.get_context("spawn")
            self.executors = [ProcessPoolExecutor(1, spawn, _start, (rank, store)) for rank in range(WORLD_SIZE)]
        calls = [executor.submit(function, rank, *arguments) for rank, executor in enumerate(self.executors)]
        done, waiting = wait(calls, return_when=FIRST_EXCEPTION)
        if waiting or any(call.exception() for call in done):
            self.stop()  # one of them may be left waiting for the other, until TIMEOUT
        for call in done:
            call.result()

    def stop(self):
        for executor in self.executors:
            executor.shutdown(wait=False)
        self.executors = []


def _start(rank, store):
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)})
    distributed.init_process_group("gloo", f"file://{store}", TIMEOUT, WORLD_SIZE, rank)


def check_ddp(rank, fields):
    """Gradients averaged over two halves of a batch are those of the whole batch."""
    ids = tokens(40, 4)
    model = DistributedDataParallel(tiny_model(**fields))
    loss(model(ids.chunk(WORLD_SIZE)[rank], use_cache=False), ids.chunk(WORLD_SIZE)[rank]).backward()
    torch.testing.assert_close(gradients(model.module), alone(ids, fields)[1], **TOLERANCE)


def check_fsdp(rank, fields):
    """Sharded parameters, with and without activation checkpointing, give the outputs and gradients of one process."""
    ids = tokens(40, 4)
    expected, expected_gradients = alone(ids, fields)
    for checkpointing in (None, "torch", "transformers"):
        model = tiny_model(**fields).train()
        if checkpointing == "transformers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for i, layer in enumerate(model.model.layers):
            if checkpointing == "torch":
                model.model.layers[i] = layer = checkpoint_wrapper(layer)
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        output = model(ids.chunk(WORLD_SIZE)[rank], use_cache=False)
        torch.testing.assert_close(output.logits, expected.chunk(WORLD_SIZE)[rank], **TOLERANCE)
        loss(output, ids.chunk(WORLD_SIZE)[rank]).backward()
        torch.testing.assert_close(gradients(model), expected_gradients, **TOLERANCE)


def check_loss_in_chunks(rank, sharded):
    """The model's own loss and gradients, its logits in chunks, under DDP or with sharded parameters.

    Both compute the loss in float32.
    """
    ids, found = tokens(40, 4).chunk(WORLD_SIZE)[rank], []
    for in_chunks in (False, True):
        model = tiny_model().train()
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            wrapped = fully_shard(model, reshard_after_forward=True)
        else:
            wrapped = DistributedDataParallel(model)
        with pytest.MonkeyPatch.context() as patch, loss_in_chunks(wrapped) if in_chunks else nullcontext():
            patch.setattr("hf_sparse_attn.logits.CHUNK_BYTES", 7 * 4 * 64)
            output = wrapped(input_ids=ids, labels=ids, use_cache=False)
        assert output.logits.shape[1] == (1 if in_chunks else 40)
        output.loss.backward()  # outside of the block, as Trainer does it
        found.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def check_transformers_tensor_parallel(rank, paths, plan=None):
    """`from_pretrained` over two processes gives the outputs, gradients and new tokens of one process."""
    for path in paths:
        model = load_parallel(path, plan)
        check_parallel(model, AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse"))


def check_torch_tensor_parallel(rank, features):
    """As above, with heads split by torch's own `parallelize_module`."""
    mesh = distributed.init_device_mesh("cpu", (WORLD_SIZE,))
    for fields in features:
        model = tiny_model(**fields)
        for layer in model.model.layers:
            plan = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}
            parallelize_module(layer.self_attn, mesh, plan)
        check_parallel(model, tiny_model(**fields))


def check_refused_split(rank, path, plan, message):
    """One clear error in every process, before any of them waits for another."""
    with pytest.raises(ValueError, match=message):
        logits(load_parallel(path, plan), tokens(40, 2))


def load_parallel(path, plan):
    """`plan` changes the parallel style of single projections of every layer's attention."""
    plan = plan and {f"model.layers.*.self_attn.{name}": style for name, style in plan.items()}
    return AutoModelForCausalLM.from_pretrained(
        path,
        attn_implementation="sparse",
        distributed_config=DistributedConfig(tp_size=WORLD_SIZE, tp_plan=plan),
    )


def check_parallel(model, single):
    ids = tokens(40, 2)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    both = [m(ids, use_cache=False) for m in (model, single)]
    torch.testing.assert_close(both[0].logits, both[1].logits, **TOLERANCE)
    for output in both:
        loss(output, ids).backward()
    torch.testing.assert_close(gradients(model), gradients(single), **TOLERANCE)
    torch.testing.assert_close(logits(model, ids), both[1].logits.detach(), **TOLERANCE)
    ids, mask, _ = padded_batch([tokens(30)[0], tokens(21, seed=1)[0]], "left", 2)
    generated = [
        m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, single)
    ]
    assert torch.equal(*generated)


def alone(ids, fields):
    """Logits and gradients of one process."""
    model = tiny_model(**fields)
    output = model(ids, use_cache=False)
    loss(output, ids).backward()
    return output.logits.detach(), gradients(model)


def loss(output, ids):
    """In the dtype of the logits; the models' own loss is computed in float32."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    """Gradients by parameter name, gathered from the processes where they are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name.replace("_checkpoint_wrapped_module.", "")] = gradient
    return found
