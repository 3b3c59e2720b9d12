"""Forward process: clean tokens x0 -> noised tokens xt at time t in (0, 1], where 1 is all noise.

Absorbing noise (MDLM, arXiv:2406.07524): each token that may be noised is replaced by the mask token independently with
probability mask_ratio = 1 - alpha_t. The training weight of a noised token is elbo_weight = -alpha_prime / (1 - alpha_t).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedules import SCHEDULES, Schedule

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
SILVER_RATIO = math.sqrt(2) - 1


def alpha(t: Tensor, schedule: str = "linear") -> Tensor:
    """P(token kept) at time t, same shape: 1 - t (linear) or cos(pi/2 t) (cosine). ValueError for a schedule that is not there."""
    return _schedule(schedule).alpha(t)


def alpha_prime(t: Tensor, schedule: str = "linear") -> Tensor:
    """d alpha / d t, same shape."""
    return _schedule(schedule).alpha_prime(t)


def _schedule(name: str) -> Schedule:
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name}: choose one of {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]


def elbo_weight(t: Tensor, schedule: str = "linear") -> Tensor:
    """-alpha_prime / (1 - alpha_t), same shape: 1/t for the linear schedule. MDLM, arXiv:2406.07524, eq. 10."""
    return -alpha_prime(t, schedule) / (1 - alpha(t, schedule))


def complement_weight(t: Tensor, schedule: str = "linear", t_min: float = 1e-3) -> Tensor:
    """-alpha_prime / alpha_t, same shape: the weight of the complement of a view noised at t, which noises what that one keeps.

    The NELBO is an integral over the mask ratio m with the measure dm / m, whatever the schedule; the complement's m is alpha_t,
    so that its measure is -alpha_prime / alpha_t dt. t_min bounds it as it bounds elbo_weight.
    """
    return -alpha_prime(t, schedule) / alpha(t, schedule).clamp(min=t_min)


def sample_t(
    ordinals: Tensor, *, blocks: Tensor | int = 0, offset: float = 0.0, t_min: float = 1e-3, t_max: float = 1.0
) -> Tensor:
    """Stratified times in [t_min, t_max], one for each ordinal (its place in the order of the run) and block of it.

    The golden-ratio sequence t_j = frac(offset + j / phi): any n consecutive ordinals fall about one in each n-th of the
    interval, whatever the world size, the accumulation split or the step that a run resumes from. Independent draws would
    give the loss several times the variance. Blocks of one example follow each other at another irrational step: each is
    uniform by itself, which is all that matters, since blocks are independent of each other given the clean text.
    """
    turns = ordinals.double() * GOLDEN_RATIO + torch.as_tensor(blocks).double() * SILVER_RATIO
    return t_min + (t_max - t_min) * torch.frac(offset + turns).float()


def q_sample(
    x0: Tensor,
    t: Tensor,
    loss_mask: Tensor,
    *,
    mask_token_id: int,
    schedule: str = "linear",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(xt, is_noised), both the shape of x0: absorbing noise at time t (broadcast against x0) where loss_mask is True."""
    mask_ratio = 1 - alpha(t, schedule)
    is_noised = (torch.rand(x0.shape, generator=generator, device=x0.device) < mask_ratio) & loss_mask
    return torch.where(is_noised, mask_token_id, x0), is_noised


def cart_weight(position: Tensor, sees: Tensor, block: Tensor, is_noised: Tensor, p: float = 0.3) -> Tensor:
    """Context-adaptive weight of each token, [n] in [0, 1): half the geometric mass p (1-p)^(d-1) of the clean tokens at distance d.

    position [n]; sees [n] how many clean tokens before it a token sees besides its own block [n] (number), of which those that
    are not is_noised are clean. CART, Dream 7B, arXiv:2508.15487, section 3.2.
    """
    distance = (position[:, None] - position).abs()
    mass = p * (1 - p) ** (distance - 1).clamp(min=0).double()
    clean = (block[:, None] == block) & ~is_noised & (distance > 0)
    before = (1 - p) ** (position - sees).double() - (1 - p) ** position.double()  # a geometric sum; 0 if it sees none
    return (0.5 * (mass * clean).sum(1) + 0.5 * torch.where(sees > 0, before, 0)).float()
