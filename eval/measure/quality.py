"""Quality: every arm through lm-eval, items paired by document, one row per task and metric."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.tasks import TaskManager

from . import stats

# lm-eval aggregates these over the corpus from a log-likelihood per item. The items are what can be paired, so the rows
# show their mean instead: name -> (name of the row, divisor of the nats, higher is better).
_FROM_LOGLIKELIHOOD: dict[str, tuple[str, float, bool]] = {
    "perplexity": ("loglikelihood", 1.0, True),
    "bits_per_byte": ("bits_per_byte", float(np.log(2)), False),
    "byte_perplexity": ("nats_per_byte", 1.0, False),
    "word_perplexity": ("nats_per_word", 1.0, False),
}


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskManager:
    """A task manager that knows all of `tasks`; ValueError with the nearest names where one is unknown."""
    if not tasks:
        raise ValueError("tasks=: name at least one lm-eval task, such as gsm8k")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"include_path={include_path}: no such folder; give one with lm-eval task YAMLs")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(name in own.all_tasks for name in tasks):  # lm-eval's own 14,000 tasks take ten seconds to index
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`adapt lm_eval ls tasks` lists lm-eval's."
            raise ValueError(f"tasks={name}: unknown task; {hint} Your own tasks need --include_path FOLDER")
    return manager


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Errors only from the logger `name`: lm-eval comments on every choice that compare makes on purpose."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def evaluate(
    lm: Any,
    manager: TaskManager,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """lm-eval's results of one arm, logged samples included.

    `num_fewshot` holds also where a task's own YAML says 0, which lm-eval's own override leaves at 0 without a word.
    The seeds are set anew for each arm, so that all arms are shown the same examples.
    """
    with quiet("lm_eval"), quiet("lm-eval"):
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            if num_fewshot is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        results = lm_eval_evaluate(
            lm,
            loaded,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    assert results is not None, "lm-eval answers on rank 0 only, and compare is one process"
    return dict(results)


def items_of(samples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[tuple, float]], set[str]]:
    """({"metric,filter": {(doc_id, doc_hash): value}}, metrics that have no value per item) of one task's samples."""
    found: dict[str, dict[tuple, float]] = {}
    skipped: set[str] = set()
    weights: dict[str, float] = {}
    for metric in {m for s in samples for m in s["metrics"]}:
        pairs = [s[metric] for s in samples if metric in s and _is_pair(s[metric])]
        if pairs:  # a ratio of sums: the mean of nats / (mean weight) is sum of nats / sum of weights
            weights[metric] = float(np.mean([weight for _, weight in pairs]))
    for sample in samples:
        key = (sample["doc_id"], sample["doc_hash"])
        for metric in sample["metrics"]:
            value, name = sample[metric], metric
            if metric in _FROM_LOGLIKELIHOOD and (_is_pair(value) or _is_number(value)):
                name, divisor, higher = _FROM_LOGLIKELIHOOD[metric]
                nats = value[0] / weights[metric] if _is_pair(value) else value
                value = nats if higher else -nats / divisor
            elif not _is_number(value):
                skipped.add(metric)
                continue
            found.setdefault(f"{name},{sample['filter']}", {})[key] = float(value)
    return found, skipped


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_number(v) for v in value)


def quality_rows(
    results: Mapping[str, Mapping[str, Any]], *, seed: int = 1234
) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of the report's `quality`, warnings) of the arms' lm-eval results; `results` has base, adapted, maybe control.

    A row has `ci95` in each arm and `vs_control` (adapted - control, or null).
    """
    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    for task in results["adapted"]["samples"]:
        per_arm = {arm: items_of(r["samples"][task]) for arm, r in results.items()}
        skipped = sorted(set().union(*(s for _, s in per_arm.values())))
        if skipped:
            warnings.append(f"{task}: {', '.join(skipped)} is no figure of single items: left out.")
        names = list(per_arm["adapted"][0])
        if "bits_per_byte,none" in names:  # the same items in another unit
            names = [n for n in names if n != "nats_per_byte,none"]
        for name in names:
            items = {arm: found.get(name, {}) for arm, (found, _) in per_arm.items()}
            shared = [k for k in items["adapted"] if all(k in values for values in items.values())]
            lost = max(map(len, items.values())) - len(shared)
            if lost:
                warnings.append(f"{task}, {name}: {lost} items were not scored by all arms and are left out.")
            arrays = {arm: np.array([values[k] for k in shared]) for arm, values in items.items()}
            broken = [arm for arm, values in arrays.items() if not np.isfinite(values).all()]
            if broken or not shared:
                why = f"{', '.join(broken)} gave values that are not finite" if broken else "no item in common"
                warnings.append(f"{task}, {name}: {why}; no row.")
                continue
            total = results["adapted"].get("results", {}).get(task, {}).get(name)
            if not lost and _is_number(total) and not np.isclose(total, arrays["adapted"].mean()):
                warnings.append(f"{task}, {name}: lm-eval does not take the mean of its items; no row.")
                continue
            rows.append(_row(task, name, arrays, _higher_is_better(results["adapted"], task, name), seed))
    return rows, warnings


def _higher_is_better(result: Mapping[str, Any], task: str, name: str) -> bool:
    metric = name.split(",")[0]
    for row_name, _, higher in _FROM_LOGLIKELIHOOD.values():
        if metric == row_name:
            return higher
    said = result.get("higher_is_better", {}).get(task, {}).get(metric)
    return True if said is None else bool(said)


def _row(task: str, name: str, arrays: Mapping[str, np.ndarray], higher: bool, seed: int) -> dict[str, Any]:
    arms = {arm: _cell(values) for arm, values in arrays.items()}
    against_base = stats.paired(arrays["base"], arrays["adapted"], seed=seed)
    against_control = stats.paired(arrays["control"], arrays["adapted"], seed=seed) if "control" in arrays else None
    return {
        "task": task,
        "metric": name,
        "higher_is_better": higher,
        "n": against_base.n,
        "base": arms["base"],
        "adapted": arms["adapted"],
        "control": arms.get("control"),
        "delta": against_base.delta,
        "ci95": list(against_base.ci95),
        "p_value": against_base.p_value,
        "test": against_base.test,
        "vs_control": None
        if against_control is None
        else {
            "delta": against_control.delta,
            "ci95": list(against_control.ci95),
            "p_value": against_control.p_value,
            "test": against_control.test,
        },
    }


def _cell(values: np.ndarray) -> dict[str, Any]:
    summary = stats.summarize(values)
    return {"value": summary.value, "stderr": summary.stderr, "ci95": list(summary.ci95)}
