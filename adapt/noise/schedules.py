"""How fast tokens vanish: the schedules that `noise.schedule` of a recipe may name. A recipe is read before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Schedule(NamedTuple):
    """Two functions of times t in [0, 1], of any shape and elementwise.

    A new one is a line in SCHEDULES; `noise.schedule` of a recipe takes its name. alpha(0) = 1, alpha(1) = 0, falling between,
    and alpha_prime is its derivative: tests/test_noise.py holds each of them to that.
    """

    alpha: Callable[[Tensor], Tensor]
    alpha_prime: Callable[[Tensor], Tensor]


SCHEDULES = {
    "linear": Schedule(lambda t: 1 - t, lambda t: -t.new_ones(t.shape)),
    "cosine": Schedule(lambda t: (math.pi / 2 * t).cos(), lambda t: -math.pi / 2 * (math.pi / 2 * t).sin()),
}
