"""The curves of several runs in one figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...files.staging import write_whole
from .run_lines import UNITS, Run, X, smoothed

FORMATS = ("pdf", "png", "svg")
# Okabe and Ito's, told apart with any kind of colour blindness; their yellow is left out, which white paper swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MAKER = "adapt plot"
_DASHES = ("-", "--", ":")


def draw(runs: list[Run], x: str, y: str, smooth: float, out: Path) -> None:
    """Writes the figure, 300 dpi, beside and renamed: curves, and rings for scores on held-out rows. The format is `out`'s ending."""
    from matplotlib.figure import Figure

    key, words = X[x]
    largest = max(max(run.curve(key, y)[0]) for run in runs)
    scale, unit = _scale(x, largest)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        xs, ys = run.curve(key, y)
        xs = [value / scale for value in xs]
        colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]
        marker = "o" if len(xs) == 1 else None  # a line through one point is nothing
        if smooth:
            axes.plot(xs, ys, color=colour, linewidth=0.6, alpha=0.25)
        axes.plot(
            xs, smoothed(ys, smooth), dash, color=colour, linewidth=1.6, marker=marker, markersize=4, label=run.label
        )
        if f"eval_{y}" in run.keys:
            xs, ys = run.curve(key, f"eval_{y}")
            how = {"markersize": 4, "markerfacecolor": "white", "label": f"{run.label}, held out"}
            axes.plot([value / scale for value in xs], ys, "o", color=colour, **how)
    axes.set_xlabel(f"{words} ({unit})" if unit else words)
    axes.set_ylabel(f"{y} ({UNITS[y]})" if y in UNITS else y)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    if smooth:  # one wild step of the faint curves should not flatten the others
        curves = [smoothed(run.curve(key, y)[1], smooth) + run.curve(key, f"eval_{y}")[1] for run in runs]
        shown = [value for curve in curves for value in curve if math.isfinite(value)]
        margin = 0.1 * (max(shown, default=1.0) - min(shown, default=0.0)) or 0.1
        axes.set_ylim(min(shown, default=0.0) - margin, max(shown, default=1.0) + margin)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if smooth:
        axes.set_title(
            f"smoothed, weight {smooth:g} per logged line; as reported, faint",
            fontsize=7.5,
            color="#64748b",
            loc="right",
        )
    # Never over a curve.
    few = sum(len(run.label) + 8 for run in runs) <= 90  # what fits side by side over the axes
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": len(runs)} if few else {"loc": "outside right upper"}
    figure.legend(fontsize=8.5, frameon=False, **place)
    kind = out.suffix[1:].lower()
    mark = {"Software" if kind == "png" else "Creator": _MAKER}
    write_whole(out, lambda beside: figure.savefig(beside, format=kind, dpi=300, metadata=mark))


def is_our_figure(path: Path) -> bool:
    """Whether a file says that `draw` wrote it."""
    return _MAKER.encode() in path.read_bytes()


def _scale(x: str, largest: float) -> tuple[float, str]:
    """(what to divide by, the unit then)."""
    if x == "time":
        return next(pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if largest >= 2 * pair[0] or pair[0] == 1)
    sizes = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, ""))
    return next(pair for pair in sizes if largest >= 2 * pair[0] or pair[0] == 1)
