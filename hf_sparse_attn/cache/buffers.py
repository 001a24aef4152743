"""Memory for keys and values with room for more: how far it grows ahead, and when it can be used again."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_ROOM = 1 / 8  # of its length that a buffer grows ahead until it has its full size
_LEAST_ROOM = 64  # tokens


def size_ahead(num_tokens: int) -> int:
    """Tokens to allocate where a buffer must grow to so many."""
    return num_tokens + max(int(num_tokens * _ROOM), _LEAST_ROOM)


def is_writable(tensor: Tensor) -> bool:
    """Whether it may be changed in place: one made in inference mode may not outside of it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def can_hold(room: Tensor, states: Tensor, num_tokens: int) -> bool:
    """Whether `num_tokens` of the states' kind [batch, num_key_value_heads, tokens, head_dim] fit into this room."""
    same = (room.dtype, room.device, room.shape[:2]) == (states.dtype, states.device, states.shape[:2])
    return is_writable(room) and same and room.shape[2] >= num_tokens


def allocate(states: Tensor, num_tokens: int) -> Tensor:
    """Room for that many tokens of [batch, num_key_value_heads, tokens, head_dim]; on a CPU in huge pages if it can.

    Decoding reads keys from all over the memory, where small pages cost as much to look up as to read. NumPy asks the
    system for huge ones, PyTorch does not.
    """
    shape = *states.shape[:2], num_tokens, states.shape[3]
    if states.device.type != "cpu":
        return states.new_empty(shape)
    memory = np.empty(math.prod(shape) * states.element_size(), np.uint8)
    return torch.from_numpy(memory).view(states.dtype).view(shape)
