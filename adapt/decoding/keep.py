"""The guesses of a round of decoding: drawn from the logits, and which of them are kept. The rounds are in `sampler.py`.

Shapes: A rows still being refined, W canvas columns, N blanks, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import SamplerConfig


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
