"""Paths of training and of lower precision."""

import torch
from helpers.batches import packed_documents, padded_batch, tokens
from helpers.checks import check_gradients
from helpers.families import tiny_model
from helpers.specification import dense_logits, logits, specified


def log_likelihood(output, ids):
    return output.logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def assert_specified_gradients(model, family, rows, **sparse):
    """The gradients of `model` are the specification's of the sum of the rows' log likelihoods."""
    oracle = tiny_model(family, **sparse)
    oracle.config.sparse_attention["implementation"] = "reference"
    for row in rows:
        log_likelihood(oracle(row[None], use_cache=False), row[None]).sum().backward()
    for (name, found), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert expected.grad.any(), name
        tolerance = 1e-5 if "norm" in name else 1e-8  # Gemma adds up the gradients of its norms in float32
        torch.testing.assert_close(found.grad, expected.grad, rtol=tolerance, atol=tolerance)


def padded_gradients(family):
    """Gradients of all weights over a batch padded on the left, the right or both sides."""
    rows = [tokens(length, seed=length)[0] for length in (35, 22)]
    for side in ("left", "right", "mixed"):
        model = tiny_model(family)
        ids, mask, position_ids = padded_batch(rows, side, 4)
        output = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        (log_likelihood(output, ids) * mask).sum().backward()
        assert_specified_gradients(model, family, rows)


def packed_gradients(family):
    """Gradients of all weights over packed documents."""
    model = tiny_model(family)
    rows, position_ids = packed_documents()
    ids = torch.cat(rows)[None]
    log_likelihood(model(ids, position_ids=position_ids, use_cache=False), ids).sum().backward()
    assert_specified_gradients(model, family, rows)


def gradient_checkpointing(family, **sparse):
    """Gradients with `gradient_checkpointing_enable`, reentrant or not."""
    rows = tokens(35, 2)
    for use_reentrant in (False, True):
        model = tiny_model(family, **sparse).train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        log_likelihood(model(rows, use_cache=False), rows).sum().backward()
        assert_specified_gradients(model, family, rows, **sparse)


def dropout(family):
    """Attention dropout in training."""
    model = tiny_model(family).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    logits(model, tokens(40))


def bfloat16(family):
    """A bfloat16 model errs at most twice as much as its own eager attention does, both against float64."""
    check_precision(family, torch.bfloat16, lambda model, ids: logits(model, ids))


def autocast(family):
    """A float32 model under autocast to bfloat16, likewise; gradients are finite."""

    def forward(model, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model, ids)

    check_precision(family, torch.float32, forward)
    model, ids = tiny_model(family, dtype=torch.float32).train(), tokens(40, 2)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


def check_precision(family, dtype, forward):
    """Without routed keys, whose choice hangs on the last bits."""
    ids = tokens(40, 2)
    expected = torch.stack([specified(family, row, key_budget=0) for row in ids])
    found = forward(tiny_model(family, dtype=dtype, key_budget=0), ids)
    assert found.dtype == torch.bfloat16
    error = (found - expected).abs().mean()
    dense_error = (forward(tiny_model(family, "eager", dtype), ids) - dense_logits(family, ids)).abs().mean()
    assert 0 < error < 2 * dense_error
    assert forward(tiny_model(family, dtype=dtype), ids).isfinite().all()


PATHS = {
    "gradients": check_gradients,
    "gradients with padding": padded_gradients,
    "gradients of packed documents": packed_gradients,
    "gradient checkpointing": gradient_checkpointing,
    "attention dropout": dropout,
    "bfloat16": bfloat16,
    "autocast": autocast,
}
