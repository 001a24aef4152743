"""Paths through `torch.compile` and `torch.export`."""

import torch
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.specification import assert_specified
from transformers import StaticCache

from hf_sparse_attn import SparseStaticCache
from matrix.training import assert_specified_gradients, log_likelihood


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def compiled_decode(family):
    """`torch.compile(fullgraph=True)` of one step with `StaticCache` and `SparseStaticCache`, after a prefill that is
    not compiled."""
    model, ids = tiny_model(family), tokens(32, 2)
    for of_class in (StaticCache, SparseStaticCache):
        cache = of_class(config=model.config, max_cache_len=40)
        step = compiled(model.forward)
        with torch.no_grad():
            model(ids[:, :28], past_key_values=cache, use_cache=True)
            pieces = [step(ids[:, p : p + 1], past_key_values=cache, use_cache=True).logits for p in range(28, 32)]
        for part, row in zip(torch.cat(pieces, 1), ids, strict=True):
            assert_specified(part, family, row)


def compiled_training(family):
    """`torch.compile(fullgraph=True)` of a forward over a padded batch, and its backward."""
    rows = [tokens(length, seed=length)[0] for length in (35, 22)]
    model = tiny_model(family).train()
    ids, mask, position_ids = padded_batch(rows, "right", 2)
    output = compiled(model.forward)(ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    for part, row in zip(output.logits.detach(), rows, strict=True):
        assert_specified(part[: len(row)], family, row)
    (log_likelihood(output, ids) * mask).sum().backward()
    assert_specified_gradients(model, family, rows)


def exported(family):
    """`torch.export` of a forward over a padded batch; the graph is then given other tokens and other padding."""
    model = tiny_model(family)
    example, _ = inputs_of_export("left", (40, 21), seed=1)
    with torch.no_grad():
        graph = torch.export.export(model, (), {**example, "use_cache": False}).module()
        inputs, rows = inputs_of_export("right", (40, 33), seed=2)
        together = graph(**inputs, use_cache=False).logits
    for part, row in zip(together, rows, strict=True):
        assert_specified(part[: len(row)], family, row)


def inputs_of_export(side, lengths, seed):
    rows = [tokens(length, seed=seed)[0] for length in lengths]
    ids, mask, position_ids = padded_batch(rows, side, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}, rows


PATHS = {
    "torch.compile of a decode step": compiled_decode,
    "torch.compile of training": compiled_training,
    "torch.export": exported,
}
