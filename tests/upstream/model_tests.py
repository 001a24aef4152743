"""Llama and Mistral under Transformers' own common model tests.

`run.py` puts those tests on the path as they come in the source distribution of the installed Transformers, which
lacks two modules that they import, the tests of `generate` and of the exporters: empty classes take their place.
"""

import sys
import types
import unittest

import numpy
import torch
import transformers

for module_name, class_name in {
    "tests.exporters.test_export": "ExportTesterMixin",
    "tests.generation.test_utils": "GenerationTesterMixin",
}.items():
    sys.modules[module_name] = types.ModuleType(module_name)
    setattr(sys.modules[module_name], class_name, type(class_name, (), {}))

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402

from tests import test_modeling_common, test_training_mixin  # noqa: E402


class WorstAsMean:
    """numpy, but the mean of flags is the worst of them: upstream lets one in five sequences of a batch differ."""

    mean = staticmethod(min)

    def __getattr__(self, name):
        return getattr(numpy, name)


test_modeling_common.np = WorstAsMean()


class TinyModel:
    """The small configs and inputs that the common tests ask for.

    With the usual initializer_range of 0.02, attention is nearly uniform and hardly changes the output; with much more
    than 0.15, SDPA itself leaves upstream's tolerances in float16.
    """

    batch_size, seq_length = 3, 9
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    is_training = True

    def __init__(self, family):
        self.config_class = getattr(transformers, f"{family}Config")
        self.causal_lm_class = getattr(transformers, f"{family}ForCausalLM")

    def get_config(self):
        return self.config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.15,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril(6)}


class CommonTests(
    test_modeling_common.ModelTesterMixin, GenerationTesterMixin, test_training_mixin.TrainingTesterMixin
):
    model_tester = None
    # Upstream's 300 steps of 64 tokens would take minutes; larger ones get as far in 60.
    training_overfit_steps, training_overfit_learning_rate, training_overfit_seq_length = 60, 1e-2, 32

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = TinyModel(self.family)

    @property
    def all_model_classes(self):
        heads = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
        return tuple(getattr(transformers, self.family + head) for head in heads)

    def test_left_padding(self):
        """Upstream's comparison with eager attention, which it runs for flash attention alone."""
        self.flash_attn_inference_equivalence("sdpa", "left")

    def test_right_padding(self):
        self.flash_attn_inference_equivalence("sdpa", "right")


class LlamaTest(CommonTests, unittest.TestCase):
    family = "Llama"


class MistralTest(CommonTests, unittest.TestCase):
    family = "Mistral"
