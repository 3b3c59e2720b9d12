"""What a machine can do in the minutes that it has: how many examples, in which batches, and how large a comparison.

The rate is measured on the base model before anything is trained; what is left is looked at again before the adapted arm and before
the comparison. Training ends by the clock (training.max_minutes), the comparison takes as many items as fit. All figures are of
SmolLM2-135M on the extraction task.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ALL_EXAMPLES, FEWEST_EXAMPLES = 2600, 40
ALL_ITEMS, FEWEST_ITEMS = 200, 60
_CONTROL_POSITIONS = 65  # of an example and pass: prompt and answer, rows 94 % full
_ADAPTED_POSITIONS = 107  # the same and four canvases of 8
_ADAPTED_PASSES = 1.14
_ROW = {"control": 256, "adapted": 320}
_MOST_ROWS = {"control": 8, "adapted": 6}
_FEWEST_STEPS = {"control": 60, "adapted": 80}
"""before a batch may grow: 440 examples in 55 steps of 2 rows gave 76 % exact match, in 27 steps of 4 rows 70 % (n = 96)"""

# What the comparison costs, in positions that training would have computed in the same time (fp32 on AVX2).
_ITEM_POSITIONS = 140  # an item, all three arms; the original reads four examples with each
_ROUND_POSITIONS = 6000  # a round of speed, all arms, batch sizes 1 and 8
_SPEED_ROUNDS = 3

_AIM = 0.95  # share of the minutes that is planned with
_COMPARISON = 0.3  # at most, so that it cannot carry the whole beyond 1.25 of the minutes if the machine halves under it
_TRAINED_OF_PROBED = 0.85  # positions/s of training beside the probe's: head, optimizer and clipping are not in the probe
_AROUND_TRAINING = 45.0  # seconds: a launch, loading and writing, before they have been measured
_AROUND_COMPARISON = 30.0  # seconds: converting, loading three arms


@dataclass(frozen=True)
class Plan:
    """What a quickstart does, and what it is based on. Kept in quickstart.json, so that a second start goes on with it."""

    minutes: float
    precision: str
    positions_per_s: float
    """of training, as probed"""
    num_train: int
    control_minutes: float
    """at most, of training alone"""
    adapted_minutes: float | None = None
    """set when the control is there"""
    num_items: int | None = None
    """of the comparison; set when the adapted arm is there"""
    speed_rounds: int = _SPEED_ROUNDS

    @property
    def is_cut(self) -> bool:
        return self.num_train < ALL_EXAMPLES

    def rows_per_step(self, arm: str) -> int:
        """Packed rows in a step: as in the recipe, fewer where there would be too few steps."""
        rows = self.num_train * _positions(arm) / _ROW[arm]
        return int(min(max(rows / _FEWEST_STEPS[arm], 2), _MOST_ROWS[arm]))

    def num_steps(self, arm: str) -> int:
        return max(1, round(self.num_train * _positions(arm) / _ROW[arm] / self.rows_per_step(arm)))

    def save(self, path: Path, **settings: object) -> None:
        path.write_text(json.dumps({**settings, "plan": dataclasses.asdict(self)}, indent=2) + "\n")


def measured_rate(base: Path, dtype: torch.dtype) -> float:
    """Positions/s that training will reach, from a few forward and backward passes over one row of the base model."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
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
        enough = next(m for m in range(int(minutes) + 1, 100_000) if _affordable(m, positions_per_s, spent) >= FEWEST_EXAMPLES)
        raise ValueError(
            f"minutes={minutes:g}: this machine ({precision}, {positions_per_s:.0f} positions/s) trains on {max(num_train, 0)} examples "
            f"in that time, which teaches nothing; give --minutes {enough} or more"
        )
    num_train = min(num_train, ALL_EXAMPLES)
    # A tenth more than it should take: it is there to end what goes wrong, not to cut what goes well.
    control = 1.1 * num_train * _CONTROL_POSITIONS / positions_per_s
    return Plan(minutes, precision, positions_per_s, num_train, control / 60)


def with_adapted(plan: Plan, positions_per_s: float, around: float, spent: float) -> Plan:
    """The plan with the adapted arm's minutes: all that is left beside the comparison. around: seconds of a launch."""
    left = 60 * _AIM * plan.minutes - spent - around - _AROUND_COMPARISON - _comparison_seconds(plan.minutes, positions_per_s)
    needed = plan.num_train * _positions("adapted") / positions_per_s
    return dataclasses.replace(plan, adapted_minutes=max(left, 0.25 * needed) / 60)


def with_comparison(plan: Plan, positions_per_s: float, spent: float) -> Plan:
    """The plan with the items and rounds of the comparison that fit into what is left."""
    left = 60 * plan.minutes - spent - _AROUND_COMPARISON
    for rounds in range(_SPEED_ROUNDS, 0, -1):
        items = int((left * positions_per_s - rounds * _ROUND_POSITIONS) / _ITEM_POSITIONS)
        if items >= FEWEST_ITEMS * rounds / _SPEED_ROUNDS or rounds == 1:
            return dataclasses.replace(plan, num_items=min(max(items, FEWEST_ITEMS), ALL_ITEMS), speed_rounds=rounds)
    raise AssertionError


def minutes_for_all(plan: Plan) -> int:
    """The minutes that would buy all examples at the plan's rate."""
    spent = 60.0
    return next(m for m in range(1, 100_000) if _affordable(m, plan.positions_per_s, spent) >= ALL_EXAMPLES)


def _positions(arm: str) -> float:
    """Positions that an example costs that arm."""
    return _CONTROL_POSITIONS if arm == "control" else _ADAPTED_POSITIONS * _ADAPTED_PASSES


def _affordable(minutes: float, positions_per_s: float, spent: float) -> int:
    """Examples that both arms can be trained on."""
    around = spent + 2 * _AROUND_TRAINING + _AROUND_COMPARISON
    left = 60 * _AIM * minutes - around - _comparison_seconds(minutes, positions_per_s)
    return int(left * positions_per_s / (_positions("control") + _positions("adapted")))


def _comparison_seconds(minutes: float, positions_per_s: float) -> float:
    whole = (ALL_ITEMS * _ITEM_POSITIONS + _SPEED_ROUNDS * _ROUND_POSITIONS) / positions_per_s
    return min(whole, _COMPARISON * 60 * minutes)
