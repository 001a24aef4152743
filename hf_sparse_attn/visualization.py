"""Pictures of a pattern: which keys the rows attend to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_sparse_attn.calibration.budget_allocation import Allocation
    from hf_sparse_attn.pictures import LayerMass
from hf_sparse_attn.patterns import LayerPattern

# As on the page.
_KIND_COLOURS = {"window": "#4299e1", "static": "#1a9e70", "own": "#be5fb2", "routed": "#e89414", "dense": "#8791a0"}


def bin_pairs(rows: torch.Tensor, keys: torch.Tensor, num_tokens: int, num_bins: int) -> torch.Tensor:
    """Count (row, key) pairs in `num_bins` x `num_bins` equal spans of positions; counts of several calls add up.

    Args:
        rows, keys: positions of the pairs, int64, of one shape, in [0, num_tokens).

    Returns:
        [num_bins, num_bins] int64 on the CPU, row spans first.
    """
    cells = (rows * num_bins // num_tokens) * num_bins + keys * num_bins // num_tokens
    return torch.bincount(cells.flatten().cpu(), minlength=num_bins**2).view(num_bins, num_bins)


def causal_pairs(
    num_tokens: int, num_bins: int, start: int = 0, stop: int | None = None, sliding_window: int | None = None
) -> torch.Tensor:
    """How many admissible pairs each cell of `bin_pairs` can hold: [num_bins, num_bins] int64.

    Admissible: start <= row < stop (default: all rows), key <= row, and row - sliding_window < key if that is given.
    """
    # Bin b holds the positions with position * num_bins // num_tokens == b.
    bounds = -(-torch.arange(num_bins + 1) * num_tokens // num_bins)
    rows = torch.arange(start, num_tokens if stop is None else stop)
    first = torch.zeros_like(rows) if sliding_window is None else (rows - sliding_window + 1).clamp(min=0)
    # Keys of each bin that a row may read, then summed over the rows of a bin.
    keys = torch.minimum(rows[:, None] + 1, bounds[1:]) - torch.maximum(first[:, None], bounds[:-1])
    sums = torch.zeros(num_bins, num_bins, dtype=torch.int64)
    return sums.index_add_(0, rows * num_bins // num_tokens, keys.clamp(min=0))


class PatternRecorder:
    """Counts the (row, key) pairs of one document per layer and head; a recorder for `integration.record`.

    Args:
        num_tokens: length of the document.
        num_bins: cells a side.
        layers: indices of the layers to count.

    `counts[layer, head]` is then [num_bins, num_bins] int64, as `bin_pairs` counts.
    """

    def __init__(self, num_tokens: int, num_bins: int, layers: Sequence[int]) -> None:
        self.num_tokens = num_tokens
        self.num_bins = num_bins
        self.layers = layers
        self.counts: dict[tuple[int, int], torch.Tensor] = {}

    def add(
        self,
        pattern: LayerPattern,
        head: int,
        position: torch.Tensor,
        num_attended: int,
        num_scored: int,
        read: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        if pattern.layer_idx in self.layers:
            attended, keys = read()
            rows = position[:, None].expand_as(attended)[attended]
            columns = keys.expand_as(attended)[attended]
            self._add(pattern.layer_idx, head, bin_pairs(rows, columns, self.num_tokens, self.num_bins))

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        if pattern.layer_idx in self.layers:
            counts = causal_pairs(self.num_tokens, self.num_bins, start, stop, pattern.sliding_window)
            for head in heads:
                self._add(pattern.layer_idx, head, counts)

    def _add(self, layer: int, head: int, counts: torch.Tensor) -> None:
        self.counts[layer, head] = self.counts.get((layer, head), 0) + counts


def plot_pattern(
    counts: torch.Tensor,
    num_tokens: int,
    titles: Sequence[str],
    path: str | Path,
    num_columns: int = 3,
    layers: Mapping[int, LayerMass] | None = None,
) -> None:
    """Draw one panel per pattern: rows downwards, keys to the right, colour the share of causal pairs attended.

    Below, if `layers` are given: density and kept mass of every head, and by layer where the mass went.

        key ->
        row   #            self, window: the diagonal
         |    ##           global keys:  the left edge
         v    #.##         routed keys:  the spots between

    Args:
        counts: [panels, num_bins, num_bins] pairs, as `bin_pairs` counts them.
        num_tokens: length of the document.
        titles: one a panel.
        path: the picture to write; its suffix chooses the format (.png, .svg, .pdf).
        layers: of every layer with attention, or None.
    """
    # The object interface: it needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    possible = causal_pairs(num_tokens, counts.shape[-1])
    shares = torch.where(possible > 0, counts / possible.clamp(min=1), float("nan")).numpy()
    num_columns = min(num_columns, len(titles))
    num_rows = -(-len(titles) // num_columns)
    heights = [3.2 * num_rows, 3.2 if layers else 0]
    width = max(3.2 * num_columns + 1, 9.0 if layers else 0)
    whole = Figure(figsize=(width, sum(heights)), layout="constrained", dpi=120)
    FigureCanvasAgg(whole)
    figure: Any = whole
    if layers:
        parts: Any = whole.subfigures(2, 1, height_ratios=heights)
        figure = parts[0]
        _plot_layers(parts[1], layers)
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flatten()
    # Most of the picture is sparse: the square root keeps one key in a hundred visible.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    for panel, share, title in zip(panels, shares, titles, strict=False):
        image = panel.imshow(
            share, norm=norm, cmap="magma_r", extent=(0, num_tokens, num_tokens, 0), interpolation="nearest"
        )
        panel.set_title(title, fontsize=9)
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    figure.supxlabel("key position")
    figure.supylabel("row (query) position")
    figure.colorbar(image, ax=list(panels), label="share of causal pairs attended", shrink=0.8)
    whole.savefig(path)


def _plot_layers(figure: Any, layers: Mapping[int, LayerMass]) -> None:
    """Density and kept mass by layer and head as two maps, and by layer, mean over its heads, where the mass went."""
    from matplotlib.ticker import MaxNLocator

    from hf_sparse_attn.pictures.read_rows import READ_KINDS

    num_layers, num_heads = max(layers) + 1, max(len(layer.density) for layer in layers.values())
    maps = torch.full((2, num_layers, num_heads), float("nan"))
    means = torch.zeros(len(READ_KINDS), num_layers)
    for index, layer in layers.items():
        maps[0, index, : len(layer.density)] = layer.density
        maps[1, index, : len(layer.density)] = layer.kept
        means[:, index] = layer.mass.mean(0)
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.6])
    titles = ("density: pairs read of all", "softmax mass kept")
    for axis, values, title in zip(axes, maps, titles, strict=False):
        axis.set_facecolor("lightgrey")
        image = axis.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis)
    bottom = torch.zeros(num_layers)
    for kind, share in zip(READ_KINDS, means, strict=True):
        if share.any():
            axes[2].bar(range(num_layers), share, 0.85, bottom=bottom, label=kind, color=_KIND_COLOURS[kind])
        bottom = bottom + share
    density = maps[0].nanmean(-1)
    axes[2].plot(range(num_layers), density, color="black", marker="_", linestyle="none", label="density")
    axes[2].set_ylim(0, 1)
    axes[2].set_title("softmax mass kept, by kind of key", fontsize=9)
    axes[2].set_xlabel("layer")
    axes[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:2]:
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def plot_heads(maps: torch.Tensor, titles: Sequence[str], path: str | Path, num_columns: int = 3) -> None:
    """Draw one heat map per panel, layers downwards, heads to the right, all on one colour scale that ends at 1.

    Args:
        maps: [panels, num_layers, num_heads], shares in [0, 1]; NaN is drawn grey.
        titles: one a panel.
        path: the picture to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_columns = min(num_columns, len(titles))
    num_rows = -(-len(titles) // num_columns)
    figure = Figure(figsize=(2.6 * num_columns + 1, 3.2 * num_rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flatten()
    lowest = maps.nan_to_num(1.0).min().item()
    for panel, values, title in zip(panels, maps, titles, strict=False):
        panel.set_facecolor("lightgrey")
        image = panel.imshow(
            values.numpy(), vmin=min(lowest, 0.99), vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
        )
        panel.set_title(title, fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    figure.supxlabel("head")
    figure.supylabel("layer")
    figure.colorbar(image, ax=list(panels), label="share; dense layers are grey", shrink=0.8)
    figure.savefig(path)


def plot_choice(density: torch.Tensor, loss: torch.Tensor, path: str | Path) -> None:
    """Draw what was chosen for each head: density and predicted loss, layers downwards, heads to the right.

    Args:
        density, loss: [num_layers, num_heads], as `budget_allocation.by_head` returns them; NaN is drawn grey.
        path: the picture to write; its suffix chooses the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, max(3.0, 0.16 * len(density) + 1)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    largest = max(loss.nan_to_num(0).max().item(), 1e-9)
    scales: tuple[dict[str, Any], ...] = (
        {"vmin": 0, "vmax": 1},
        {"norm": LogNorm(vmin=largest / 1e4, vmax=largest, clip=True)},
    )
    titles = ("density", "predicted loss, nats per token")
    for panel, values, title, scale in zip(panels, (density, loss), titles, scales, strict=True):
        panel.set_facecolor("lightgrey")
        image = panel.imshow(values.numpy(), cmap="viridis", aspect="auto", interpolation="nearest", **scale)
        panel.set_title(title, fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=panel)
    figure.supxlabel("head")
    figure.supylabel("layer (grey: read whole because of its own window, or without attention)", fontsize=8)
    figure.savefig(path)


def plot_trade(trade: Sequence[Allocation], choice: Allocation, path: str | Path) -> None:
    """Draw the predicted loss over the density, the choice marked; the suffix of `path` chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([point.density for point in trade], [point.loss for point in trade], marker=".")
    axes.plot([choice.density], [choice.loss], marker="o", linestyle="none", label="chosen")
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_xlabel("density: read over admissible (row, key) pairs")
    axes.set_ylabel("predicted rise of the loss, nats per token")
    axes.legend()
    figure.savefig(path)


def plot_times(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw the time of dense and sparse attention over the length, both axes logarithmic, with the fitted exponents.

    Args:
        rows: of `evaluation.speed.compare_speed` or `compare_model_speed`, of two lengths at least.
        path: the picture to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from hf_sparse_attn.benchmarking.speed import fitted_exponent

    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: row["seq_len"])
    seq_lens = [row["seq_len"] for row in rows]
    for side, marker in (("dense", "s"), ("sparse", "o")):
        times = [row[f"{side}_ms"] for row in rows]
        axes.loglog(seq_lens, times, marker=marker, label=f"{side}, ~ n^{fitted_exponent(seq_lens, times):.2f}")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"{rows[0]['pass']}, ms")
    axes.set_xticks(seq_lens, [str(n) for n in seq_lens])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)
