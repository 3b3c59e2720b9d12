"""How a diffusion LM is decoded: which guesses a round keeps, and how they are drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..settings.bounds import Bounds, Tokens, check_settings

Order = Literal["confidence", "left_to_right"]
Threshold = Annotated[float, Bounds(0, 1, low_is_open=True)]
THRESHOLD = 0.9
_LEAST = 1e-6  # what float32 divides logits by without overflow, and does not round to 0


@dataclass(frozen=True)
class SamplerConfig:
    """Which guesses are kept in a round, and how they are drawn. ValueError where not valid.

    `threshold` and `tokens_per_step` are alternatives: one is given, or none, which is a threshold of 0.9.
    """

    threshold: Threshold | None = None
    """keep guesses with p >= threshold, and always the surest one (Fast-dLLM, arXiv:2505.22618); default 0.9, unless
    tokens_per_step is given"""
    tokens_per_step: Tokens | None = None
    """keep this many most confident guesses a round instead (low-confidence remasking, LLaDA, arXiv:2502.09992)"""
    order: Order = "confidence"
    """confidence: keep guesses anywhere; left_to_right: the leftmost blank and the run of guesses after it that pass"""
    canvas_length: Tokens | None = None
    """blanks guessed at a time, from the first one on: the canvas moves along, and what it leaves behind joins the
    cached context (prefix attention; for models trained with data.canvas_start=anywhere). None = all at a time"""
    temperature: Annotated[float, Bounds(0, 100)] = 0.0
    """0 = the most likely token; confidence is the probability of the drawn token at temperature 1 in any case"""
    top_p: Annotated[float, Bounds(0, 1, low_is_open=True)] = 1.0
    """draw from the smallest set of tokens that holds this much probability"""

    def __post_init__(self) -> None:
        check_settings(self, "sampler")
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if 0 < value < _LEAST:
                raise ValueError(f"sampler.{name}={value}: is too small; give {_LEAST:g} or more, or temperature 0")
        if self.threshold is not None and self.tokens_per_step is not None:
            raise ValueError(
                f"sampler.threshold={self.threshold} and sampler.tokens_per_step={self.tokens_per_step}: are two rules for the "
                "same thing; give one of them"
            )
        if self.threshold is None and self.tokens_per_step is None:
            object.__setattr__(self, "threshold", THRESHOLD)


SETTINGS = tuple(field.name for field in dataclasses.fields(SamplerConfig))


def changed(sampler: SamplerConfig, **settings: Any) -> SamplerConfig:
    """The sampler with these settings, of which those that are None say nothing; a rule that is given replaces the other one."""
    said = {name: value for name, value in settings.items() if value is not None}
    if said.keys() & {"threshold", "tokens_per_step"}:
        said = {"threshold": None, "tokens_per_step": None} | said
    return dataclasses.replace(sampler, **said)
