"""Encoders of Transformers, and decoders made bidirectional: their masks, windows, padding, packing and gradients."""

import pytest
import torch
import transformers as hf
from helpers.batches import padded_batch, tokens
from helpers.families import SPARSE
from helpers.specification import TOLERANCE, softmax_in_float64
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from hf_sparse_attn import record_density
from hf_sparse_attn.masks import read
from hf_sparse_attn.masks.both_sides import read_mask
from hf_sparse_attn.ops import torch as torch_ops
from hf_sparse_attn.ops.common.band import Band
from hf_sparse_attn.routing_both_sides import BothSidesChunk, BothSidesIndex

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ONE_OF_EACH = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**ONE_OF_EACH, "num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
SPECIAL = {"cls_token_id": None, "sep_token_id": None}


MODELS = {
    "bert": (hf.BertConfig, hf.BertModel, NO_DROPOUT),
    "modernbert": (hf.ModernBertConfig, hf.ModernBertModel, {**ONE_OF_EACH, **SPECIAL, "local_attention": 14}),
    "llama": (hf.LlamaConfig, hf.LlamaModel, {"num_key_value_heads": 2, "is_causal": False}),
    "mistral": (hf.MistralConfig, hf.MistralModel, {"num_key_value_heads": 2, "sliding_window": 9, "is_causal": False}),
    "embeddinggemma": (
        hf.Gemma3TextConfig,
        hf.Gemma3TextModel,
        {**GEMMA, "sliding_window": 16, "use_bidirectional_attention": True},
    ),
    "t5gemma": (hf.T5GemmaModuleConfig, T5GemmaEncoder, {**GEMMA, "sliding_window": 8, "dropout_rate": 0.0}),
}
PADDED = [40, 33, 1]
EVERYTHING = {"window_size": 60}


def encoder(family, attention="sparse", **sparse):
    """The same random weights for every implementation, in float64."""
    config_class, model_class, extra = MODELS[family]
    config = config_class(**SHAPE, **extra, attn_implementation=attention)
    config.sparse_attention = {**SPARSE, **sparse}
    torch.manual_seed(0)
    return model_class(config).double().eval()


def states(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).last_hidden_state


def batch(side="right"):
    rows = [tokens(length, seed=length)[0] for length in PADDED]
    ids, mask, _ = padded_batch(rows, side, 2)
    return ids, mask


@pytest.mark.parametrize("family", MODELS)
def test_reading_everything_is_eager_attention(family):
    """With the windows of each family as it has them, padded on either side and not at all."""
    ours, eager = encoder(family, **EVERYTHING), encoder(family, "eager")
    for ids, mask in (batch("right"), batch("left"), (tokens(40, 2), None)):
        with torch.no_grad(), softmax_in_float64():
            found, expected = (states(model, ids, attention_mask=mask) for model in (ours, eager))
        keep = torch.ones_like(ids).bool() if mask is None else mask.bool()
        torch.testing.assert_close(found[keep], expected[keep], rtol=1e-5, atol=1e-5)  # RoPE and norms are in float32


@pytest.mark.parametrize("family", MODELS)
def test_padded_rows_are_those_of_the_specification_alone(family):
    ids, mask = batch()
    with torch.no_grad():
        together = states(encoder(family, num_random_keys=2), ids, attention_mask=mask)
        reference = encoder(family, num_random_keys=2, implementation="reference")
        dense = states(encoder(family, **EVERYTHING), ids, attention_mask=mask)
        for row, length, found in zip(ids, PADDED, together, strict=True):
            expected = states(reference, row[None, :length])[0]
            torch.testing.assert_close(found[:length], expected, rtol=1e-5, atol=1e-5)
    assert (together - dense)[0, :40].abs().amax() > 1e-2


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients(family, checkpointing):
    """Those of the specification, also where the forward is computed again."""
    gradients = []
    for implementation in ("auto", "reference"):
        model = encoder(family, implementation=implementation).train()
        if checkpointing and implementation == "auto":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = batch()
        (states(model, ids, attention_mask=mask)[mask.bool()] ** 2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("0" in name and grad.any() for name, grad in gradients[0].items())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "window"), [("bert", None), ("llama", None), ("embeddinggemma", 9)])
def test_density_is_of_all_pairs_of_a_document(family, window):
    model = encoder(family)
    ids, mask = batch()
    with torch.no_grad(), record_density(model) as density:
        states(model, ids, attention_mask=mask)
    own = [window, None] if window else [None, None]
    pairs = [
        sum(abs(i - j) < (width or length) for i in range(length) for j in range(length))
        for width in own
        for length in PADDED
    ]
    assert density.admissible == 4 * sum(pairs)
    assert 0 < density.attended <= density.scored < density.admissible


def packed_inputs():
    lengths = (21, 1, 18)
    rows = [tokens(length, seed=length)[0] for length in lengths]
    return rows, torch.cat(rows)[None], torch.tensor([0, *lengths]).cumsum(0)


def packed_arguments(path, cu_seq_lens):
    """What tells the documents apart, and nothing else does."""
    lengths = cu_seq_lens.diff().tolist()
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (number[:, None] == number)[None, None]
    return {
        "position_ids": {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]},
        "cu_seq_lens": {"cu_seq_lens_q": cu_seq_lens.int()},
        "4D mask": {"attention_mask": own},
        "added 4D mask": {"attention_mask": torch.zeros(own.shape).masked_fill(~own, torch.finfo().min)},
    }[path]


@pytest.mark.parametrize("path", ["position_ids", "cu_seq_lens", "4D mask", "added 4D mask"])
def test_packed_documents_do_not_see_each_other(path):
    """Each gives what it gives alone, at the positions that its RoPE counts."""
    check_packed("llama", path)


def test_packed_by_the_mask_of_gemma():
    check_packed("embeddinggemma", "position_ids")


def check_packed(family, path):
    rows, ids, cu_seq_lens = packed_inputs()
    model = encoder(family)
    with torch.no_grad():
        together = states(model, ids, **packed_arguments(path, cu_seq_lens))[0]
        for row, start in zip(rows, cu_seq_lens.tolist(), strict=False):
            positions = torch.arange(len(row)) + (0 if path == "position_ids" else start)
            alone = states(model, row[None], position_ids=positions[None])[0]
            torch.testing.assert_close(together[start : start + len(row)], alone, rtol=1e-5, atol=1e-5)


def test_modules_made_bidirectional_one_by_one():
    """As LLM2Vec (arXiv 2404.05961) does; Transformers goes on making causal masks, which say what is padding."""
    ids, mask = batch("left")
    by_config, by_module = encoder("llama"), encoder("llama")
    del by_module.config.is_causal
    for layer in by_module.layers:
        layer.self_attn.is_causal = False
    with torch.no_grad():
        found = [states(model, ids, attention_mask=mask)[mask.bool()] for model in (by_module, by_config)]
    torch.testing.assert_close(*found, **TOLERANCE)


class TestMasks:
    @pytest.mark.parametrize("width", [1, 5], ids=["one row of padding", "each row"])
    def test_padding(self, width):
        mask = torch.tensor([True, True, False, True, False]).expand(1, 1, width, 5)
        signed, window = read_mask(mask, 3)
        assert signed[0, 0, 0, [0, 1, 3]].tolist() == [-1, -2, -3]
        assert window == 3  # of three tokens, nobody sees more than that

    def test_the_models_own_window(self):
        distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
        assert read_mask((distance < 3)[None, None], 3)[1] == 3
        assert read_mask((distance < 6)[None, None], 3)[1] is None

    @pytest.mark.parametrize(
        "change",
        [
            lambda mask: mask.tril_(),
            lambda mask: mask[..., 2, 4].fill_(False),
            lambda mask: mask[..., 0, 3].fill_(True),
        ],
        ids=["causal", "one pair missing", "one pair of two documents"],
    )
    def test_any_other_is_refused(self, change):
        mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
        mask[..., :2, :2] = mask[..., 2:, 2:] = True
        read_mask(mask.clone(), None)
        change(mask)
        with pytest.raises(
            ValueError, match="does not support a 4D attention_mask other than attention to whole docum"
        ):
            read_mask(mask, None)


class TestRefusals:
    def test_cross_attention(self):
        config = hf.BertConfig(**SHAPE, is_decoder=True, add_cross_attention=True, attn_implementation="sparse")
        model = hf.BertModel(config).eval()
        others = torch.randn(1, 10, 32)
        with pytest.raises(ValueError, match="does not support cross-attention, which BertCrossAttention may be"):
            model(tokens(10), encoder_hidden_states=others)
        with pytest.raises(ValueError, match="does not support cross-attention, which BertCrossAttention may be"):
            model(tokens(10), encoder_hidden_states=others[:, :7])

    def test_cross_attention_by_a_layer_that_serves_encoders_too(self):
        names = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
        config = hf.BartConfig(vocab_size=64, d_model=16, **names, **heads, attn_implementation="sparse")
        model = hf.BartModel(config).eval()
        assert model.encoder(tokens(10)).last_hidden_state.isfinite().all()
        with pytest.raises(ValueError, match="does not support cross-attention, which BartAttention may be"):
            model(tokens(10), decoder_input_ids=tokens(10))

    def test_keys_of_a_cache(self):
        model, ids = encoder("llama"), tokens(12)
        cache = model(ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"non-causal attention of 4 queries to 12 keys"):
            model(ids[:, 8:], past_key_values=cache)

    def test_an_implementation_without_it(self):
        with pytest.raises(ValueError, match=r'^implementation="numba" has no non-causal attention'):
            states(encoder("bert", implementation="numba"), tokens(10))


def band_on_one_side(monkeypatch):
    bias = Band.bias

    def mutant(self, keys, num_keys):
        changed = bias(self, keys, num_keys).clone()
        row = torch.arange(changed.shape[1])[:, None]
        changed[:, torch.arange(self.width) > row + self.before] = -torch.inf
        return changed

    monkeypatch.setattr(Band, "bias", mutant)


def means_of_older_keys(monkeypatch):
    init = BothSidesIndex.__init__

    def mutant(self, key, bucket, static, pattern):
        init(self, key, bucket, static, pattern)
        half = len(key) // 2
        self.means = torch.zeros_like(self.means).index_reduce_(
            0, bucket[:half], key[:half].detach(), "mean", include_self=False
        )

    monkeypatch.setattr(BothSidesIndex, "__init__", mutant)


def newer_keys_first(monkeypatch):
    def mutant(self, row, column, taken, left, right, *_):
        return (taken - right)[row, column].clamp(min=0)

    monkeypatch.setattr(BothSidesChunk, "_num_older", mutant)


def no_global_rows(monkeypatch):
    monkeypatch.setattr(torch_ops, "global_positions", lambda *_: torch.arange(0))


@pytest.mark.parametrize("mutant", [band_on_one_side, means_of_older_keys, newer_keys_first, no_global_rows])
def test_broken_variants_are_noticed(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_padded_rows_are_those_of_the_specification_alone("bert")


def test_a_window_that_is_not_the_masks_is_noticed(monkeypatch):
    monkeypatch.setattr(read, "reads_both_sides", lambda _mask: False)
    with pytest.raises(AssertionError):
        test_reading_everything_is_eager_attention("t5gemma")
