"""training.max_minutes: a run that ends by the clock, on a machine of any speed and however many others share it.

Where time is scarcer than steps, the schedule runs over the share of the time that is gone, so that the learning rate has fallen
to its end when the run has ("Cramming", arXiv:2212.14034). The warm-up stays one of steps, and where steps are scarcer than time
nothing is changed: the curve is the one without a limit, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from .. import progress

_RECENT = 4  # steps whose mean duration the next one is expected to take


class TimeLimit(TrainerCallback):
    """Ends the run before the step that would not end in time, and paces its learning rate. Rank 0's clock counts.

    clock: seconds from any start. warmup_steps: of the schedule, but at least the first step, in which kernels are compiled.
    """

    def __init__(
        self, minutes: float, num_steps: int, warmup_steps: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.limit, self.num_steps, self.warmup_steps, self.clock = 60 * minutes, num_steps, max(warmup_steps, 1), clock
        self.origin = 0.0
        self.begun_at: list[tuple[int, float]] = []
        """(step, seconds since the start of the run) at the begin of the last steps"""
        self.warmed_up_at: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        before = [line for line in state.log_history if "elapsed_s" in line]
        self.origin = self.clock() - (before[-1]["elapsed_s"] if before else 0.0)
        warm = (line["elapsed_s"] for line in before if line["step"] >= self.warmup_steps)
        self.warmed_up_at = next(warm, None)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        now = _on_all_ranks(self.clock() - self.origin, args)
        self.begun_at = [*self.begun_at[-_RECENT:], (state.global_step, now)]
        if self.warmed_up_at is None and state.global_step >= self.warmup_steps:
            self.warmed_up_at = now
        if (duration := self._step_seconds()) > 0:
            fitting = int((self.limit - now) / duration)  # this step, which has begun, is run in any case
            state.max_steps = min(self.num_steps, state.global_step + max(1, fitting))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.global_step < self.num_steps and state.global_step >= state.max_steps:
            minutes = self.limit / 60
            progress.say(f"training.max_minutes={minutes:g}: ended after {state.global_step} of {self.num_steps} steps")

    def paced(self, scheduler: Any) -> Any:
        """The LambdaLR `scheduler`, whose step k is the step that the clock says where that is later. Changed in place."""

        def over_time(factor: Callable[[float], float]) -> Callable[[float], float]:
            return lambda step: factor(max(step, self._step_by_the_clock(step)))

        scheduler.lr_lambdas = [over_time(factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def _step_by_the_clock(self, step: float) -> float:
        """The step that a run of `num_steps` would be at now, at the end of a step; 0 while the warm-up lasts."""
        if self.warmed_up_at is None or step <= self.warmup_steps:
            return 0.0
        ends = self.begun_at[-1][1] + self._step_seconds()
        share = (ends - self.warmed_up_at) / max(self.limit - self.warmed_up_at, 1e-9)
        return self.warmup_steps + min(share, 1.0) * (self.num_steps - self.warmup_steps)

    def _step_seconds(self) -> float:
        """Mean duration of the last steps; 0 while only the first, in which kernels are compiled, has ended."""
        steps = self.begun_at if self.begun_at[0][0] > 0 else self.begun_at[1:]
        return (steps[-1][1] - steps[0][1]) / (len(steps) - 1) if len(steps) > 1 else 0.0


def _on_all_ranks(seconds: float, args: Any) -> float:
    """Rank 0's number, or the ranks would end at different steps."""
    if args.world_size == 1:
        return seconds
    number = torch.tensor([seconds], dtype=torch.float64, device=args.device)
    dist.broadcast(number, 0)
    return float(number)
