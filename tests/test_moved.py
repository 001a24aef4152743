"""Names of earlier releases go on working."""

import importlib.util
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model
from helpers.specification import logits

import hf_sparse_attn
from hf_sparse_attn import SparseCache
from hf_sparse_attn.moved import MOVED


@pytest.mark.parametrize("old", [name for name in MOVED if "triton" not in name or importlib.util.find_spec("triton")])
def test_modules(old):
    module = importlib.import_module(f"hf_sparse_attn.{old}")
    assert module is importlib.import_module(f"hf_sparse_attn.{MOVED[old]}")
    assert module.__spec__.name == f"hf_sparse_attn.{MOVED[old]}"


def test_names_in_packages():
    from hf_sparse_attn import eviction, loading
    from hf_sparse_attn.cache import SparseLayer  # noqa: F401
    from hf_sparse_attn.hashing import BucketHash, encode_calibrated_hash  # noqa: F401
    from hf_sparse_attn.ops.numba import Index  # noqa: F401

    assert eviction.Sinks
    assert loading.load_sparse_model


def test_other_names_are_not_there():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hf_sparse_attn.nothing")


def test_pickled_caches():
    """A cache that an earlier release pickled names its modules of then."""
    model, ids = tiny_model(), tokens(40)
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    text = pickle.dumps(cache, protocol=0)
    for old, new in MOVED.items():
        text = text.replace(f"chf_sparse_attn.{new}\n".encode(), f"chf_sparse_attn.{old}\n".encode())
    for new, old in {
        "cache.sparse_cache": "cache",
        "cache.layers": "cache",
        "patterns.layer": "routing",
        "ops.numba.index": "ops.numba",
        "hashing.bucket_hash": "hashing",
    }.items():
        text = text.replace(f"chf_sparse_attn.{new}\n".encode(), f"chf_sparse_attn.{old}\n".encode())
    assert b"hf_sparse_attn.indexes" in text
    assert b"hf_sparse_attn.cache\n" in text
    found = pickle.loads(text)
    with torch.no_grad():
        rest = model(ids[:, 30:], past_key_values=found).logits
    torch.testing.assert_close(rest, logits(model, ids)[:, 30:])


def test_importing_loads_none_of_them():
    code = f"import hf_sparse_attn, sys; print([n for n in {list(MOVED)!r} if 'hf_sparse_attn.' + n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert hf_sparse_attn.moved.MOVED is MOVED
