"""Quality against speed: a point per arm, and one per sampler setting that is swept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapt.decoding.settings import changed

from ..arms import Prompts, speed_arm
from ..lm import AdaptLM
from ..report.words import primary
from . import speed
from .quality import evaluate, quality_rows


def arm_points(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One point per arm: the headline's score against tokens/s at the smallest batch size."""
    row = primary(report)
    smallest = min((r["batch_size"] for r in report["speed"]), default=None)
    return [
        _point(r["arm"], r["sampler"], row, row[r["arm"]], r)
        for r in report["speed"]
        if row is not None and row.get(r["arm"]) and r["batch_size"] == smallest
    ]


def _point(arm: str, sampler: str, row: Mapping[str, Any], cell: Mapping[str, Any], fast: Mapping[str, Any]) -> dict:
    return {
        "arm": arm, "sampler": sampler, "task": row["task"], "metric": row["metric"], "quality": cell["value"],
        "ci95": cell["ci95"], "tokens_per_s": fast["tokens_per_s"], "tpf": fast["tpf"],
        "batch_size": fast["batch_size"],
    }  # fmt: skip


def sweep_point(
    report: Mapping[str, Any], lm: AdaptLM, threshold: float, prompts: Prompts, results: Mapping[str, Any],
    manager: Any, settings: dict[str, Any], num_fewshot: int | None, tokenizer: Any, repeats: int, progress: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The adapted arm at another threshold, on the headline's task and at the smallest batch size measured."""
    row = primary(report)
    if row is None or not report["speed"]:
        return []
    sampler = changed(lm.sampler, threshold=threshold)
    at = AdaptLM(
        lm.lm, batch_size=lm.batch_size, sampler=sampler, mc_samples=lm.mc_samples, seed=lm.seed, progress=progress
    )
    scored = evaluate(at, manager, [row["task"]], num_fewshot=num_fewshot, **settings)
    again, _ = quality_rows({"base": results["base"] | {}, "adapted": scored}, seed=settings["seed"])
    cell = next((r["adapted"] for r in again if r["metric"] == row["metric"]), None)
    smallest = min(r["batch_size"] for r in report["speed"])
    fast = speed.measure(
        [speed_arm("adapted", at, prompts, sampler, lm.seed)], tokenizer=tokenizer, batch_sizes=[smallest],
        repeats=repeats, progress=progress,
    )  # fmt: skip
    return [_point("adapted", fast[0]["sampler"], row, cell, fast[0])] if cell and fast else []
