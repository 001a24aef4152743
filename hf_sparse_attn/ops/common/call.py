"""One call of the attention of one document: what an implementation is told beside the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_sparse_attn.ops.common.dropout import Dropout
from hf_sparse_attn.patterns import LayerPattern
from hf_sparse_attn.recording import Recorder


@dataclass(frozen=True)
class AttentionCall:
    """Sparse attention of one document, without padding; the last key belongs to the last query.

    Where attention is not causal, rows may also be those of another document (cross-attention): their positions then
    count on after the keys, further than a window reaches.

    Args:
        pattern: the layer's pattern.
        query_offset: position of the first query in its document.
        key_offset: position of the first key (greater than 0 where a sliding cache has dropped the first ones; always
            0 where attention is not causal).
        scaling: factor on query . key, greater than 0.
        softcap: scores become softcap * tanh(score / softcap); None: they stay.
        sinks: [num_heads], logits that take part in each softmax but carry no value, or None.
        recorder: is told which keys each row read; None records nothing.
        index: that of the cached keys, which the new ones are appended to, or None; no gradients flow where there is
            one, and only a backend with an index is given one.
        dropout: of the weights, after the softmax, or None; only a backend with `plain` is given one.
        candidates: [num_key_value_heads, Q, K] int32, indices of keys that stand in place of those which the buckets
            would give each row, negative for none; None: those of the buckets. Only a backend with `plain` is given
            them.
        newest: [1] int64, the index of the newest key, on the keys' device; the keys after it are room for more, and
            the one query is its own. The call counts as one over all the room, and `index.is_ready` for it, which
            nothing but `index.advance` moves on. None: all are keys.
    """

    pattern: LayerPattern
    query_offset: int = 0
    key_offset: int = 0
    scaling: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    recorder: Recorder | None = None
    index: Any = None  # a `backend.Index`, of the implementation that is called
    dropout: Dropout | None = None
    candidates: Tensor | None = None
    newest: Tensor | None = None


# query [num_heads, Q, head_dim], key [num_key_value_heads, N, head_dim] and the call -> its `candidates`, none of which
# may be static or in the row's window.
Chooser = Callable[[Tensor, Tensor, AttentionCall], Tensor]
