"""Uniform and hybrid noise (GIDD, arXiv:2503.04482): the forward process, and the exact ELBO of a token from its logits.

    q_t(z | x) = alpha_t [z = x] + beta_t pi_t(z),   beta_t = 1 - alpha_t,   u = uniform over the N tokens but the mask
    uniform     alpha_t = 1 - t            beta_t pi_t = t u
    hybrid      alpha_t = (1 - t) / C_t    beta_t pi_t = (t [z = mask] + c_t u) / C_t
                c_t = 2 p_uniform / (1 - p_uniform) sqrt(t (1 - t)),   C_t = 1 + c_t
    absorbing   hybrid with p_uniform -> 0; here as the reference (train it through adapt.noise: fewer rows, a plain CE)

p_uniform is the share of tokens drawn from u at t = 1/2, where it is largest. The GIDD ELBO (its central theorem) is

    -log p(x) <= E_{t ~ U(0,1), z ~ q_t(.|x)} [ w_t(z, x) (KL(q_t(.|x) || q_t(.|x_theta)) + IS(q_t(z|x) || q_t(z|x_theta))) ] + const
    w_t(z, x) = (beta_t pi_t' - alpha_t' / alpha_t pi_t)(z) / q_t(z|x),   IS(a || b) = a / b - log(a / b) - 1

const = KL(q_1 || prior) - E log p(x | z_0) is zero for all three: alpha_1 = 0 and alpha_0 = 1. Training weights: `hybrid_loss`.
The x_theta that attains the least bound is p(x_i | the other tokens of z): z_i itself enters through q_t, as evidence, and not
through x_theta. A sampler's belief in x_i is therefore x_theta(x) q_t(z_i | x), normalised, and not x_theta(x).
Shapes: N rows (tokens that may be noised), V columns of the head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("absorbing", "hybrid", "uniform")
T_MIN, T_MAX = 2.0**-40, 1 - 2.0**-24
"""Times of uniform and hybrid noise are clamped to these, in `corrupt` and in the loss alike: exact and finite in float32."""


class Mixing(NamedTuple):
    """Shares of q_t(. | x), each the shape of t: kept + uniform + mask = 1. A uniform draw may give the clean token again."""

    kept: Tensor
    uniform: Tensor
    mask: Tensor


def mixing(t: Tensor, kind: str, p_uniform: float = 0.1) -> Mixing:
    """Shares of the clean token (alpha_t), of uniform noise and of the mask token at time t; GIDD, arXiv:2503.04482, section 4."""
    _check(kind, p_uniform)
    if kind == "absorbing":
        return Mixing(1 - t, torch.zeros_like(t), t)
    t = t.clamp(T_MIN, T_MAX)
    if kind == "uniform":
        return Mixing(1 - t, t, torch.zeros_like(t))
    c = 2 * p_uniform / (1 - p_uniform) * torch.sqrt(t * (1 - t))
    return Mixing((1 - t) / (1 + c), c / (1 + c), t / (1 + c))


def corrupt(
    x0: Tensor,
    t: Tensor,
    loss_mask: Tensor,
    *,
    kind: str,
    vocab_size: int,
    mask_token_id: int,
    p_uniform: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """xt ~ q_t(. | x0), the shape of x0, where loss_mask is True and x0 elsewhere; t is broadcast against x0.

    Noise ids come from 0..vocab_size-1 without mask_token_id: pass the tokenizer's size, not that of a padded embedding.
    The mask token may lie beyond vocab_size. Every token of loss_mask enters the loss, changed or not: the model is not told
    which tokens are noise. The draws depend on the generator and the shape alone; absorbing noise is that of adapt.noise.q_sample.
    ValueError: a token of loss_mask is the mask token or not below vocab_size.
    """
    is_impossible = ((x0 < 0) | (x0 >= vocab_size) | (x0 == mask_token_id)) & loss_mask
    if is_impossible.any():
        raise ValueError(
            f"token {int(x0[is_impossible][0])} cannot be noised by noise.kind={kind}: allowed are 0 to {vocab_size - 1} "
            f"without the mask token {mask_token_id}; take it out of the loss mask"
        )
    share = mixing(t, kind, p_uniform)
    draw = torch.rand(x0.shape, generator=generator, device=x0.device)
    noise = uniform_tokens(x0, vocab_size, mask_token_id, generator)
    noise = torch.where(draw < share.mask, mask_token_id, noise)
    return torch.where((draw < share.mask + share.uniform) & loss_mask, noise, x0)


def uniform_tokens(
    like: Tensor, vocab_size: int, mask_token_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """Tokens drawn uniformly from 0..vocab_size-1 without mask_token_id, the shape of `like`."""
    noise = torch.randint(_num_tokens(vocab_size, mask_token_id), like.shape, generator=generator, device=like.device)
    return noise + (noise >= mask_token_id)


def hybrid_elbo(
    logits_NV: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    kind: str,
    vocab_size: int,
    mask_token_id: int,
    p_uniform: float = 0.1,
) -> Tensor:
    """ELBO integrand of each token, [N] in float32 nats; its mean over t ~ U(0,1) and xt is an upper bound on -log p(x0)."""
    options = {"kind": kind, "vocab_size": vocab_size, "mask_token_id": mask_token_id, "p_uniform": p_uniform}
    return hybrid_loss(logits_NV, x0, xt, t, **options)[1]


def hybrid_loss(
    logits_NV: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    kind: str,
    vocab_size: int,
    mask_token_id: int,
    p_uniform: float = 0.1,
    weight: str = "elbo",
) -> tuple[Tensor, Tensor]:
    """(loss [N], elbo [N]) of each token that may be noised, changed or not, in float32 nats; elbo as in `hybrid_elbo`.

    x_theta = softmax of logits_NV over 0..vocab_size-1 without the mask token; other columns get no probability and no gradient.
    weight="elbo": loss is elbo. weight="uniform": all times weigh alike, w_t(z, x) / w_t(noise, x), that is 2 for a mask, 1 for
    a uniform draw and q_t(noise|x) / q_t(x|x) for a clean token. These are the "dynamic" weights that GIDD recommends for training
    (its clean token weighs B/N exp(-lambda/2), the same to first order; here it stays below 1): not a bound, far less variance.
    Drawing t from [t_min, 1] drops the rest of the bound: O(t_min) nats per token for uniform noise, O(sqrt(t_min)) for hybrid
    (a token that is predicted at 0.5: 0.035 of 0.69 nats at t_min 1e-3 and p_uniform 0.1, 0.014 at 1e-4, which GIDD takes).
    float64 logits are computed in float64.
    """
    _check(kind, p_uniform)
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    num_tokens = _num_tokens(vocab_size, mask_token_id)
    t = t.to(dtype)
    share = mixing(t, kind, p_uniform)
    t = t.clamp(T_MIN, T_MAX)
    # alpha_t over the share of one noise token is all that KL and IS depend on: the mask's own terms cancel.
    exponent, level = (0.5, math.log(2 * p_uniform / (1 - p_uniform))) if kind == "hybrid" else (1.0, 0.0)
    log_snr = exponent * (torch.log1p(-t) - torch.log(t)) - level + math.log(num_tokens)
    is_mask, is_clean = xt == mask_token_id, xt == x0
    seen = torch.where(is_mask, x0, xt)
    log_p_x, log_p_z, noise_terms = _RowTerms.apply(logits_NV, x0, seen, log_snr, vocab_size, mask_token_id)
    if kind == "absorbing":
        nll = torch.where(is_mask, -log_p_x, 0.0)
        return (nll / t if weight == "elbo" else 2 * share.kept * nll), nll / t

    top, at_x, at_z = (F.softplus(y, threshold=30) for y in (log_snr, log_p_x + log_snr, log_p_z + log_snr))
    b = torch.exp(-log_snr)
    kl = (1 + b) * (top - at_x) - b * (noise_terms - at_x)  # KL / alpha_t
    divergence = torch.where(is_mask, 0.0, _expm1_minus(torch.where(is_clean, top, 0.0) - at_z))
    relative = torch.where(is_mask, 2.0, torch.where(is_clean, b / (1 + b), 1.0))
    # alpha_t w_t(noise, x) = 1 / (2 t C_t), or 1 / t: finite where w_t itself is not.
    rate = (1 - share.uniform) / (2 * t) if kind == "hybrid" else 1 / t
    elbo = relative * rate * (kl + divergence / share.kept)
    return (elbo if weight == "elbo" else relative * (share.kept * kl + divergence)), elbo


class _RowTerms(torch.autograd.Function):
    """(log p(x0), log p(z), sum over v of log(1 + p_v snr)) of each row, [N] each.

    One buffer of [N, V] forward and two backward, so that the peak is that of F.cross_entropy; composed of autograd's
    operations it would be a multiple of it, in the place that bounds the head's chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, x0: Tensor, z: Tensor, log_snr: Tensor, vocab_size: int, mask_token_id: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = _allowed(logits_NV, log_snr.dtype, vocab_size, mask_token_id)
        top = p.amax(-1)
        p -= top[:, None]
        log_p_x, log_p_z = (p.gather(1, ids[:, None])[:, 0] for ids in (x0, z))
        total = p.exp_().sum(-1)
        log_total = torch.log(total)
        p *= (torch.exp(log_snr) / total)[:, None]
        noise_terms = p.log1p_().sum(-1)
        ctx.save_for_backward(logits_NV, top + log_total, log_snr, x0, z)
        ctx.columns = vocab_size, mask_token_id
        return log_p_x - log_total, log_p_z - log_total, noise_terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, log_sum, log_snr, x0, z = ctx.saved_tensors
        grad_x, grad_z, grad_terms = grads
        log_p = _allowed(logits_NV, log_snr.dtype, *ctx.columns) - log_sum[:, None]
        grad = torch.sigmoid(log_p + log_snr[:, None])
        share = grad_x + grad_z + grad_terms * grad.sum(-1)
        grad *= grad_terms[:, None]
        grad -= log_p.exp_().mul_(share[:, None])
        grad.scatter_add_(1, x0[:, None], grad_x[:, None])
        grad.scatter_add_(1, z[:, None], grad_z[:, None])
        padding = logits_NV.shape[1] - grad.shape[1]
        grad = F.pad(grad, (0, padding)) if padding else grad
        return grad.to(logits_NV.dtype), None, None, None, None, None


def _allowed(logits_NV: Tensor, dtype: torch.dtype, vocab_size: int, mask_token_id: int) -> Tensor:
    logits = logits_NV[:, :vocab_size].to(dtype, copy=True)
    if mask_token_id < vocab_size:
        logits[:, mask_token_id] = -math.inf
    return logits


def _expm1_minus(y: Tensor) -> Tensor:
    """exp(y) - 1 - y, by its series where the difference would cancel."""
    series = y.square() / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6))))
    return torch.where(y.abs() < 0.02, series, torch.expm1(y) - y)


def _num_tokens(vocab_size: int, mask_token_id: int) -> int:
    return vocab_size - (0 <= mask_token_id < vocab_size)


def _check(kind: str, p_uniform: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"noise.kind={kind}: choose one of {', '.join(KINDS)}")
    if kind == "hybrid" and not 0 < p_uniform < 1:
        raise ValueError(f"noise.p_uniform={p_uniform}: must lie between 0 and 1; GIDD takes 0.1 or 0.2")
