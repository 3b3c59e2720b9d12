"""The report's plots, each a data URI of an SVG (None where there is nothing to draw)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .words import ARM_WORDS, ARMS, is_percent, number, primary, speed_row

COLOURS = {"base": "#64748b", "control": "#d97706", "adapted": "#0d9488"}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _embed(figure: Any) -> str:
    """A data URI: as an image of its own, so that the ids of two SVGs cannot meet."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "adapt"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tidy(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#94a3b8")
    axes.tick_params(length=0, colors="#334155", labelsize=9)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)


def _bars(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float] | None]]) -> None:
    """Grouped bars; series: arm -> per group (value, lowest, highest) or None."""
    arms = [arm for arm in ARMS if any(series.get(arm, []))]
    width = min(0.26, 0.8 / max(1, len(arms)))
    for k, arm in enumerate(arms):
        for i, cell in enumerate(series[arm]):
            if cell is None:
                continue
            value, low, high = cell
            x = i + (k - (len(arms) - 1) / 2) * (width + 0.03)
            label = None if ARM_WORDS[arm] in axes.get_legend_handles_labels()[1] else ARM_WORDS[arm]
            axes.bar(x, value, width, color=COLOURS[arm], label=label, zorder=2)
            axes.errorbar(x, value, yerr=[[max(0, value - low)], [max(0, high - value)]], color="#0f172a",
                          capsize=3, linewidth=1.1, zorder=3)  # fmt: skip
            above = value >= 0
            axes.annotate(number(value), (x, max(value, high) if above else min(value, low)), ha="center", fontsize=8,
                          va="bottom" if above else "top", color="#334155", xytext=(0, 2 if above else -2),
                          textcoords="offset points")  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.15)
    _tidy(axes)


def quality(report: Mapping[str, Any]) -> str | None:
    rows = report["quality"]
    shares = [r for r in rows if is_percent(r)]
    panels = ([shares] if shares else []) + [[r] for r in rows if not is_percent(r)]
    if not panels:
        return None
    widths = [max(1, len(p)) for p in panels]
    figure = _figure(min(13.0, max(4.6, 1.6 + 1.9 * sum(widths))), 3.4)
    all_axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels):
        scale = 100 if is_percent(panel[0]) else 1
        series: dict[str, list[Any]] = {arm: [] for arm in ARMS}
        for row in panel:
            for arm in ARMS:
                cell = row.get(arm)
                if not cell or cell["value"] is None:
                    series[arm].append(None)
                    continue
                low, high = cell.get("ci95") or (None, None)
                ends = (cell["value"],) * 2 if low is None or high is None else (low, high)
                series[arm].append(tuple(scale * v for v in (cell["value"], *ends)))
        names = [r["metric"].split(",") for r in panel]
        groups = [
            f"{r['task']}\n{m[0]}" + (f"\n{m[1]}" if len(m) > 1 and m[1] != "none" else "")
            for r, m in zip(panel, names)
        ]
        _bars(axes, groups, series)
        if scale == 100:
            axes.set_ylabel("per cent of items", fontsize=9, color="#334155")
            axes.set_ylim(0, min(108, axes.get_ylim()[1]))
        else:
            better = {True: "higher is better", False: "lower is better"}.get(panel[0]["higher_is_better"], "")
            axes.set_title(better, fontsize=8.5, color="#64748b")
    all_axes[0].legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return _embed(figure)


def speed(report: Mapping[str, Any]) -> str | None:
    sizes = sorted({r["batch_size"] for r in report["speed"]})
    if not sizes:
        return None
    figure = _figure(min(11.0, 2.2 + 2.0 * len(sizes)), 3.4)
    axes = figure.subplots()
    series: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        for size in sizes:
            row = speed_row(report, arm, size)
            if row is None or row["tokens_per_s"] is None:
                series[arm].append(None)
                continue
            runs = [v for v in row.get("tokens_per_s_runs") or [] if v is not None] or [row["tokens_per_s"]]
            series[arm].append((row["tokens_per_s"], min(runs), max(runs)))
    _bars(axes, [f"batch size {size}" for size in sizes], series)
    axes.set_ylabel("emitted tokens per second", fontsize=9, color="#334155")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return _embed(figure)


def pareto(report: Mapping[str, Any]) -> str | None:
    points = [p for p in report["pareto"] if p["quality"] is not None and p["tokens_per_s"] is not None]
    if not points:
        return None
    row = primary(report)
    scale = 100 if row and is_percent(row) else 1
    figure = _figure(6.2, 3.8)
    axes = figure.subplots()
    swept = sorted((p for p in points if p.get("arm") == "adapted"), key=lambda p: p["tokens_per_s"])
    if len(swept) > 1:
        axes.plot([p["tokens_per_s"] for p in swept], [scale * p["quality"] for p in swept],
                  color=COLOURS["adapted"], linewidth=1, alpha=0.5, zorder=1)  # fmt: skip
    for p in points:
        arm = p.get("arm", "adapted")
        low, high = p.get("ci95") or (None, None)
        if low is not None:
            value = p["quality"]
            axes.errorbar(p["tokens_per_s"], scale * value, color=COLOURS[arm], linewidth=1, capsize=3, alpha=0.7,
                          yerr=[[max(0, scale * (value - low))], [max(0, scale * (high - value))]])  # fmt: skip
        axes.scatter(p["tokens_per_s"], scale * p["quality"], s=60, color=COLOURS[arm], zorder=3)
        # The rest of the sampler is in the tables; one point is told from another by its first setting.
        words = f"adapted, {p['sampler'].split(', ')[0]}" if arm == "adapted" else ARM_WORDS[arm]
        axes.annotate(words, (p["tokens_per_s"], scale * p["quality"]), xytext=(7, 5), textcoords="offset points",
                      fontsize=8.5, color="#334155")  # fmt: skip
    axes.set_xlim(0, 1.3 * max(p["tokens_per_s"] for p in points))
    axes.margins(y=0.15)
    name = f"{row['task']}, {row['metric'].split(',')[0]}" if row else "quality"
    axes.set_ylabel(f"{name} (%)" if scale == 100 else name, fontsize=9, color="#334155")
    axes.set_xlabel("emitted tokens per second", fontsize=9, color="#334155")
    _tidy(axes)
    axes.grid(axis="x", color="#e2e8f0", linewidth=0.8)
    return _embed(figure)
