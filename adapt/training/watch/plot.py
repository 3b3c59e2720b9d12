"""Draws the curves of several runs over each other, against the tokens that they have seen, and prints a table of them.

    adapt plot runs/prefix runs/control                          # nelbo.png: NELBO against clean tokens
    adapt plot "block 32=runs/b32" "block 4=runs/b4" --smooth 0.9 --out curves.pdf
    adapt plot runs/* --x time --y clean_tokens_per_s

RUN is a run's folder or its metrics.jsonl, with a label in front if you like: name=path. Clean tokens count each example's own
tokens once, however many noisy copies a method makes of them, so that runs of different methods compare.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...arguments import CommandParser
from ...files.staging import write_whole
from ...text_table import text_table

X = {
    "clean_tokens": ("clean_tokens_seen", "clean tokens seen"),
    "step": ("step", "optimizer steps"),
    "time": ("elapsed_s", "training time"),
    "tokens": ("tokens_seen", "positions computed, padding and noisy copies included"),
}
_UNITS = {
    **dict.fromkeys(("loss", "nelbo", "noised_nll", "ar_nll", "distill_kl"), "nats/token"),
    **dict.fromkeys(("tokens_per_s", "useful_tokens_per_s", "clean_tokens_per_s"), "tokens/s"),
    "elapsed_s": "s",
    "grad_norm": "L2",
    "peak_memory_gb": "GB",
}
_FORMATS = ("pdf", "png", "svg")
# Okabe and Ito's, told apart with any kind of colour blindness; their yellow is left out, which white paper swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Run:
    """A label, and the lines of a metrics.jsonl."""

    label: str
    path: Path
    lines: list[dict[str, Any]]

    @property
    def keys(self) -> set[str]:
        """Keys that hold a number in some line."""
        return {key for line in self.lines for key, value in line.items() if _is_number(value)}

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """(x, y) of the lines that have both; NaN is kept, as a gap."""
        points = [(line[x], line[y]) for line in self.lines if _is_number(line.get(x)) and _is_number(line.get(y))]
        return [float(point[0]) for point in points], [float(point[1]) for point in points]


def read_runs(arguments: list[str]) -> list[Run]:
    """The runs that were asked for; those with one label get more of their path. ValueError for what is no run."""
    named: list[tuple[str | None, Path]] = []
    for argument in arguments:
        label, equals, path = argument.partition("=")
        named.append((label, Path(path)) if equals and not Path(argument).exists() else (None, Path(argument)))
    runs = [(label, *_read(path)) for label, path in named]
    labels = [label or path.parent.resolve().name for label, path, _ in runs]
    if len(set(labels)) < len(labels):  # runs/a/out and runs/b/out
        labels = [label or str(path.parent) for label, path, _ in runs]
    return [Run(label, path, lines) for label, (_, path, lines) in zip(labels, runs, strict=True)]


def _read(path: Path) -> tuple[Path, list[dict]]:
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        what = "holds no metrics.jsonl" if path.is_dir() else "no such file or folder"
        raise ValueError(f"RUN={path}: {what}; give a run's folder (training.output_dir) or its metrics.jsonl")
    texts = file.read_text().splitlines()
    lines: list[dict] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break  # a run that is going on, or was killed, as it wrote it
            raise ValueError(f"RUN={file}: line {number} is no JSON ({error.msg}); is it a metrics.jsonl?") from error
        if not isinstance(line, dict):
            raise ValueError(f"RUN={file}: line {number} is no JSON object; is it a metrics.jsonl?")
        lines.append(line)
    if not lines:
        raise ValueError(f"RUN={file}: holds no line yet; wait for the run's first log")
    if not any("step" in line for line in lines):
        raise ValueError(f"RUN={file}: has no step in any line; give the metrics.jsonl that a run wrote")
    return file, lines


def default_y(runs: list[Run]) -> str:
    """What all runs report of nelbo, noised_nll and loss, the first of them."""
    common = set.intersection(*(run.keys for run in runs))
    found = [key for key in ("nelbo", "noised_nll", "loss") if key in common]
    if not found:
        raise ValueError(f"y: the runs have no loss in common; {_have(common)}")
    return found[0]


def check_keys(runs: list[Run], x: str, y: str) -> None:
    """ValueError if a run lacks what is to be drawn, with what all of them have."""
    common = set.intersection(*(run.keys for run in runs))
    for run in runs:
        if y not in run.keys:
            raise ValueError(f"y={y}: {run.label} does not report it; {_have(common)}")
        if X[x][0] not in run.keys:
            ways = sorted(name for name, (key, _) in X.items() if key in common)
            raise ValueError(f"x={x}: {run.label} does not report {X[x][0]}; choose one of {', '.join(ways) or 'none'}")
        if not run.curve(X[x][0], y)[0]:
            raise ValueError(f"y={y}: {run.label} reports it on no line that has {X[x][0]}; choose another x or y")


def _have(common: set[str]) -> str:
    return (
        f"choose one of {', '.join(sorted(common))}" if common else "they have no key in common: draw them one by one"
    )


def smoothed(values: list[float], weight: float) -> list[float]:
    """The debiased exponential mean, as TensorBoard's: each value counts `weight` times the one after it. NaN stays, uncounted."""
    means: list[float] = []
    total = norm = 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1
        means.append(total / norm if math.isfinite(value) else math.nan)
    return means


def draw(runs: list[Run], x: str, y: str, smooth: float, out: Path) -> None:
    """Writes the figure, 300 dpi, beside and renamed. The format is the ending of `out`."""
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
    axes.set_xlabel(f"{words} ({unit})" if unit else words)
    axes.set_ylabel(f"{y} ({_UNITS[y]})" if y in _UNITS else y)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    if smooth:  # one wild step of the faint curves should not flatten the others
        shown = [value for run in runs for value in smoothed(run.curve(key, y)[1], smooth) if math.isfinite(value)]
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
    write_whole(out, lambda beside: figure.savefig(beside, format=out.suffix[1:].lower(), dpi=300))


def _scale(x: str, largest: float) -> tuple[float, str]:
    """(what to divide by, the unit then)."""
    if x == "time":
        return next(pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if largest >= 2 * pair[0] or pair[0] == 1)
    sizes = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, ""))
    return next(pair for pair in sizes if largest >= 2 * pair[0] or pair[0] == 1)


def table(runs: list[Run], x: str, y: str, smooth: float) -> str:
    """A line for each run: how far it is, last and best value of y (smoothed as drawn), its mean speed, and its curve."""
    best, name = (max, "highest") if y.endswith("_per_s") else (min, "lowest")
    curves = [smoothed(run.curve(X[x][0], y)[1], smooth) for run in runs]
    finite = [[value for value in curve if math.isfinite(value)] or [math.nan] for curve in curves]
    low, high = min(map(min, finite)), max(map(max, finite))
    unit = f" ({_UNITS[y]})" if y in _UNITS else ""
    how = f", smoothed {smooth:g}" if smooth else ""
    rows = [["run", "steps", "clean tokens", f"last {y}{unit}{how}", name, "clean tokens/s", "curve"]]
    for run, curve, values in zip(runs, curves, finite, strict=True):
        end = run.lines[-1]
        seen, seconds = end.get("clean_tokens_seen"), end.get("elapsed_s")
        speed = f"{seen / seconds:,.0f}" if seen and seconds else "-"
        tokens = f"{seen:,}" if seen is not None else "-"
        figures = [f"{end.get('step', '-')}", tokens, f"{curve[-1]:.5g}", f"{best(values):.5g}", speed]
        rows.append([run.label, *figures, sparkline(curve, low, high)])
    return "\n".join(text_table(rows, left=(0, len(rows[0]) - 1)))


def sparkline(values: list[float], low: float, high: float, width: int = 24) -> str:
    """At most `width` bars between low and high, each the mean of a stretch; a blank where nothing is finite."""
    width = min(width, len(values))
    bars = ""
    for i in range(width):
        stretch = values[i * len(values) // width : (i + 1) * len(values) // width]
        finite = [value for value in stretch if math.isfinite(value)]
        if not finite:
            bars += " "
            continue
        share = (sum(finite) / len(finite) - low) / (high - low) if high > low else 0.0
        bars += _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]
    return bars


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def main(argv: list[str]) -> None:
    """The `adapt plot` command."""
    parser = CommandParser(prog="adapt plot", description=__doc__)
    parser.add_argument(
        "runs", type=str, nargs="+", metavar="RUN", help="a run's folder or metrics.jsonl, or name=path"
    )
    parser.add_argument("--x", default="clean_tokens", choices=sorted(X), help="what the curves run over")
    parser.add_argument(
        "--y",
        type=str | None,
        default=None,
        help="a key of metrics.jsonl, such as loss, nelbo, noised_nll, ar_nll, grad_norm or clean_tokens_per_s; "
        "default: nelbo, or what all runs report of noised_nll and loss",
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        help="weight of the exponential mean, per logged line, 0 to below 1 (0.9 averages about 10 lines); 0 = as reported",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="a .png, .svg or .pdf file; default: Y.png in the current folder"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.smooth < 1:
        raise ValueError(f"smooth={arguments.smooth}: must be at least 0 and below 1; try 0.9")
    if arguments.out is not None:
        check_out(Path(arguments.out))
    runs = read_runs(arguments.runs)
    y = arguments.y or default_y(runs)
    check_keys(runs, arguments.x, y)
    out = Path(arguments.out or f"{y}.png")
    draw(runs, arguments.x, y, arguments.smooth, out)
    print(table(runs, arguments.x, y, arguments.smooth))
    print(out)


def check_out(out: Path) -> None:
    """ValueError if that file cannot be written."""
    if out.suffix[1:].lower() not in _FORMATS:
        raise ValueError(
            f"out={out}: its ending must be one of {', '.join(_FORMATS)}, such as {out.with_suffix('.png')}"
        )
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out}: no such folder {out.parent}; make it first")
