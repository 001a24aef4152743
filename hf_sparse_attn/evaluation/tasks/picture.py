"""A picture of what `summarize` returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_tasks(cells: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Accuracy of both sides, and what sparse attention loses with its interval; grey where the dense model fails.

    Args:
        cells: those of `summarize`; a row of two panels for each context length.
        path: the picture to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({cell["context_length"] for cell in cells})
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    figure = Figure(figsize=(10, 1.2 + len(lengths) * (0.7 + 0.32 * len(tasks))), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(lengths), 2, squeeze=False, sharex="col")
    for length, (shares, losses) in zip(lengths, panels, strict=True):
        own = [cell for cell in cells if cell["context_length"] == length]
        rows = range(len(own))
        for side, marker in (("dense", "o"), ("sparse", "x")):
            shares.plot([cell[side]["accuracy"] for cell in own], rows, marker, label=side)
        shares.plot([cell["chance"] for cell in own], rows, "|", color="black", label="chance")
        shares.set(xlim=(-0.03, 1.03), title=f"{length} tokens: share of right answers")
        for row, cell in enumerate(own):
            points = 100 * cell["difference"]["accuracy"]
            low, high = (100 * end for end in cell["difference"]["ci95"])
            colour = "C1" if cell["is_above_chance"] else "lightgrey"
            losses.plot([low, high], [row, row], color=colour)
            losses.plot(points, row, "o", color=colour)
        losses.axvline(0, color="black", linewidth=0.8)
        losses.set_title("sparse minus dense, points, 95% interval")
        for panel in (shares, losses):
            panel.set_yticks(rows, [cell["task"] for cell in own] if panel is shares else [])
            panel.invert_yaxis()
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path)
