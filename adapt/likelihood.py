"""Monte-Carlo NELBO of a target given a context: an upper bound on -log p, with its standard error.

    E_m[ n / m * sum over noised tokens of -log p(x0_i | xt) ],   m uniform in 1..n, the m noised tokens uniform among n

is the NELBO of absorbing noise with the linear schedule, with the number of noised tokens drawn first (LLaDA,
arXiv:2502.09992, eq. 14): less variance than noising tokens one by one. m is stratified over the samples, and the
noise is keyed by the request, so that its value does not depend on which other requests share its batch.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .attention import PADDING_DOCUMENT, Layout
from .model import DiffusionLM, hidden_states, output_head
from .noise import generator_for
from .objective import token_nll


class Nelbo(NamedTuple):
    nats: float
    """upper bound on -log p(target | context), summed over the target"""
    stderr: float
    """Monte-Carlo standard error, nats; 0 for a target of one token (exact), NaN for one sample of a longer one"""
    nfe: int
    """rows that went through the model for it, one for each sample"""


class _Sample(NamedTuple):
    request: int
    noised: Tensor  # places in the target, [m]


@torch.no_grad()
def nelbo(
    lm: DiffusionLM,
    contexts: list[list[int]],
    targets: list[list[int]],
    *,
    num_samples: int = 32,
    batch_size: int = 32,
    seed: int = 1234,
    progress: bool = False,
) -> list[Nelbo]:
    """-log p(target | context) from above, one Nelbo for each pair of token lists.

    Samples of all requests are sorted by length and share batches of batch_size rows. Raises ValueError for an empty
    target.
    """
    if num_samples < 1:
        raise ValueError(f"mc_samples={num_samples}: must be at least 1")
    if lm.spec.shift_logits:  # the first token of a text needs a predictor
        contexts = [context or [lm.start_token_id] for context in contexts]
    samples: list[_Sample] = []
    for request, (context, target) in enumerate(zip(contexts, targets, strict=True)):
        if not target:
            raise ValueError(f"request {request} has an empty target; there is nothing to score")
        samples += [_Sample(request, noised) for noised in _noised_sets(context, target, num_samples, seed)]
    order = sorted(range(len(samples)), key=lambda i: -_length(contexts, targets, samples[i]))
    estimates: list[list[float]] = [[] for _ in contexts]
    for start in tqdm(range(0, len(order), batch_size), desc="likelihood", disable=None if progress else True):
        chosen = [samples[i] for i in order[start : start + batch_size]]
        for sample, value in zip(chosen, _estimate(lm, contexts, targets, chosen), strict=True):
            estimates[sample.request].append(value)
    return [_summary(values, len(target)) for values, target in zip(estimates, targets, strict=True)]


def _length(contexts: list[list[int]], targets: list[list[int]], sample: _Sample) -> int:
    return len(contexts[sample.request]) + len(targets[sample.request])


def _noised_sets(context: list[int], target: list[int], num_samples: int, seed: int) -> list[Tensor]:
    """The places that each sample noises. A target of one token has one such set, so one sample is exact."""
    n = len(target)
    if n == 1:
        return [torch.zeros(1, dtype=torch.long)]
    key = hashlib.sha256(repr((context, target)).encode()).digest()[:7]
    generator = generator_for(seed, int.from_bytes(key, "big"))
    offset = float(torch.rand((), generator=generator))
    strata = ((offset + torch.arange(num_samples, dtype=torch.float64)) / num_samples).clamp(max=1 - 1e-9)
    counts = (strata * n).long() + 1
    return [torch.randperm(n, generator=generator)[: int(m)] for m in counts]


def _estimate(
    lm: DiffusionLM, contexts: list[list[int]], targets: list[list[int]], samples: list[_Sample]
) -> list[float]:
    """n / m * sum of -log p over the noised tokens, nats, for each sample; one forward."""
    rows = [contexts[s.request] + targets[s.request] for s in samples]
    width = max(map(len, rows))
    x0 = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    document_ids = torch.tensor([[1] * len(row) + [PADDING_DOCUMENT] * (width - len(row)) for row in rows])
    view_ids = torch.ones_like(x0)
    is_noised = torch.zeros_like(x0, dtype=torch.bool)
    for b, sample in enumerate(samples):
        start = len(contexts[sample.request])
        if lm.spec.attention != "bidirectional":
            view_ids[b, :start] = 0
        is_noised[b, start + sample.noised] = True
    xt = torch.where(is_noised, lm.spec.mask_token_id, x0).to(lm.device)
    position_ids = torch.arange(width).expand_as(x0)
    layout = Layout(*(x.to(lm.device) for x in (document_ids, view_ids, position_ids)))
    hidden = hidden_states(lm.model, xt, layout)
    predictor = is_noised.flatten().nonzero().flatten() - int(lm.spec.shift_logits)
    nll = token_nll(
        hidden.flatten(0, 1)[predictor.to(lm.device)], x0[is_noised].to(lm.device), output_head(lm.model)
    ).cpu()
    sums = [float(part.double().sum()) for part in nll.split([len(s.noised) for s in samples])]
    return [total * len(targets[s.request]) / len(s.noised) for s, total in zip(samples, sums, strict=True)]


def _summary(values: list[float], target_length: int) -> Nelbo:
    estimates = torch.tensor(values, dtype=torch.float64)
    spread = float(estimates.std()) if len(values) > 1 else math.nan
    return Nelbo(float(estimates.mean()), 0.0 if target_length == 1 else spread / len(values) ** 0.5, len(values))
