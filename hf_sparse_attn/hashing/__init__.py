"""Which bucket a key falls into: random hyperplanes, or a fitted product quantizer."""

from hf_sparse_attn.hashing.bucket_hash import BucketHash
from hf_sparse_attn.hashing.calibrated import encode_calibrated_hash, quantize_codewords
from hf_sparse_attn.hashing.families import layer_hash

__all__ = ["BucketHash", "encode_calibrated_hash", "layer_hash", "quantize_codewords"]
