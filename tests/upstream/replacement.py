"""A pytest plugin: what computes the attention called "sdpa" in this process, and a record of what became of each test.

Rows that read everything must give dense attention's output, whichever part of the pattern finds the keys. One thing is
kept from the sparse attention: `output_attentions=True`, which it refuses and SDPA ignores with a warning.
"""

import json
from unittest import mock

NOTHING = {"window_size": 1, "num_global_tokens": 0, "key_budget": 0, "min_weight": 0.0, "dense_below": 0}
EVERYTHING = {
    "window": {**NOTHING, "window_size": 4096},
    "routed": {**NOTHING, "key_budget": 4096, "num_hash_bits": 2, "page_size": 1},
    "dense": {**NOTHING, "dense_below": 4096},
}


def zero_output(attention, *args, **kwargs):
    output, weights = attention(*args, **kwargs)
    return 0 * output, weights


def no_gradient(attention, *args, **kwargs):
    output, weights = attention(*args, **kwargs)
    return output.detach(), weights


def ignore_mask(attention, module, query, key, value, attention_mask, **kwargs):
    return attention(module, query, key, value, None, **kwargs)


def ignore_sliding_window(attention, *args, sliding_window=None, **kwargs):
    return attention(*args, **kwargs)


def double_scaling(attention, *args, scaling, **kwargs):
    return attention(*args, scaling=2 * scaling, **kwargs)


def swap_kv_heads(attention, module, query, key, value, *args, **kwargs):
    return attention(module, query, key.flip(1), value.flip(1), *args, **kwargs)


BROKEN = {
    function.__name__.replace("_", " "): function
    for function in (zero_output, no_gradient, ignore_mask, ignore_sliding_window, double_scaling, swap_kv_heads)
}


def pytest_addoption(parser):
    parser.addoption("--attention", choices=["sdpa", *EVERYTHING], required=True)
    parser.addoption("--broken", choices=BROKEN, help="break the attention on purpose")
    parser.addoption("--outcomes", required=True, help="JSON file to write")


def pytest_configure(config):
    config.pluginmanager.register(Replacement(config.option))


class Replacement:
    def __init__(self, option):
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.path, self.calls, self.wants_weights, self.tests = option.outcomes, 0, False, {}
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"] if option.attention == "sdpa" else sparse(option.attention)
        broken = BROKEN.get(option.broken)

        def counted(*args, output_attentions=False, **kwargs):
            self.calls += 1
            self.wants_weights |= bool(output_attentions)
            return broken(attention, *args, **kwargs) if broken else attention(*args, **kwargs)

        AttentionInterface.register("sdpa", counted)

    def pytest_runtest_logstart(self):
        self.calls, self.wants_weights = 0, False

    def pytest_runtest_logreport(self, report):
        test = self.tests.setdefault(report.nodeid.split("::", 1)[1], {"outcome": "passed"})
        test.update(attention_calls=self.calls, output_attentions=self.wants_weights)
        if report.failed:
            test["outcome"] = "failed"
            test.setdefault("reason", report.longrepr.reprcrash.message.splitlines()[0])
        elif report.skipped and not hasattr(report, "context"):  # a skipped subtest skips no test
            test["outcome"] = "skipped"

    def pytest_sessionfinish(self):
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        with open(self.path, "w") as file:
            json.dump({"versions": versions, "tests": self.tests}, file)


def sparse(coverage):
    """Our attention function; it gets our masks, and a configuration by which every row reads everything."""
    from transformers.masking_utils import AttentionMaskInterface

    from hf_sparse_attn import SparseAttentionConfig
    from hf_sparse_attn.integration import sparse_attention_forward
    from hf_sparse_attn.masks.mask_function import signed_positions

    AttentionMaskInterface.register("sdpa", signed_positions)
    from_dict = SparseAttentionConfig.from_dict
    # Not through the models' own configs, which the tests save and compare.
    SparseAttentionConfig.from_dict = staticmethod(lambda fields: from_dict(fields or EVERYTHING[coverage]))
    if coverage == "dense":
        return sparse_attention_forward

    def without_sdpa(*args, **kwargs):
        shortcut = AssertionError("the sparse attention took a shortcut through SDPA")
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=shortcut):
            return sparse_attention_forward(*args, **kwargs)

    return without_sdpa
