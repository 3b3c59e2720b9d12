"""How a diffusion LM is decoded: which guesses a round keeps, and how they are drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

Order = Literal["confidence", "left_to_right"]
THRESHOLD = 0.9


@dataclass(frozen=True)
class SamplerConfig:
    """Which guesses are kept in a round, and how they are drawn. ValueError where not valid.

    `threshold` and `tokens_per_step` are alternatives: one is given, or none, which is a threshold of 0.9.
    """

    threshold: float | None = None
    """keep guesses with p >= threshold, and always the surest one (Fast-dLLM, arXiv:2505.22618); default 0.9, unless
    tokens_per_step is given"""
    tokens_per_step: int | None = None
    """keep this many most confident guesses a round instead (low-confidence remasking, LLaDA, arXiv:2502.09992)"""
    order: Order = "confidence"
    """confidence: keep guesses anywhere; left_to_right: the leftmost blank and the run of guesses after it that pass"""
    canvas_length: int | None = None
    """blanks guessed at a time, from the first one on: the canvas moves along, and what it leaves behind joins the
    cached context (prefix attention; for models trained with data.canvas_start=anywhere). None = all at a time"""
    temperature: float = 0.0
    """0 = the most likely token; confidence is the probability of the drawn token at temperature 1 in any case"""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability"""

    def __post_init__(self) -> None:
        for name in ("threshold", "tokens_per_step", "canvas_length", "temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"sampler.{name}={value!r}: must be a number")
        if self.threshold is not None and self.tokens_per_step is not None:
            raise ValueError(
                f"sampler.threshold={self.threshold} and sampler.tokens_per_step={self.tokens_per_step}: are two rules for the "
                "same thing; give one of them"
            )
        if self.threshold is None and self.tokens_per_step is None:
            object.__setattr__(self, "threshold", THRESHOLD)
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"sampler.threshold={self.threshold}: must lie in (0, 1]")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"sampler.tokens_per_step={self.tokens_per_step}: must be at least 1")
        if self.order not in get_args(Order):
            raise ValueError(f"sampler.order={self.order}: choose one of {', '.join(get_args(Order))}")
        if self.canvas_length is not None and self.canvas_length < 1:
            raise ValueError(f"sampler.canvas_length={self.canvas_length}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"sampler.temperature={self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampler.top_p={self.top_p}: must lie in (0, 1]")


SETTINGS = tuple(field.name for field in dataclasses.fields(SamplerConfig))


def changed(sampler: SamplerConfig, **settings: Any) -> SamplerConfig:
    """The sampler with these settings, of which those that are None say nothing; a rule that is given replaces the other one."""
    said = {name: value for name, value in settings.items() if value is not None}
    if said.keys() & {"threshold", "tokens_per_step"}:
        said = {"threshold": None, "tokens_per_step": None} | said
    return dataclasses.replace(sampler, **said)
