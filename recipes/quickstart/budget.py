"""What a machine can do in the minutes that it has: how many examples, in which batches, and how large a comparison.

The rate is measured on the base model before anything is trained; what is left is looked at again before the adapted arm and before
the comparison. Training ends by the clock (training.max_minutes), the comparison takes as many items as fit. All figures are of
SmolLM2-135M on the extraction task.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from adapt.settings.bounds import Bounds, Items, Minutes, check_settings

from .arms import Outcome

if TYPE_CHECKING:
    import torch

ALL_EXAMPLES, FEWEST_EXAMPLES = 2600, 40
ALL_ITEMS, FEWEST_ITEMS = 200, 60
_CONTROL_POSITIONS = 64.4  # of an example and pass: prompt and answer, rows 94 % full
_ADAPTED_POSITIONS = 102.2  # the same and four canvases of 8
_ADAPTED_PASSES = 1.2  # as adapted.yaml says
_ROW = {"control": 256, "adapted": 320}
_MOST_ROWS = {"control": 8, "adapted": 6}
_FEWEST_STEPS = {"control": 60, "adapted": 165}
"""before a batch may grow: 440 examples in 55 steps of 2 rows gave the control 76 % exact match, in 27 steps of 4 rows 70 % (n = 96)"""

# What the comparison costs, in positions that training would have computed in the same time (fp32 on AVX2).
_ITEM_POSITIONS = 140  # an item, all three arms; the original reads four examples with each
_ROUND_POSITIONS = 6000  # a round of speed, all arms, batch sizes 1 and 8
_SPEED_ROUNDS = 3

_AIM = 0.95  # share of the minutes that is planned with
_COMPARISON = 0.3  # of them, at most: if the machine halves just then, the whole ends within 1.25 of the minutes
_TRAINED_OF_PROBED = 0.85  # positions/s of training by the probe's, which has no head, optimizer and clipping
_AROUND_TRAINING = 45.0  # seconds: a launch, loading and writing, before they have been measured
_AROUND_COMPARISON = 30.0  # seconds: converting, loading three arms


@dataclass(frozen=True)
class Plan:
    """What a quickstart does, and what it is based on. Kept in quickstart.json, so that a second start goes on with it."""

    num_train: Items
    minutes: Minutes | None = None
    """that everything may take; None = as long as it takes"""
    precision: str | None = None
    positions_per_s: Annotated[float, Bounds(0, 1e12)] = 0.0
    """of training, as measured before it began"""
    control_minutes: Minutes | None = None
    """of training alone, at most"""
    adapted_minutes: Minutes | None = None
    """the same; known when the control is there"""
    num_items: Items | None = None
    """of the comparison; known when the adapted arm is there"""
    speed_rounds: Annotated[int, Bounds(0, 10**6)] = _SPEED_ROUNDS

    def __post_init__(self) -> None:
        check_settings(self, "plan")

    def rows_per_step(self, arm: str) -> int:
        """Packed rows in a step: those of the recipe, fewer where there would be too few steps."""
        rows = self.num_train * _positions(arm) / _ROW[arm]
        return int(min(max(rows / _FEWEST_STEPS[arm], 2), _MOST_ROWS[arm]))

    def overrides(self, arm: str) -> tuple[str, ...]:
        """Of the arm's recipe."""
        rows, minutes = str(self.rows_per_step(arm)), self.control_minutes if arm == "control" else self.adapted_minutes
        batch = ("--training.global_batch_size", rows, "--training.micro_batch_size", rows)
        # Compiling takes an arm 20 CPU seconds: in bf16 steps are a sixth faster after it, in fp32 they are not.
        compiled = () if self.precision == "bf16" else ("--model.torch_compile", "false")
        return (*batch, "--training.max_minutes", f"{minutes:.2f}", *compiled)


def measured_rate(base: Path, dtype: torch.dtype) -> float:
    """Positions/s that training will reach, from a few forward and backward passes over one row of the base model."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False).to(device)
    body, row = model.base_model, torch.arange(_ROW["control"], device=device)[None] % model.config.vocab_size
    seconds: list[float] = []
    while len(seconds) < 2 or (sum(seconds) < 6 and len(seconds) < 10):  # the first one warms up
        start = time.perf_counter()
        body(input_ids=row, use_cache=False).last_hidden_state.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return _TRAINED_OF_PROBED * row.numel() * (len(seconds) - 1) / sum(seconds[1:])


def planned(minutes: float, positions_per_s: float, spent: float, precision: str) -> Plan:
    """The plan, `spent` seconds after the start; ValueError if the minutes do not buy the fewest examples."""
    num_train = _affordable(minutes, positions_per_s, spent)
    if num_train < FEWEST_EXAMPLES:
        bought = f"buy {max(num_train, 0)} examples on this machine ({precision}, {positions_per_s:.0f} positions/s)"
        enough = _minutes_for(FEWEST_EXAMPLES, positions_per_s)
        raise ValueError(f"minutes={minutes:g}: {bought}, which teach nothing; give --minutes {enough} or more")
    num_train = min(num_train, ALL_EXAMPLES)
    # A tenth more than it should take: it is there to end what goes wrong, not to cut what goes well.
    control = 1.1 * num_train * _CONTROL_POSITIONS / positions_per_s
    return Plan(num_train, minutes, precision, positions_per_s, control / 60)


def with_adapted(plan: Plan, positions_per_s: float, around: float, spent: float) -> Plan:
    """The plan with the adapted arm's minutes: all that is left beside the comparison. around: seconds of a launch."""
    assert plan.minutes is not None
    comparison = _AROUND_COMPARISON + _comparison_seconds(plan.minutes, positions_per_s)
    left = 60 * _AIM * plan.minutes - spent - around - comparison
    needed = plan.num_train * _positions("adapted") / positions_per_s
    return dataclasses.replace(plan, adapted_minutes=max(left, 0.25 * needed) / 60)


def with_comparison(plan: Plan, positions_per_s: float, spent: float) -> Plan:
    """The plan with the items and rounds of the comparison that fit into what is left."""
    assert plan.minutes is not None
    left = 60 * plan.minutes - spent - _AROUND_COMPARISON
    for rounds in range(_SPEED_ROUNDS, 0, -1):
        items = int((left * positions_per_s - rounds * _ROUND_POSITIONS) / _ITEM_POSITIONS)
        if items >= FEWEST_ITEMS:
            break
    return dataclasses.replace(plan, num_items=min(max(items, FEWEST_ITEMS), ALL_ITEMS), speed_rounds=rounds)


def in_words(plan: Plan) -> str:
    """`this CPU: fp32, 95 positions/s; 20 minutes buy 330 of 2,600 examples for either arm; --minutes 90 buys all`"""
    machine = f"this {_machine()}: {plan.precision}, {plan.positions_per_s:,.0f} positions/s"
    if plan.num_train == ALL_EXAMPLES:
        return f"{machine}; {plan.minutes:g} minutes buy all {ALL_EXAMPLES:,} examples for either arm"
    bought = f"{plan.minutes:g} minutes buy {plan.num_train:,} of {ALL_EXAMPLES:,} examples for either arm"
    return f"{machine}; {bought}; --minutes {_minutes_for(ALL_EXAMPLES, plan.positions_per_s)} buys all"


def warnings(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[str]:
    """What the minutes have cut, as sentences for the report."""
    said = []
    if plan.num_train < ALL_EXAMPLES:
        enough = _minutes_for(ALL_EXAMPLES, plan.positions_per_s)
        said.append(
            f"Cut to {plan.minutes:g} minutes: both arms had {plan.num_train:,} of {ALL_EXAMPLES:,} examples to learn from "
            f"({plan.precision}, {plan.positions_per_s:,.0f} positions/s); --minutes {enough} trains on all."
        )
    planned_passes = {"control": 1.0, "adapted": _ADAPTED_PASSES}
    short = {arm: run.passes for arm, run in outcomes.items() if run.passes < 0.95 * planned_passes[arm]}
    for arm, passes in short.items():
        seen = f"{passes:.2f} of {planned_passes[arm]:.2f} passes over the {plan.num_train:,} examples"
        said.append(f"The clock ended the training of the {arm} arm early, after {seen}.")
    if short:
        said.append("So the arms were not trained on the same tokens.")
    return said


def _minutes_for(num_train: int, positions_per_s: float) -> int:
    """The fewest minutes that buy so many examples at that rate."""
    spent = 60.0  # until the plan is made
    return next(m for m in itertools.count(1) if _affordable(m, positions_per_s, spent) >= num_train)


def _machine() -> str:
    import torch

    return "GPU" if torch.cuda.is_available() else "CPU"


def _positions(arm: str) -> float:
    """Positions that an example costs that arm."""
    return _CONTROL_POSITIONS if arm == "control" else _ADAPTED_POSITIONS * _ADAPTED_PASSES


def _affordable(minutes: float, positions_per_s: float, spent: float) -> int:
    """Examples that both arms can be trained on."""
    around = spent + 2 * _AROUND_TRAINING + _AROUND_COMPARISON
    left = 60 * _AIM * minutes - around - _comparison_seconds(minutes, positions_per_s)
    return int(left * positions_per_s / (_positions("control") + _positions("adapted")))


def _comparison_seconds(minutes: float, positions_per_s: float) -> float:
    """What the comparison is planned to take: all of it, or its share of the minutes, but not less than the least of it."""
    whole = (ALL_ITEMS * _ITEM_POSITIONS + _SPEED_ROUNDS * _ROUND_POSITIONS) / positions_per_s
    least = (FEWEST_ITEMS * _ITEM_POSITIONS + _ROUND_POSITIONS) / positions_per_s
    return max(least, min(whole, _COMPARISON * 60 * minutes))
