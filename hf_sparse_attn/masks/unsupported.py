"""The one error for what the sparse attention cannot do."""

from __future__ import annotations


def unsupported(what: str) -> ValueError:
    """The one error for what the sparse attention cannot do."""
    return ValueError(f'attn_implementation="sparse" does not support {what}; choose another implementation')
