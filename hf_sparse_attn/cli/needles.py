"""The options and the contexts of the commands that hide facts in long text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.errors import ArgumentError, argument

if TYPE_CHECKING:
    from hf_sparse_attn.evaluation.haystack import Context


def make_all_contexts(
    arguments: Any,
    lengths_option: str,
    documents: Mapping[int, list[dict[str, Any]]],
    tokenizer: Any,
    sparse_attention: dict[str, Any],
    num_single: int = 0,
) -> list[Context]:
    """Contexts of every length, as the options say.

    Args:
        arguments: with depths, num_samples, needles_per_depth and seed.
        lengths_option: the argument that holds the lengths, which errors name.
        documents: those to hide facts in, for each length.
        sparse_attention: fields of the model.
        num_single: contexts with a single fact for each depth and length.

    Raises:
        ArgumentError: the facts do not fit.
    """
    from hf_sparse_attn.evaluation.haystack import MAX_NEEDLES, make_contexts

    depths, each = sorted(set(arguments.depths)), arguments.needles_per_depth
    if len(depths) * each > MAX_NEEDLES:
        told = f"a context holds at most {MAX_NEEDLES} facts, fewer than {each} at each depth"
        raise ArgumentError("needles_per_depth", told)
    contexts = []
    for length, haystacks in documents.items():
        with argument(lengths_option, length):
            contexts += make_contexts(
                haystacks,
                tokenizer,
                length,
                depths,
                SparseAttentionConfig.from_dict(sparse_attention),
                num_samples=arguments.num_samples,
                needles_per_depth=each,
                num_single=num_single,
                seed=arguments.seed,
            )
    return contexts
