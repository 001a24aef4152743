"""Hash families: which bucket a key falls into.

Both families are one thing: per KV head a few codebooks, each of which gives the key the code of its best-scoring
codeword, `argmax_c key . weight[:, c] + bias[c]`. The bucket number spells the codes as digits. Random hyperplanes
(SimHash, Charikar 2002) are codebooks of the two codewords -h and +h. The calibrated hash is a product quantizer
(Jegou, Douze and Schmid 2011) fitted in the metric of the head's queries: nearest-codeword search is linear in the
key once the squared norm of the codeword is part of the bias.
"""

from __future__ import annotations

import base64
import binascii
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.config import MAX_HASH_BITS, SparseAttentionConfig

_LEVELS = 127  # of the symmetric int8 code that stores the calibrated weights
_MAX_HEADER = 2**16  # bytes of the stored hash's header, which describes three tensors


@dataclass(frozen=True)
class BucketHash:
    """The hash of one layer.

    Args:
        weight: [num_key_value_heads, head_dim, num_codebooks, codebook_size] codewords.
        bias: [num_key_value_heads, num_codebooks, codebook_size].
    """

    weight: Tensor
    bias: Tensor

    @property
    def num_buckets(self) -> int:
        return int(self.bias.shape[-1] ** self.bias.shape[-2])

    def assign(self, key: Tensor) -> Tensor:
        """Bucket of every key: [num_key_value_heads, N, head_dim] -> [num_key_value_heads, N], int64."""
        num_codebooks, codebook_size = self.bias.shape[-2:]
        weight, bias = self.weight.to(key), self.bias.to(key)
        scores = torch.baddbmm(bias.flatten(1).unsqueeze(1), key, weight.flatten(2))
        scores = scores.unflatten(-1, (num_codebooks, codebook_size))
        # Of two, a comparison finds the larger one several times faster.
        codes = scores[..., 1] > scores[..., 0] if codebook_size == 2 else scores.argmax(-1)  # [Hkv, N, codebooks]
        digit = codebook_size ** torch.arange(num_codebooks - 1, -1, -1, device=key.device)
        return (codes.to(key.dtype) @ digit.to(key.dtype)).long()  # small whole numbers, exact in either precision


def layer_hash(config: SparseAttentionConfig, layer_idx: int, num_kv_heads: int, head_dim: int) -> BucketHash:
    """The hash that `config` gives a layer, on the CPU in float32.

    Raises:
        ValueError: if the calibrated hash is damaged or was fitted for a model of another shape.
    """
    if config.hash == "random":
        return _random_hyperplanes(config.num_hash_bits, config.seed, layer_idx, num_kv_heads, head_dim)
    assert config.calibrated_hash is not None  # the config's own check
    weight, bias = _decode(config.calibrated_hash)
    fitted = (weight.shape[0], weight.shape[1], weight.shape[2])
    if layer_idx >= fitted[0] or (num_kv_heads, head_dim) != fitted[1:]:
        raise ValueError(
            f"calibrated_hash was fitted for {fitted[0]} layers, {fitted[1]} KV heads and head_dim {fitted[2]}, but "
            f"the model has a layer {layer_idx} with {num_kv_heads} KV heads and head_dim {head_dim}"
        )
    return BucketHash(weight[layer_idx], bias[layer_idx])


def encode_calibrated_hash(weight: Tensor, bias: Tensor) -> str:
    """Text for `SparseAttentionConfig.calibrated_hash`: base64 of a safetensors file.

    It travels inside the model's config because that is the one thing that stock Transformers code copies wherever a
    model goes (save_pretrained, Trainer checkpoints, the Hub, PEFT's base model), forward pass or not.

    Args:
        weight: [num_layers, num_key_value_heads, head_dim, num_codebooks, codebook_size]; stored as int8 with one
            scale per codeword, so pass it through `quantize_codewords` first to fit `bias` to what is stored.
        bias: [num_layers, num_key_value_heads, num_codebooks, codebook_size]; stored as float32.
    """
    from safetensors.torch import save

    scale = _scale(weight)
    tensors = {
        "weight": (weight / scale).round().to(torch.int8).contiguous(),
        "scale": scale.float().contiguous(),
        "bias": bias.float().contiguous(),
    }
    return base64.b64encode(save(tensors)).decode("ascii")


def quantize_codewords(weight: Tensor) -> Tensor:
    """`weight` [..., head_dim, num_codebooks, codebook_size] as it comes back from `encode_calibrated_hash`."""
    scale = _scale(weight)
    return (weight / scale).round() * scale


def _scale(weight: Tensor) -> Tensor:
    """Step of the int8 code of each codeword: [..., head_dim, T, C] -> [..., 1, T, C]."""
    return weight.abs().amax(-3, keepdim=True).clamp(min=1e-12) / _LEVELS


@functools.lru_cache(maxsize=4)
def _decode(text: str) -> tuple[Tensor, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        stored = base64.b64decode(text, validate=True)
        if int.from_bytes(stored[:8], "little") > _MAX_HEADER:
            raise ValueError(f"a header of more than {_MAX_HEADER} bytes")
        tensors = load(stored)
        _check_stored(tensors)
        weight, bias = tensors["weight"].float() * tensors["scale"], tensors["bias"]
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError("a number that is not finite")
    except (binascii.Error, SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"calibrated_hash is damaged ({error}); convert the checkpoint again with scripts/convert.py"
        ) from error
    return weight, bias


def _check_stored(tensors: dict[str, Tensor]) -> None:
    """Names, dtypes and shapes of a stored hash, before anything is computed with them.

    Raises:
        ValueError: what is stored is not what `encode_calibrated_hash` writes.
    """
    dtypes = {"weight": torch.int8, "scale": torch.float32, "bias": torch.float32}
    if tensors.keys() != dtypes.keys():
        raise ValueError(f"tensors {', '.join(sorted(tensors)) or 'none'} in place of {', '.join(sorted(dtypes))}")
    for name, dtype in dtypes.items():
        if tensors[name].dtype != dtype:
            raise ValueError(f"{name} of dtype {tensors[name].dtype} in place of {dtype}")
    weight, scale, bias = (tuple(tensors[name].shape) for name in dtypes)
    fits = len(weight) == 5 and scale == (*weight[:2], 1, *weight[3:]) and bias == (*weight[:2], *weight[3:])
    if not fits or 0 in weight:
        raise ValueError(f"weight of shape {weight} with scale of shape {scale} and bias of shape {bias}")
    num_codebooks, codebook_size = weight[3:]
    num_bits = num_codebooks * (codebook_size - 1).bit_length()
    # Selection packs a bucket's number into bits of its score.
    if codebook_size < 2 or codebook_size & (codebook_size - 1) or num_bits > MAX_HASH_BITS:
        raise ValueError(
            f"{num_codebooks} codebooks of {codebook_size} codewords, which must be powers of two and give at most "
            f"{2**MAX_HASH_BITS} buckets"
        )


def _random_hyperplanes(num_bits: int, seed: int, layer_idx: int, num_kv_heads: int, head_dim: int) -> BucketHash:
    # On the CPU in float32, whatever PyTorch's defaults are: another dtype draws other numbers.
    generator = torch.Generator("cpu").manual_seed(seed * 100_003 + layer_idx)
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    normals = torch.randn(
        num_kv_heads, head_dim, num_bits, 1, generator=generator, dtype=like.dtype, device=like.device
    )
    return BucketHash(torch.cat([-normals, normals], -1), like.new_zeros(num_kv_heads, num_bits, 2))
