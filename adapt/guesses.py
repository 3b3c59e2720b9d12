"""The guesses of a round of decoding: drawn from the logits, and which of them are kept. The rounds are in `sampler.py`.

Shapes: A rows still being refined, W canvas columns, N blanks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def draw(logits: Tensor, sampler: SamplerConfig, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(token, its probability at temperature 1) of each row of logits [N, V], [N] each."""
    probabilities = logits.softmax(-1)
    if sampler.temperature == 0:
        probability, tokens = probabilities.max(-1)
        return tokens, probability
    drawn_from = (logits / sampler.temperature).softmax(-1)
    if sampler.top_p < 1:
        ordered, order = drawn_from.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampler.top_p  # the first token is never outside
        drawn_from = torch.zeros_like(drawn_from).scatter_(-1, order, ordered.masked_fill(outside, 0))
    tokens = torch.multinomial(drawn_from, 1, generator=generator).squeeze(-1)
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1)


def keep(confidence: Tensor, sampler: SamplerConfig) -> Tensor:
    """Which guesses are kept, [A, W], by their probability [A, W] (-1: no blank); at least one in each row that has a blank."""
    blank = confidence >= 0
    left_to_right = sampler.order == "left_to_right"
    from_left = torch.arange(confidence.shape[1], 0, -1, device=blank.device).expand_as(blank).where(blank, 0)
    ranking = from_left if left_to_right else confidence
    best = ranking.topk(min(sampler.tokens_per_step or 1, confidence.shape[1]), dim=1).indices
    kept = torch.zeros_like(blank).scatter_(1, best, True)
    if sampler.threshold is not None:
        kept |= confidence >= sampler.threshold
    if left_to_right:
        kept &= (blank & ~kept).cumsum(1) == 0  # nothing behind a guess that does not pass
    return kept & blank
