"""How a diffusion LM is decoded: which guesses a round keeps, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplerConfig:
    """Which guesses are kept in a round: those at or above `threshold`, or the `tokens_per_step` most confident."""

    threshold: float | None = 0.9
    """keep guesses with p >= threshold, and always the surest one (Fast-dLLM, arXiv:2505.22618); None = do not"""
    tokens_per_step: int | None = None
    """keep this many most confident guesses a round instead (low-confidence remasking, LLaDA, arXiv:2502.09992)"""
    order: str = "confidence"
    """confidence: keep guesses anywhere; left_to_right: the leftmost blank and the run of guesses after it that pass"""
    canvas_length: int | None = None
    """blanks guessed at a time, from the first one on: the canvas moves along, and what it leaves behind joins the
    cached context (prefix attention; for models trained with data.canvas_start=anywhere). None = all at a time"""
    temperature: float = 0.0
    """0 = the most likely token; confidence is the probability of the drawn token at temperature 1 in any case"""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability"""

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.tokens_per_step is None):
            raise ValueError(
                f"sampler.threshold={self.threshold} and sampler.tokens_per_step={self.tokens_per_step}: set exactly "
                "one (the other to null)"
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"sampler.threshold={self.threshold}: must lie in (0, 1]")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"sampler.tokens_per_step={self.tokens_per_step}: must be at least 1")
        if self.order not in ("confidence", "left_to_right"):
            raise ValueError(f"sampler.order={self.order}: choose one of confidence, left_to_right")
        if self.canvas_length is not None and self.canvas_length < 1:
            raise ValueError(f"sampler.canvas_length={self.canvas_length}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"sampler.temperature={self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampler.top_p={self.top_p}: must lie in (0, 1]")
