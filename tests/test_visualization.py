import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from hf_sparse_attn.calibration.budget_allocation import Allocation
from hf_sparse_attn.integration import record
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.pictures import LayerMass
from hf_sparse_attn.visualization import (
    PatternRecorder,
    bin_pairs,
    causal_pairs,
    plot_choice,
    plot_heads,
    plot_pattern,
    plot_trade,
)


@pytest.mark.parametrize(("num_tokens", "num_bins"), [(12, 4), (13, 4), (7, 7), (63, 10), (5, 8)])
def test_causal_pairs_are_the_bins_of_all_causal_pairs(num_tokens, num_bins):
    rows, keys = torch.tril_indices(num_tokens, num_tokens)
    counts = causal_pairs(num_tokens, num_bins)
    assert torch.equal(counts, bin_pairs(rows, keys, num_tokens, num_bins))
    assert counts.sum() == num_tokens * (num_tokens + 1) // 2


@pytest.mark.parametrize(("start", "stop", "sliding_window"), [(0, 20, 5), (7, 20, None), (3, 9, 4), (6, 6, None)])
def test_causal_pairs_of_some_rows_and_a_window(start, stop, sliding_window):
    rows, keys = torch.tril_indices(20, 20)
    read = (rows >= start) & (rows < stop) & (rows - keys < (sliding_window or 20))
    assert torch.equal(causal_pairs(20, 6, start, stop, sliding_window), bin_pairs(rows[read], keys[read], 20, 6))


@pytest.mark.parametrize("dense_below", [0, 20])
def test_recorder_counts_the_pairs_of_window_and_globals(tiny_model_path, dense_below):
    model = load_sparse_model(str(tiny_model_path), {"dense_below": dense_below})
    recorder = PatternRecorder(num_tokens=50, num_bins=10, layers=[1])
    with torch.no_grad(), record(model, recorder):
        model(torch.randint(256, (1, 50)))
    rows, keys = torch.tril_indices(50, 50)
    read = (rows - keys < 8) | (keys < 2) | (rows < dense_below)
    assert set(recorder.counts) == {(1, head) for head in range(4)}
    for counts in recorder.counts.values():
        assert torch.equal(counts, bin_pairs(rows[read], keys[read], 50, 10))


def test_bin_pairs_counts_by_hand():
    rows, keys = torch.tensor([0, 3, 5, 5]), torch.tensor([0, 0, 2, 5])
    assert bin_pairs(rows, keys, num_tokens=6, num_bins=2).tolist() == [[1, 0], [2, 1]]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_writes_a_picture(tmp_path, suffix):
    path = tmp_path / f"pattern{suffix}"
    counts = causal_pairs(20, 5).expand(4, 5, 5) // 2
    plot_pattern(counts, 20, [f"head {head}" for head in range(4)], path)
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_plot_adds_the_density_and_the_mass_of_the_layers(tmp_path):
    """A layer without attention is left out, and each kind of key that occurs has its name."""
    mass = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.0]]).double()
    layers = {layer: LayerMass(torch.full((4,), 0.25).double(), mass.expand(4, 5)) for layer in (0, 2)}
    counts = causal_pairs(20, 5)[None]
    for name, given in (("without", None), ("with", layers)):
        plot_pattern(counts, 20, ["head"], tmp_path / f"{name}.svg", layers=given)
    before, after = ((tmp_path / f"{name}.svg").read_text() for name in ("without", "with"))
    for word in ("softmax mass kept", "density: pairs read of all", "window", "static", "routed"):
        assert f"<!-- {word} -->" in after
        assert f"<!-- {word} -->" not in before
    assert "<!-- own -->" not in after
    assert "<!-- dense -->" not in after


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_head_maps_share_one_scale_and_leave_missing_values_grey(tmp_path, suffix):
    path = tmp_path / f"heads{suffix}"
    maps = torch.stack([torch.ones(4, 3), torch.full((4, 3), 0.5), torch.full((4, 3), float("nan"))])
    plot_heads(maps, ["all", "half", "nothing"], path)
    if suffix == ".svg":
        assert all(f"<!-- {title} -->" in path.read_text() for title in ("all", "half", "nothing"))
        return
    pixels = torch.from_numpy(imread(path))
    scale = colormaps["viridis"]
    areas = [
        ((pixels - torch.tensor(colour)).abs() < 0.01).all(-1).float().mean()
        for colour in (scale(1.0), scale(0.0), to_rgba("lightgrey"))
    ]
    assert min(areas) > 0.15, areas


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_trade_is_drawn_with_the_choice_marked(tmp_path, suffix):
    """A loss of 0 has its place, and the choice is where its density and loss are."""

    def point(density, loss):
        return Allocation(((8,),), ((0.0,),), (), 8.0, density, loss)

    trade = [point(0.1, 0.3), point(0.2, 0.01), point(1.0, 0.0)]
    pictures = []
    for choice in (trade[1], trade[1], trade[2]):
        path = tmp_path / f"{len(pictures)}{suffix}"
        plot_trade(trade, choice, path)
        assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
        pictures.append(path.read_bytes())
    if suffix == ".png":
        assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_choice_with_layers_that_do_not_count_and_without_any_loss(tmp_path, suffix):
    density = torch.rand(3, 4)
    density[1] = torch.nan
    for loss in (density / 1000, torch.zeros(3, 4)):
        plot_choice(density, loss, tmp_path / f"heads.{suffix}")
        assert (tmp_path / f"heads.{suffix}").stat().st_size > 1000
