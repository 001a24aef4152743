import base64

import pytest
import torch
from attention_checks import calibrated_hash_text
from safetensors.torch import load, save

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.hashing import BucketHash, encode_calibrated_hash, layer_hash, quantize_codewords

LAYERS, KV_HEADS, HEAD_DIM, CODEBOOKS, CODEWORDS = 3, 2, 6, 2, 4


def random(layer_idx=0, **fields):
    return layer_hash(SparseAttentionConfig(**fields), layer_idx, KV_HEADS, HEAD_DIM)


def calibrated(text, layer_idx=0, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM):
    config = SparseAttentionConfig(hash="calibrated", calibrated_hash=text)
    return layer_hash(config, layer_idx, num_kv_heads, head_dim)


def codebooks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(LAYERS, KV_HEADS, HEAD_DIM, CODEBOOKS, CODEWORDS, generator=generator)
    return weight, torch.randn(LAYERS, KV_HEADS, CODEBOOKS, CODEWORDS, generator=generator)


def test_random_hash_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = random(num_hash_bits=4)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.weight, random(num_hash_bits=4).weight)


@pytest.mark.parametrize("changed", [{"layer_idx": 1}, {"seed": 1}], ids=["layer", "seed"])
def test_random_hash_differs_by(changed):
    assert not torch.equal(random().weight, random(**changed).weight)


def test_random_hash_differs_by_kv_head():
    weight = random().weight
    assert not torch.equal(weight[0], weight[1])


def test_random_hash_spells_the_signs_of_the_hyperplane_products():
    bucket_hash = random(num_hash_bits=3)
    key = torch.randn(KV_HEADS, 50, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    normals = bucket_hash.weight[..., 1]  # [Hkv, D, bits]
    bits = (key @ normals > 0).long()
    assert bucket_hash.num_buckets == 8
    assert torch.equal(bucket_hash.assign(key), bits[..., 0] * 4 + bits[..., 1] * 2 + bits[..., 2])


def test_assign_takes_the_best_codeword_of_every_codebook():
    weight, bias = codebooks()
    bucket_hash = BucketHash(weight[0], bias[0])
    key = torch.randn(KV_HEADS, 30, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    bucket = bucket_hash.assign(key)
    assert bucket_hash.num_buckets == CODEWORDS**CODEBOOKS
    for head in range(KV_HEADS):
        for n in range(30):
            codes = [
                max(
                    range(CODEWORDS),
                    key=lambda c: float(key[head, n] @ weight[0, head, :, book, c] + bias[0, head, book, c]),
                )
                for book in range(CODEBOOKS)
            ]
            assert bucket[head, n] == codes[0] * CODEWORDS + codes[1]


def test_calibrated_round_trip():
    weight, bias = codebooks()
    weight = quantize_codewords(weight)
    text = encode_calibrated_hash(weight, bias)
    for layer in range(LAYERS):
        bucket_hash = calibrated(text, layer)
        torch.testing.assert_close(bucket_hash.weight, weight[layer], rtol=1e-6, atol=1e-7)
        assert torch.equal(bucket_hash.bias, bias[layer])


def test_quantisation_error_is_at_most_half_a_step_per_codeword():
    weight, _ = codebooks()
    step = weight.abs().amax(2, keepdim=True) / 127
    error = (quantize_codewords(weight) - weight).abs()
    assert (error <= step * 0.5001).all()
    assert error.max() > 0


def test_a_codeword_of_zeros_survives():
    weight, bias = codebooks()
    weight[0, 0, :, 0, 0] = 0
    bucket_hash = calibrated(encode_calibrated_hash(weight, bias))
    assert bucket_hash.weight.isfinite().all()
    assert (bucket_hash.weight[0, :, 0, 0] == 0).all()


def repacked(**changes):
    """The text with some tensors of its safetensors file replaced; None leaves one out."""
    tensors = {**load(base64.b64decode(calibrated_hash_text(LAYERS, KV_HEADS, HEAD_DIM))), **changes}
    return base64.b64encode(save({name: tensor for name, tensor in tensors.items() if tensor is not None})).decode()


def test_repacked_unchanged_is_accepted():
    calibrated(repacked())


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("not base64!", id="not base64"),
        pytest.param(base64.b64encode(b"not safetensors").decode(), id="not safetensors"),
        pytest.param(calibrated_hash_text(LAYERS, KV_HEADS, HEAD_DIM)[:-40], id="cut by whole groups"),
        pytest.param(calibrated_hash_text(LAYERS, KV_HEADS, HEAD_DIM)[:-3], id="cut inside a group"),
        pytest.param(calibrated_hash_text(LAYERS, KV_HEADS, HEAD_DIM)[:20], id="header cut"),
        pytest.param("ü" + calibrated_hash_text(LAYERS, KV_HEADS, HEAD_DIM), id="not ascii"),
        pytest.param(repacked(bias=None), id="bias missing"),
        pytest.param(repacked(scale=None), id="scale missing"),
        pytest.param(repacked(bias=torch.zeros(LAYERS, KV_HEADS, 2, 5)), id="bias of another shape"),
        pytest.param(repacked(scale=torch.ones(7)), id="scale of another shape"),
        pytest.param(
            repacked(weight=torch.zeros(2, 3, dtype=torch.int8), scale=torch.ones(1)), id="weight of two dimensions"
        ),
    ],
)
def test_damaged(text):
    with pytest.raises(ValueError, match=r"^calibrated_hash is damaged .*convert\.py$") as error:
        calibrated(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bias": torch.full((LAYERS, KV_HEADS, 2, 4), torch.nan)}, id="NaN"),
        pytest.param(
            {
                "weight": torch.zeros(LAYERS, KV_HEADS, HEAD_DIM, 2, 3, dtype=torch.int8),
                "scale": torch.ones(LAYERS, KV_HEADS, 1, 2, 3),
                "bias": torch.zeros(LAYERS, KV_HEADS, 2, 3),
            },
            id="a number of buckets that is no power of two",
        ),
    ],
)
def test_unusable_numbers(changes):
    """The bucket number travels in the low bits of a score, so only powers of two can be told apart."""
    with pytest.raises(ValueError, match=r"^calibrated_hash is damaged"):
        calibrated(repacked(**changes))


@pytest.mark.parametrize(
    "model",
    [{"layer_idx": LAYERS}, {"num_kv_heads": KV_HEADS + 1}, {"head_dim": HEAD_DIM * 2}],
    ids=["more layers", "other KV heads", "other head_dim"],
)
def test_fitted_for_another_model(model):
    text = calibrated_hash_text(LAYERS, KV_HEADS, HEAD_DIM)
    with pytest.raises(
        ValueError, match=r"^calibrated_hash was fitted for 3 layers, 2 KV heads and head_dim 6.*the model has"
    ):
        calibrated(text, **model)
