"""Choices of a conversion that mean something at 200 tokens."""

from hf_sparse_attn.calibration import budget_allocation
from hf_sparse_attn.calibration.calibrate import minimum_tokens
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.hashing import product_quantizer

CONFIG = SparseAttentionConfig(window_size=16, num_global_tokens=2, page_size=16, dense_below=60)
LENGTH = minimum_tokens(CONFIG) + 22


def choose_from_few(monkeypatch):
    """Budgets that mean something at 200 tokens, and as many buckets as are worth fitting to them."""
    monkeypatch.setattr(budget_allocation, "BUDGETS", (0, 4, 8, 12, 16, 24, 32, 40))
    monkeypatch.setattr(budget_allocation, "MIN_WEIGHTS", (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2))
    monkeypatch.setattr(product_quantizer, "CODEBOOK_SIZE", 4)
