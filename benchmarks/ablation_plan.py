"""What is run, in which order: each arm's learning rates first, then its seeds at the best of them."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields

from ablation_arms import ARMS, LADDER
from ablation_runs import Task


@dataclass(frozen=True)
class Plan:
    """What the runs of all arms have in common."""

    tokens: int
    tune_tokens: int
    row_tokens: int
    seeds: int
    heldout: int
    tune_heldout: int
    samples: int
    precision: str = "fp32"
    """of training; what is sampled and scored is fp32"""
    rates: tuple[float, ...] = ()
    """learning rates to try, all of them and no others; () = a walk along LADDER"""

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"--precision={self.precision}: choose bf16 or fp32")
        if self.samples < 2:
            raise ValueError(f"--samples={self.samples}: must be at least 2, for the Monte-Carlo error")
        if min(self.rates, default=1.0) <= 0 or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"--rates={','.join(map(str, self.rates))}: must be above 0, each once, in rising order")

    @property
    def ladder(self) -> tuple[float, ...]:
        return self.rates or LADDER

    def tuning(self, arm: str, rate: float) -> Task:
        common = (self.tune_tokens, self.tune_heldout, self.samples, self.row_tokens, self.precision)
        return Task(arm, "tune", rate, 0, *common)

    def final(self, arm: str, rate: float) -> list[Task]:
        common = (self.tokens, self.heldout, self.samples, self.row_tokens, self.precision)
        return [Task(arm, "final", rate, seed, *common) for seed in range(self.seeds)]

    def arguments(self) -> list[str]:
        """The plan as words of a command line, without what is as it would be anyway."""
        words: list[str] = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.default is MISSING or value != one.default:
                words += [f"--{one.name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return words


def next_task(plan: Plan, names: list[str], done: dict[str, dict], running: set[str]) -> Task | None:
    """The first task that may start: arm by arm, learning rates before seeds; None if there is none now."""
    for arm in names:
        best, wanted = best_rate(plan, arm, done)
        tasks = [plan.tuning(arm, rate) for rate in wanted] if best is None else plan.final(arm, best)
        for task in tasks:
            if task.key not in done and task.key not in running:
                return task
    return None


def tuned(plan: Plan, arm: str, done: dict[str, dict]) -> dict[float, float]:
    """Learning rate -> summed bound of what was tried, infinite where training failed."""
    rows = {rate: done.get(plan.tuning(arm, rate).key) for rate in plan.ladder}
    return {rate: sum(row.get("nelbo", [float("inf")])) for rate, row in rows.items() if row is not None}


def best_rate(plan: Plan, arm: str, done: dict[str, dict]) -> tuple[float | None, list[float]]:
    """(the learning rate of the lowest bound, None while a neighbour of it on the ladder is untried; what is to be tried)."""
    bounds = tuned(plan, arm, done)
    wanted = [rate for rate in plan.rates or ARMS[arm].first_rates if rate not in bounds]
    if not wanted:
        at = plan.ladder.index(min(bounds, key=lambda rate: bounds[rate]))
        wanted = [rate for rate in plan.ladder[max(at - 1, 0) : at + 2] if rate not in bounds]
        if not wanted:
            return (plan.ladder[at] if bounds[plan.ladder[at]] < float("inf") else None), []
    return None, wanted


def slug(title: str) -> str:
    """The title as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")
