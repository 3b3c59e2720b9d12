"""A report's numbers in words: scores with intervals, differences, the headline, the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from adapt.text_table import text_table

ARMS = ("base", "control", "adapted")
ARM_WORDS = {"base": "original", "control": "control", "adapted": "adapted"}
_PERCENT = ("acc", "exact_match", "em", "f1", "pass")


def primary(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row that the headline is about: the first exact match, else the first accuracy, else the first row."""
    rows = report["quality"]
    for prefix in ("exact_match", "acc"):
        for row in rows:
            if row["metric"].startswith(prefix):
                return row
    return rows[0] if rows else None


def speed_row(report: Mapping[str, Any], arm: str, batch_size: int | None = None) -> Mapping[str, Any] | None:
    """The arm's speed at `batch_size`, or at the smallest batch size measured; sweep points are left out."""
    rows = [r for r in report["speed"] if r["arm"] == arm and batch_size in (None, r["batch_size"])]
    return min(rows, key=lambda r: r["batch_size"]) if rows else None


def speed_ratio(
    report: Mapping[str, Any], over: str, batch_size: int | None = None, arm: str = "adapted"
) -> tuple[float, float, float] | None:
    """(median, lowest, highest) over the rounds of `arm` tokens/s / `over` tokens/s; in a round the arms take turns."""
    mine, theirs = speed_row(report, arm, batch_size), speed_row(report, over, batch_size)
    if not mine or not theirs or not theirs["tokens_per_s"] or mine["tokens_per_s"] is None:
        return None
    a, b = mine.get("tokens_per_s_runs") or [], theirs.get("tokens_per_s_runs") or []
    ratios = [x / y for x, y in zip(a, b) if x is not None and y]
    if not ratios:
        ratios = [mine["tokens_per_s"] / theirs["tokens_per_s"]]
    return median(ratios), min(ratios), max(ratios)


def is_percent(row: Mapping[str, Any]) -> bool:
    """True for metrics that are a share of items, shown in per cent and their differences in points."""
    values = [row[a]["value"] for a in ARMS if row.get(a) and row[a]["value"] is not None]
    name = row["metric"].split(",")[0]
    return name.startswith(_PERCENT) and all(0 <= v <= 1 for v in values)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands set apart; a dash for what is not known."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{round(value, decimals):,.{min(decimals, 6)}f}"


def score(row: Mapping[str, Any], arm: str) -> str:
    """The arm's score with its interval: `62.0 % [55.1, 68.4]`."""
    cell = row.get(arm)
    if not cell or cell["value"] is None:
        return "–"
    scale, unit, form = (100, " %", "{:.1f}") if is_percent(row) else (1, "", "{:#.4g}")
    text = form.format(scale * cell["value"]) + unit
    low, high = cell.get("ci95") or (None, None)
    if low is not None and high is not None:
        text += f" [{form.format(scale * low)}, {form.format(scale * high)}]"
    return text


def difference(row: Mapping[str, Any], against: str = "base") -> str:
    """Adapted minus `against`: `-3.0 points [-8.0, +2.1]`."""
    cell = row if against == "base" else row.get("vs_control")
    if not cell or cell["delta"] is None:
        return "–"
    scale, unit, form = (100, " points", "{:+.1f}") if is_percent(row) else (1, "", "{:+#.4g}")
    text = form.format(scale * cell["delta"]) + unit
    low, high = cell["ci95"]
    if low is not None and high is not None:
        text += f" [{form.format(scale * low)}, {form.format(scale * high)}]"
    return text


def p_words(p: float | None) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return "p unknown" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def headline(report: Mapping[str, Any]) -> str:
    """The sentences in one line."""
    return " ".join(sentences(report))


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What came out, computed from the numbers: scores and differences with intervals, a verdict, speed."""
    notice = report.get("provenance", {}).get("notice")
    parts = [notice] if notice else []
    row = primary(report)
    if row is not None:
        against = ["base", "control"] if row.get("vs_control") else ["base"]
        others = " and ".join(f"the {ARM_WORDS[arm]} {_bare(score(row, arm))}" for arm in against)
        gaps = ", ".join(f"{_spelled(difference(row, arm))} against the {ARM_WORDS[arm]}" for arm in against)
        parts.append(
            f"On {row['task']} ({row['metric'].split(',')[0]}, n = {row['n']}) the adapted model scores "
            f"{_bare(score(row, 'adapted'))}, {others}: {gaps}."
        )
        parts.append(_verdict(row, against))
    mine = speed_row(report, "adapted")
    if mine is not None:
        text = f"At batch size {mine['batch_size']} it writes {number(mine['tokens_per_s'])} tokens/s"
        ratios = [(arm, speed_ratio(report, arm, mine["batch_size"])) for arm in ("base", "control")]
        words = [f"{r[0]:.2f} times the {ARM_WORDS[arm]}'s" for arm, r in ratios if r]
        if words:
            text += ", " + " and ".join(words)
        if mine["tpf"] is not None:
            text += f", with {mine['tpf']:.2f} tokens per forward pass"
        parts.append(text + ".")
    return parts or ["Nothing was measured."]


def _bare(text: str) -> str:
    return text.split(" [")[0]


def _spelled(text: str) -> str:
    """`+3.0 points [-1.0, +7.0]` -> `+3.0 points (95 % interval -1.0 to +7.0)`."""
    value, bracket, rest = text.partition(" [")
    return f"{value} (95 % interval {rest[:-1].replace(', ', ' to ')})" if bracket else value


def _verdict(row: Mapping[str, Any], against: list[str]) -> str:
    """`These items show it worse than the original and do not tell it from the control.`"""
    arms: dict[str, list[str]] = {}
    for arm in against:
        cell = row if arm == "base" else row["vs_control"]
        low, high = cell["ci95"]
        better = (cell["delta"] > 0) == bool(row["higher_is_better"])
        clear = low is not None and not low <= 0 <= high
        verb = f"show it {'better' if better else 'worse'} than" if clear else "do not tell it from"
        arms.setdefault(verb, []).append(f"the {ARM_WORDS[arm]}")
    said = (f"{verb} {(' or ' if verb.startswith('do') else ' and ').join(names)}" for verb, names in arms.items())
    return f"These items {' and '.join(said)}."


def terminal_table(report: Mapping[str, Any]) -> str:
    """The end of `adapt compare`: per arm the score with its interval, tokens/s, forwards, tokens per forward."""
    row = primary(report)
    sizes = sorted({r["batch_size"] for r in report["speed"]})
    smallest = sizes[0] if sizes else None
    label = f"{row['task']} {row['metric'].split(',')[0]} (n={row['n']})" if row else "quality"
    head = ["arm", label, "tokens/s", "forwards", "tokens/forward", "x original", "x control"]
    lines = []
    for arm in ARMS:
        speed = speed_row(report, arm, smallest)
        if arm == "control" and speed is None and not (row and row.get("control")):
            continue
        cells = [ARM_WORDS[arm], score(row, arm) if row else "–"]
        cells += [number(speed[k]) if speed else "–" for k in ("tokens_per_s", "nfe", "tpf")]
        for over in ("base", "control"):
            ratio = speed_ratio(report, over, smallest, arm)
            cells.append(f"{ratio[0]:.2f}" if ratio else "–")
        lines.append(cells)
    rows = text_table([head, *lines], left=(0, 1), ruled=True)
    if smallest is not None:
        rows.append(f"Speed at batch size {smallest}; forwards per batch; scores with 95 % intervals.")
    return "\n".join(rows)
