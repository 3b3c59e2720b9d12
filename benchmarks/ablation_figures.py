"""Raw runs -> bounds with intervals, tables and one plot."""

from __future__ import annotations

import json
import platform
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
from ablation_arms import ARMS, REFERENCE
from ablation_plan import Plan, best_rate, tuned
from ablation_runs import Task
from ablation_texts import Text, length_nats

from adapt_eval.measure import stats

OUT_OF_TIME = "not finished: out of time"


def read_runs(path: Path, without_failed: bool = False) -> dict[str, dict[str, Any]]:
    """Task key -> its row (of several the last), of a file that may not be there yet; a failed run counts as done, or not."""
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    by_key = {_task(row).key: row for row in rows}
    return {key: row for key, row in by_key.items() if not (without_failed and "error" in row)}


def _task(row: dict[str, Any]) -> Task:
    """Of a row, which may be older than a field that has a default."""
    return Task(**{one.name: row[one.name] for one in fields(Task) if one.name in row or one.default is MISSING})


def append_run(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def per_token(row: dict[str, Any], texts: list[Text]) -> float:
    """NELBO of a run, nats/token."""
    return sum(row["nelbo"]) / sum(len(text.ids) for text in texts[: len(row["nelbo"])])


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, one thread a run"


def results(
    plan: Plan,
    names: list[str],
    done: dict[str, dict[str, Any]],
    train_texts: list[Text],
    texts: list[Text],
    base_nats: list[float],
    longest: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(one row an arm, in their order; figures of the texts).

    Bounds are nats/token: means over texts, each weighing by its length, and over seeds.
    A bidirectional arm is told how long a text is; -log p(length) is added, ablation_texts.length_nats: lengths up to `longest`.
    """
    lengths = [len(text.ids) for text in texts]
    mean_length = float(np.mean(lengths))
    length_cost = length_nats([len(text.ids) for text in train_texts], lengths, longest)
    rows, items = [], {}
    for name in names:
        arm = ARMS[name]
        tried = {rate: done[plan.tuning(name, rate).key] for rate in tuned(plan, name, done)}
        row: dict[str, Any] = {
            "arm": name,
            "tuning": {rate: r.get("error") or per_token(r, texts) for rate, r in tried.items()},
        }
        rows.append(row)
        best, _ = best_rate(plan, name, done)
        if best is None:
            row["error"] = next((r["error"] for r in tried.values() if "error" in r), OUT_OF_TIME)
            continue
        row |= {"learning_rate": best, "at_edge": best in (plan.ladder[0], plan.ladder[-1])}
        finals = [done[task.key] for task in plan.final(name, best) if task.key in done]
        errors = [final["error"] for final in finals if "error" in final]
        finals = [final for final in finals if "error" not in final]
        row["seeds"] = len(finals)
        if errors or not finals:
            row["error"] = errors[0] if errors else OUT_OF_TIME
        if not finals:
            continue
        extra = length_cost if arm.settings.get("model.attention") == "bidirectional" else 0.0
        by_seed = np.array([(np.array(f["nelbo"]) + extra - base_nats) / mean_length for f in finals])  # [S, texts]
        items[name] = by_seed
        first = finals[0]
        row |= {
            "bound": float(by_seed.mean()),
            "ci95": stats.bootstrap_mean(by_seed.mean(0)),
            "by_seed": by_seed.mean(1).tolist(),
            # All seeds are scored under the same noise, so that its error does not shrink with their number.
            "mc_stderr": float(np.mean([np.linalg.norm(f["mc_stderr"]) for f in finals])) / sum(lengths),
            "positions": sum(f["positions"] for f in finals) / sum(f["clean_tokens"] for f in finals),
            "cpu_s": float(np.mean([f["train_cpu_s"] for f in finals])),
            "steps": first["steps"],
            "clean_tokens": float(np.mean([f["clean_tokens"] for f in finals])),
        }
        if first["ar_nll"] is not None:
            drift = np.array([(np.array(f["ar_nll"]) - base_nats) / mean_length for f in finals])
            row |= {"drift": float(drift.mean()), "drift_ci95": stats.bootstrap_mean(drift.mean(0))}
    for row in rows:
        if row["arm"] in items and REFERENCE in items and row["arm"] != REFERENCE:
            row["against_reference"] = _against(items[REFERENCE], items[row["arm"]])
    used = [row for row in done.values() if row["arm"] in names]
    about = {
        "revisions": sorted({row["revision"] for row in used}),
        "hardware": sorted({row["hardware"] for row in used}),
        "dates": sorted({row["started"][:10] for row in used}),
        "failed": sum("error" in row for row in used),
        "num_runs": len(used),
        "mean_length": mean_length,
        "base_nll": sum(base_nats) / sum(lengths),
        "length_cost": float(length_cost.mean()) / mean_length,
    }
    return rows, about


def _against(reference: np.ndarray, arm: np.ndarray) -> dict[str, Any]:
    """Arm minus reference over the same texts; separated: the interval over texts and all pairs of seeds lie on one side of 0."""
    found = stats.paired(reference.mean(0), arm.mean(0))
    ours, theirs = arm.mean(1), reference.mean(1)
    low, high = found.ci95
    apart = (low or 0) * (high or 0) > 0 and (ours.max() < theirs.min() or ours.min() > theirs.max())
    return {"delta": found.delta, "ci95": found.ci95, "separated": bool(apart)}


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| arm | learning rate | positions | CPU s | bound [95 %] | seeds | against | drift |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = f"{row['learning_rate']:g}{'!' * row['at_edge']}" if "learning_rate" in row else ""
        if "bound" not in row:
            lines.append(f"| {row['arm']} | {rate} | | | {row['error']} | | | |")
            continue
        seeds = f"{min(row['by_seed']):.3f} to {max(row['by_seed']):.3f} ({row['seeds']})"
        other = row.get("against_reference")
        against = (
            f"{other['delta']:+.3f} {_interval(other['ci95'])}{'' if other['separated'] else ' ='}" if other else ""
        )
        drift = f"{row['drift']:+.3f} {_interval(row['drift_ci95'])}" if "drift" in row else ""
        note = f" ({row['error']})" if "error" in row else ""
        lines.append(
            f"| {row['arm']}{note} | {rate} | {row['positions']:.2f} | {row['cpu_s']:.0f} | {row['bound']:.3f} "
            f"{_interval(row['ci95'])} | {seeds} | {against} | {drift} |"
        )
    return lines


def tuning_table(rows: list[dict[str, Any]]) -> list[str]:
    rates = sorted({rate for row in rows for rate in row["tuning"]})
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for row in rows:
        found = [row["tuning"].get(rate, "") for rate in rates]
        lines.append(f"| {row['arm']} | " + " | ".join(f if isinstance(f, str) else f"{f:.3f}" for f in found) + " |")
    return lines


def _interval(ci95: tuple) -> str:
    return "" if ci95[0] is None else f"[{ci95[0]:.3f}, {ci95[1]:.3f}]"


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Bounds with intervals and seeds, arm by arm; and against the CPU time of a training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = sorted((row for row in rows if "bound" in row), key=lambda row: -row["bound"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.34 * len(shown)), width_ratios=[3, 2])
    for y, row in enumerate(shown):
        color = "tab:orange" if row["arm"].startswith("bidirectional") else "tab:blue"
        error = [[row["bound"] - row["ci95"][0]], [row["ci95"][1] - row["bound"]]]
        left.errorbar(row["bound"], y, xerr=error, fmt="o", color=color, capsize=3)
        left.plot(row["by_seed"], [y] * len(row["by_seed"]), "|", color="black", markersize=9)
        right.errorbar(row["cpu_s"], row["bound"], yerr=error, fmt="o", color=color)
        right.annotate(row["arm"], (row["cpu_s"], row["bound"]), fontsize=6, xytext=(4, 2), textcoords="offset points")
    left.set_yticks(range(len(shown)), [row["arm"] for row in shown])
    left.set_xlabel(
        "NELBO - NLL of the base, nats/token: bound on KL(original || adapted)\n95 % over texts; bars: seeds"
    )
    right.set_xlabel("CPU seconds of one training")
    right.set_ylabel("the same bound")
    left.grid(axis="x", alpha=0.3)
    right.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
