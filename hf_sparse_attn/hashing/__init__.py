"""Which bucket a key falls into: random hyperplanes, or a fitted product quantizer."""

from hf_sparse_attn.hashing.bucket_hash import BucketHash, encode_calibrated_hash, layer_hash, quantize_codewords

__all__ = ["BucketHash", "encode_calibrated_hash", "layer_hash", "quantize_codewords"]
