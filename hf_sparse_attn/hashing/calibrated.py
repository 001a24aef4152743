"""How a fitted hash is stored: as text in the model's config."""

from __future__ import annotations

import base64
import binascii
import functools

import torch
from torch import Tensor

from hf_sparse_attn.config import MAX_HASH_BITS

_LEVELS = 127  # of the symmetric int8 code that stores the calibrated weights
_MAX_HEADER = 2**16  # bytes of the stored hash's header, which describes three tensors


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
def decode_calibrated_hash(text: str) -> tuple[Tensor, Tensor]:
    """Weight and bias as `encode_calibrated_hash` was given them, both float32.

    Raises:
        ValueError: the text is damaged.
    """
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
