import base64

import pytest
import torch
from helpers.operation import calibrated_hash_text
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


class TestHostile:
    """A checkpoint from anywhere: refused in no time and memory, before any arithmetic."""

    def refused(self, text, message):
        with pytest.raises(ValueError, match=message):
            calibrated(text)

    def test_scales_that_would_broadcast(self):
        for shape in [
            (1,),
            (LAYERS, KV_HEADS, HEAD_DIM, CODEBOOKS, 32),
            (LAYERS, 9, 1, CODEBOOKS, 32),
            (7, 1, 1, 1, 1, 1),
        ]:
            self.refused(repacked(scale=torch.ones(shape)), "scale of shape")
        self.refused(
            repacked(weight=torch.ones(300, 1, 1, 1, 2, dtype=torch.int8), scale=torch.ones(1, 300, 99, 9, 1)),
            "scale of shape",
        )

    @pytest.mark.parametrize(
        "shape", [(3, 2, 6, 2, 0), (3, 2, 6, 0, 4), (3, 0, 6, 2, 4), (0, 2, 6, 2, 4), (3, 2, 0, 2, 4)]
    )
    def test_nothing_inside(self, shape):
        weight = torch.zeros(shape, dtype=torch.int8)
        scale = torch.zeros(shape[0], shape[1], 1, *shape[3:])
        self.refused(repacked(weight=weight, scale=scale, bias=torch.zeros(*shape[:2], *shape[3:])), "of shape")

    @pytest.mark.parametrize(
        ("num_codebooks", "codebook_size"), [(10**5, 2), (1, 2**13), (13, 2), (2, 3), (2, 1), (1, 6)]
    )
    def test_numbers_of_buckets(self, num_codebooks, codebook_size):
        weight = torch.zeros(1, 1, 1, num_codebooks, codebook_size, dtype=torch.int8)
        scale = torch.zeros(1, 1, 1, num_codebooks, codebook_size)
        self.refused(
            repacked(weight=weight, scale=scale, bias=scale[:, :, 0].clone()),
            f"{num_codebooks} codebooks of {codebook_size} codewords",
        )

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("bias", torch.complex64), ("bias", torch.float64), ("weight", torch.float32), ("scale", torch.int8)],
    )
    def test_dtypes(self, name, dtype):
        tensors = load(base64.b64decode(calibrated_hash_text(LAYERS, KV_HEADS, HEAD_DIM)))
        self.refused(repacked(**{name: tensors[name].to(dtype)}), f"{name} of dtype {dtype}")

    def test_other_tensors(self):
        self.refused(repacked(more=torch.zeros(1)), "tensors bias, more, scale, weight in place of")
        self.refused(repacked(bias=None), "tensors scale, weight in place of")

    def test_a_header_of_many_bytes(self):
        header = b"{" + b" " * 70_000 + b"}"
        text = base64.b64encode(len(header).to_bytes(8, "little") + header).decode()
        self.refused(text, "a header of more than")
        self.refused(base64.b64encode(b"\xff" * 8).decode(), "a header of more than")

    @pytest.mark.parametrize("shape", [[2**62, 0, 6, 2, 4], [2**40, 2**40, 0, 2, 4], [3, 2, 6, 2**50, 0]])
    def test_shapes_of_nothing(self, shape):
        entries = [
            f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,0]}}'
            for name, dtype in (("weight", "I8"), ("scale", "F32"), ("bias", "F32"))
        ]
        header = ("{" + ",".join(entries) + "}").encode()
        self.refused(base64.b64encode(len(header).to_bytes(8, "little") + header).decode(), "is damaged")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_change_the_random_hash(dtype):
    expected = random().weight
    torch.set_default_dtype(dtype)
    try:
        found = random().weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_default_device_does_not_matter():
    expected = random().weight
    with torch.device("meta"):
        assert torch.equal(random().weight, expected)
