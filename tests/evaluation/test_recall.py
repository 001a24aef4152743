import json

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model
from helpers.operation import calibrated_hash_text

from hf_sparse_attn.config import SparseAttentionConfig, sliding_windows
from hf_sparse_attn.evaluation.recall import hash_families, measure_recall
from hf_sparse_attn.integration import observe_dense
from hf_sparse_attn.ops import reference
from hf_sparse_attn.patterns import layer_pattern

FIRST, LENGTH = 32, 96
NUM_ROWS = LENGTH - FIRST  # every sparse row is sampled
FIELDS = {
    "window_size": 5,
    "num_global_tokens": 2,
    "key_budget": 9,
    "min_weight": 0.03,
    "page_size": 4,
    "num_hash_bits": 3,
    "dense_below": FIRST,
}
CALIBRATED = {"hash": "calibrated", "calibrated_hash": calibrated_hash_text()}


def config_of(**fields):
    return SparseAttentionConfig(**FIELDS | fields)


def naive_row(query, key, position, sliding_window, scaling, read, num_top):
    """kept, best, recall, lost and keys of one row that reads the keys `read`, by their definitions."""
    oldest = 0 if sliding_window is None else max(0, position - sliding_window + 1)
    admissible = range(oldest, position + 1)
    weight = dict(zip(admissible, (key[oldest : position + 1] @ query * scaling).softmax(0).tolist(), strict=True))
    heaviest = sorted(admissible, key=weight.get, reverse=True)
    kept = sum(weight[j] for j in read)
    top = set(heaviest[:num_top])
    return kept, sum(weight[j] for j in heaviest[: len(read)]), len(top & read) / len(top), kept < 0.5, len(read)


def naive_layers(model, documents, config, num_top):
    """Per layer, the means over all sparse rows of all documents: [num_heads, 5]."""
    rows = {}

    def observer(dense, query, key, value, scaling, output):
        layer, window = dense.layer_idx, dense.sliding_window
        pattern = layer_pattern(config, layer, *(4, 2, 8), query.device, query.dtype, window)
        attended = reference.attended_keys(query[0], key[0], pattern, 0, scaling=scaling)
        for head in range(4):
            for position in range(FIRST, LENGTH):
                read = set(attended[head, position].nonzero().flatten().tolist())
                row = naive_row(query[0, head, position], key[0, head // 2], position, window, scaling, read, num_top)
                rows.setdefault((layer, head), []).append(row)

    for document in documents:
        with torch.no_grad(), observe_dense(model, observer):
            model(document[None])
    means = {at: torch.tensor(of_head, dtype=torch.float64).mean(0) for at, of_head in rows.items()}
    return [torch.stack([means[layer, head] for head in range(4)]) for layer in range(2)]


def figures(heads):
    return torch.tensor(
        [[head[name] for name in ("kept", "best", "recall", "lost", "keys")] for head in heads], dtype=torch.float64
    )


@pytest.mark.parametrize("num_top", [1, 20, 50], ids=lambda n: f"top {n}")
@pytest.mark.parametrize("family", ["llama", "qwen2-mixed"])  # the second has one layer with a window of its own
def test_every_figure_of_every_family_is_the_naive_one(family, num_top):
    model = tiny_model(family)
    model.config.sliding_window = FIRST + 8  # wide enough for sparse rows
    for layer in model.model.layers:
        if getattr(layer.self_attn, "sliding_window", None) is not None:
            layer.self_attn.sliding_window = FIRST + 8
    documents = [tokens(LENGTH, seed=seed)[0] for seed in range(2)]
    configs = hash_families(config_of(**CALIBRATED))
    reports = measure_recall(model, documents, configs, NUM_ROWS, num_top)
    assert list(reports) == ["calibrated", "random", "none"]
    for name, report in reports.items():
        expected = naive_layers(model, documents, configs[name], num_top)
        for heads, of_layer in zip(report["layers"], expected, strict=True):
            torch.testing.assert_close(figures(heads), of_layer, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(figures([report])[0], torch.cat(expected).mean(0), rtol=1e-9, atol=1e-9)
        for part in (report, *report["layers"][0]):
            assert part["ratio"] == pytest.approx(part["kept"] / part["best"])
    assert len({report["recall"] for report in reports.values()}) == 3
    json.dumps(reports, allow_nan=False)


def test_dense_layers_are_marked_and_left_out_of_the_means():
    model, document = tiny_model(), tokens(LENGTH)[0]
    both = measure_recall(model, [document], {"own": config_of()}, NUM_ROWS)["own"]
    one = measure_recall(model, [document], {"own": config_of(dense_layers=(0,))}, NUM_ROWS)["own"]
    assert one["layers"] == [{"dense": True}, both["layers"][1]]
    torch.testing.assert_close(figures([one])[0], figures(both["layers"][1]).mean(0))
    assert one["recall"] != both["recall"]


def test_local_layers_are_marked_as_dense():
    model, document = tiny_model("qwen2-mixed"), tokens(LENGTH)[0]
    layers = measure_recall(model, [document], {"own": config_of()}, NUM_ROWS)["own"]["layers"]
    assert [layer == {"dense": True} for layer in layers] == [
        window == 14 for window in sliding_windows(model.config).values()
    ]


def test_layers_without_attention_are_none():
    model = tiny_model()
    model.model.layers[0].self_attn.layer_idx = 2
    layers = measure_recall(model, [tokens(LENGTH)[0]], {"own": config_of()})["own"]["layers"]
    assert layers[0] is None
    assert [len(heads) for heads in layers[1:]] == [4, 4]


@pytest.mark.parametrize("implementation", ["sdpa", "dense layers alone"])
def test_nothing_to_measure_is_an_error(implementation):
    model = tiny_model(implementation="sdpa" if implementation == "sdpa" else "sparse")
    config = config_of(dense_layers=() if implementation == "sdpa" else (0, 1))
    with pytest.raises(ValueError, match="no layer of the model has sparse attention"):
        measure_recall(model, [tokens(LENGTH)[0]], {"own": config})


def test_every_document_goes_through_the_model_once_and_the_model_is_left_as_it_was():
    model = tiny_model()
    before = dict(model.config.sparse_attention)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    measure_recall(model, [tokens(LENGTH, seed=seed)[0] for seed in range(2)], hash_families(config_of(**CALIBRATED)))
    assert len(calls) == 2
    assert model.config.sparse_attention == before


@pytest.mark.parametrize(
    ("fields", "names", "families"),
    [
        ({}, None, ["random", "none"]),
        (CALIBRATED, None, ["calibrated", "random", "none"]),
        (CALIBRATED | {"hash": "random"}, None, ["random", "calibrated", "none"]),
        (CALIBRATED, ["none", "none"], ["calibrated", "none"]),
        ({}, ["random"], ["random"]),
    ],
    ids=["unconverted", "converted", "converted, random by choice", "one named twice", "own named"],
)
def test_families_differ_in_hash_or_budget_alone(fields, names, families):
    config = config_of(**fields)
    configs = hash_families(config, names)
    assert list(configs) == families
    for name, other in configs.items():
        assert other == (config.replace(key_budget=0) if name == "none" else config.replace(hash=name))


def test_calibrated_family_of_an_unconverted_model_is_an_error():
    with pytest.raises(ValueError, match="calibrated_hash is missing"):
        hash_families(config_of(), ["calibrated"])
