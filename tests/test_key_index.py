"""Keys that are chosen once and applied many times: `build_index` and `apply_index`."""

import pytest
import torch
from helpers.cases import FEATURES, sinks_of


from hf_sparse_attn import apply_index, build_index, sparse_attention
from hf_sparse_attn.errors import ArgumentError

