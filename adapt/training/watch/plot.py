"""Draws the curves of several runs over each other, against the tokens that they have seen, and prints a table of them.

    adapt plot runs/prefix runs/control                          # runs/prefix/nelbo.png: NELBO against clean tokens
    adapt plot runs/prefix --follow                              # the table alone, every 5 s until Ctrl-C
    adapt plot "block 32=runs/b32" "block 4=runs/b4" --smooth 0.9 --out curves.pdf
    adapt plot runs/* --x time --y clean_tokens_per_s

RUN is a run's folder or its metrics.jsonl, with a label in front if you like: name=path. Clean tokens count each example's own
tokens once, however many noisy copies a method makes of them, so that runs of different methods compare.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from ...arguments import CommandParser
from ...files.outputs import check_file
from ...settings.bounds import Bounds
from ...text_table import text_table
from .figure import FORMATS, draw, is_our_figure
from .run_lines import UNITS, NoLineYet, Run, X, read_runs, smoothed

_SECONDS = 5  # between two tables of --follow
_BARS = "▁▂▃▄▅▆▇█"


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


def table(runs: list[Run], x: str, y: str, smooth: float) -> str:
    """A line for each run: how far it is, last and best value of y (smoothed as drawn), its mean speed, and its curve."""
    best, name = (max, "highest") if y.endswith("_per_s") else (min, "lowest")
    curves = [smoothed(run.curve(X[x][0], y)[1], smooth) for run in runs]
    finite = [[value for value in curve if math.isfinite(value)] or [math.nan] for curve in curves]
    low, high = min(map(min, finite)), max(map(max, finite))
    unit = f" ({UNITS[y]})" if y in UNITS else ""
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


def main(argv: list[str]) -> None:
    """The `adapt plot` command."""
    parser = CommandParser(prog="adapt plot", description=__doc__)
    parser.add_argument(
        "runs", type=str, nargs="+", metavar="RUN", help="a run's folder or metrics.jsonl, or name=path"
    )
    parser.add_argument("--x", default="clean_tokens", choices=sorted(X), help="what the curves run over")
    parser.option(
        "--y",
        type=str | None,
        default=None,
        help="a key of metrics.jsonl, such as loss, nelbo, noised_nll, ar_nll, grad_norm or clean_tokens_per_s; "
        "default: nelbo, or what all runs report of noised_nll and loss",
    )
    parser.option(
        "--smooth",
        type=Annotated[float, Bounds(0, 1, high_is_open=True)],
        default=0.0,
        help="weight of the exponential mean, per logged line, 0 to below 1 (0.9 averages about 10 lines); 0 = as reported",
    )
    parser.option(
        "--out",
        type=str | None,
        default=None,
        help="a .png, .svg or .pdf file; default: Y.png in the first run's folder",
    )
    parser.add_argument("--follow", action="store_true", help="print the table again and again; Ctrl-C ends it")
    arguments = parser.parse_args(argv)
    if arguments.out is not None:
        check_out(arguments.out)
        if arguments.follow:
            raise ValueError(f"out={arguments.out}: --follow draws no figure; leave one of them out")
    if arguments.follow:
        with suppress(KeyboardInterrupt):
            return _follow(arguments.runs, arguments.x, arguments.y, arguments.smooth)
        return
    runs = read_runs(arguments.runs)
    y = _chosen(runs, arguments.x, arguments.y)
    out = check_out(arguments.out or runs[0].path.with_name(f"{y}.png"))
    draw(runs, arguments.x, y, arguments.smooth, out)
    print(table(runs, arguments.x, y, arguments.smooth))
    print(out)


def _chosen(runs: list[Run], x: str, y: str | None) -> str:
    y = y or default_y(runs)
    check_keys(runs, x, y)
    return y


def _follow(paths: list[str], x: str, y: str | None, smooth: float) -> None:
    while True:
        try:
            runs = read_runs(paths)
            text = table(runs, x, _chosen(runs, x, y), smooth)
        except NoLineYet as error:
            text = str(error)
        clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        time.sleep(_SECONDS)


def check_out(out: str | Path) -> Path:
    """The path of a figure that can be written; ValueError for another kind of file, and over what is no figure of ours."""
    path = check_file(out, "out")
    if path.suffix[1:].lower() not in FORMATS:
        raise ValueError(
            f"out={out}: its ending must be one of {', '.join(FORMATS)}, such as {path.with_suffix('.png')}"
        )
    if path.exists() and not is_our_figure(path):
        raise ValueError(f"out={out}: is no figure of `adapt plot`; name another file (nothing was overwritten)")
    return path
