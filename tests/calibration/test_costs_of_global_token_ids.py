"""What `global_token_ids` cost, told to calibration and evaluation by the documents' own tokens."""

import torch
from helpers.batches import tokens
from helpers.families import SPARSE, tiny_model

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.calibration.budget_allocation import fixed_pairs, least_density
from hf_sparse_attn.calibration.calibrate import calibrate
from hf_sparse_attn.evaluation.recall import measure_recall
from hf_sparse_attn.patterns import Marked

IDS = [3, 11, 17, 29, 42]


def test_calibration_and_recall_count_them():
    """As they count the same keys named by their places."""
    document, model = tokens(200)[0], tiny_model(dtype=torch.float32)
    fields = SPARSE | {"window_size": 8, "page_size": 16}
    named = SparseAttentionConfig(**fields, global_token_ids=IDS)
    indices = SparseAttentionConfig(
        **fields, global_token_indices=[i for i, token in enumerate(document.tolist()) if token in IDS]
    )
    marked = Marked.in_document(document, named.global_token_ids)
    assert fixed_pairs(named, 0, 200, None, marked) == fixed_pairs(indices, 0, 200, None)
    assert least_density(named, {0: None}, 200) < least_density(indices, {0: None}, 200)
    costs = [calibrate(model, [document], config).costs for config in (named, indices)]
    for name in ("loss", "read", "fixed"):
        torch.testing.assert_close(*(getattr(x, name) for x in costs))
    recall = measure_recall(model, [document], {"named": named, "indices": indices}, num_rows=32, num_top=8)
    assert recall["named"] == recall["indices"]
