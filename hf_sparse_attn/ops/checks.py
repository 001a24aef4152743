"""The gate in front of every implementation: numbers and shapes that compiled code would trust, and what cannot work.

An implementation may read and write memory by these numbers without looking again.
"""

from __future__ import annotations

import math

from torch import Tensor

from hf_sparse_attn.patterns import LayerPattern


def check_scores(scaling: float, softcap: float | None) -> None:
    """Check what scores are multiplied by and where they saturate.

    Raises:
        ValueError: if scaling is not a finite number greater than 0, or softcap neither that nor None.
    """
    if not 0 < scaling < math.inf:
        raise ValueError(f"scaling must be a finite number greater than 0, got {scaling}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or a finite number greater than 0, got {softcap}")


def check_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int,
    sinks: Tensor | None,
) -> None:
    """Tensors and positions of one document; see `common.call.AttentionCall`.

    Raises:
        ValueError: if they do not fit together, with what was given and what fits.
    """
    if key.ndim != 3 or query.ndim != 3 or key.shape[:2] != value.shape[:2] or query.shape[2] != key.shape[2]:
        raise ValueError(
            "query, key and value of a document must be [heads, tokens, head_dim], key and value with the same heads "
            "and tokens, query and key with the same head_dim; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not (query.is_floating_point() and key.is_floating_point() and value.is_floating_point()):
        raise ValueError(f"query, key and value must be real numbers, got {query.dtype}, {key.dtype} and {value.dtype}")
    num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    hash_shape = pattern.bucket_hash.weight.shape
    if (len(pattern.min_weights), len(pattern.budgets)) != (num_heads, num_kv_heads) or num_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads and key {num_kv_heads}; the pattern is one of {len(pattern.min_weights)} "
            f"query heads over {len(pattern.budgets)} KV heads"
        )
    if hash_shape[:2] != (num_kv_heads, head_dim):
        raise ValueError(
            f"key has {num_kv_heads} heads of {head_dim}; the pattern's hash is one of {hash_shape[0]} heads of "
            f"{hash_shape[1]}"
        )
    if not (query_offset >= key_offset >= 0 and query_offset + num_queries == key_offset + num_keys):
        raise ValueError(
            f"{num_queries} queries from position {query_offset} on and {num_keys} keys from position {key_offset} on: "
            "positions start at 0 and the last key must belong to the last query"
        )
    if key_offset and not pattern.is_causal:
        raise ValueError(
            f"non-causal attention needs all keys of the document, got those from position {key_offset} on"
        )
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks must be one number for each of {num_heads} heads, got shape {tuple(sinks.shape)}")
