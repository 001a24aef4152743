"""Paths of one plain forward: what the attention is, and what it must never do."""

from helpers.batches import padded_batch, tokens
from helpers.checks import check_density, check_full_coverage, check_later_tokens, check_matches_reference
from helpers.families import tiny_model
from helpers.specification import TOLERANCE, dense_logits, logits, softmax_in_float64
from torch.testing import assert_close


def full_coverage(family):
    """Where rows read everything, by way of the window, the global tokens, the routed keys, `dense_below` or
    `dense_layers`, the output is that of the family's own eager attention, padding included."""
    for fields in (
        {"window_size": 60},
        {"num_global_tokens": 60},
        {"window_size": 1, "key_budget": 60, "min_weight": 0.0, "page_size": 1},
        {"dense_below": 60},
        {"dense_layers": [0, 1]},
    ):
        check_full_coverage(family, **fields)
    ids, mask, position_ids = padded_batch([tokens(length, seed=length)[0] for length in (40, 23)], "left", 2)
    inputs = {"attention_mask": mask, "position_ids": position_ids}
    for fields in ({"dense_below": 60}, {"dense_layers": [0, 1]}):
        with softmax_in_float64():
            ours = logits(tiny_model(family, **fields), ids, **inputs)
        assert_close(ours[mask.bool()], dense_logits(family, ids, **inputs)[mask.bool()], **TOLERANCE)


def forward(family):
    """One forward over a batch, without padding or a cache."""
    check_matches_reference(family)


def later_tokens(family):
    """Changing the tokens from any place on changes no earlier logit, to the last bit."""
    check_later_tokens(family)


def density(family):
    """`record_density` counts the (row, key) pairs that the specification reads."""
    check_density(family)


PATHS = {
    "forward": forward,
    "full coverage": full_coverage,
    "later tokens": later_tokens,
    "record_density": density,
}
