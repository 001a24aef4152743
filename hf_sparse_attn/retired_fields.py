"""Fields of a config that only earlier releases had: checkpoints with them go on loading.

CONTRIBUTING.md says for how long.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

RENAMED: dict[str, str] = {}  # the old name -> the field of today, which means the same
REMOVED: dict[str, Any] = {}  # the name -> its default, with which it did nothing

_logger = logging.getLogger("hf_sparse_attn")


def current_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `SparseAttentionConfig` as this release has them; a retired one is told of once in a process.

    Raises:
        ValueError: for both names of a field, or for a removed one that did something; the message names it.
    """
    current = {}
    for name, value in fields.items():
        if name in REMOVED:
            if value != REMOVED[name]:
                raise ValueError(
                    f"{name} was removed: only {REMOVED[name]!r}, which did nothing, is read; got {value!r}"
                )
            _warn(f"{name} was removed and did nothing here; leave it out")
        elif name in RENAMED:
            if RENAMED[name] in fields:
                raise ValueError(f"{name} is the old name of {RENAMED[name]}; give only the latter")
            _warn(f"{name} is now called {RENAMED[name]}; a later release will not know the old name")
            current[RENAMED[name]] = value
        else:
            current[name] = value
    return current


@cache
def _warn(message: str) -> None:
    _logger.warning("sparse_attention: %s", message)
