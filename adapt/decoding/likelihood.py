"""Monte-Carlo NELBO of a target given a context: an upper bound on -log p, with its standard error.

    E_m[ n / m * sum over noised tokens of -log p(x0_i | xt) ],   m uniform in 1..n, the m noised tokens uniform among n

is the NELBO of absorbing noise with the linear schedule, with the number of noised tokens drawn first (LLaDA,
arXiv:2502.09992, eq. 14): less variance than noising tokens one by one. m is stratified over the samples, and the
noise is keyed by the request, so that its value does not depend on which other requests share its batch. For block attention
that is done block by block, all blocks in one forward on [x0 | xt], each after the clean text before it; the last block ends
where the target does, while in training it is filled up with end-of-text.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.layout import PADDING_DOCUMENT, Layout
from ..attention.views import clean_context_lengths, first_noised_position, noisy_view
from ..model.forward import hidden_states
from ..model.head import output_head
from ..noise.hybrid import corrupt, hybrid_elbo
from ..noise.keyed import generator_for
from ..objective import token_nll
from ..spec import DiffusionSpec
from .decoder import Decoder


class Nelbo(NamedTuple):
    nats: float
    """upper bound on -log p(target | context), summed over the target"""
    stderr: float
    """Monte-Carlo standard error, nats; 0 for a target of one token (exact), NaN for one sample of a longer one"""
    nfe: int
    """rows that went through the model for it, one for each sample"""


class _Sample(NamedTuple):
    request: int
    xt: Tensor  # the target, noised, [n]
    scored: Tensor  # places in the target that count, [m]
    weight: Tensor  # of each of them, [m]
    t: Tensor  # time of each of them, [m]; only for noise that is not absorbing


@torch.no_grad()
def nelbo(
    lm: Decoder,
    contexts: list[list[int]],
    targets: list[list[int]],
    *,
    num_samples: int = 32,
    batch_size: int = 32,
    seed: int = 1234,
) -> list[Nelbo]:
    """-log p(target | context) from above, one Nelbo for each pair of token lists.

    Samples of all requests are sorted by length and share batches of batch_size rows. Raises ValueError for an empty
    target.
    """
    if num_samples < 1:
        raise ValueError(f"mc_samples={num_samples}: must be at least 1")
    if lm.spec.shift_logits:  # the first token of a text needs a predictor
        assert lm.start_token_id is not None
        contexts = [context or [lm.start_token_id] for context in contexts]
    samples: list[_Sample] = []
    for request, (context, target) in enumerate(zip(contexts, targets, strict=True)):
        if not target:
            raise ValueError(f"request {request} has an empty target; there is nothing to score")
        samples += _samples(lm, request, context, target, num_samples, seed)
    order = sorted(range(len(samples)), key=lambda i: -_length(contexts, targets, samples[i]))
    estimates: list[list[float]] = [[] for _ in contexts]
    for start in range(0, len(order), batch_size):
        chosen = [samples[i] for i in order[start : start + batch_size]]
        for sample, value in zip(chosen, _estimate(lm, contexts, targets, chosen), strict=True):
            estimates[sample.request].append(value)
    exact = [_only_one_way(lm.spec, len(c), len(t)) for c, t in zip(contexts, targets, strict=True)]
    return [_summary(values, certain) for values, certain in zip(estimates, exact, strict=True)]


def _length(contexts: list[list[int]], targets: list[list[int]], sample: _Sample) -> int:
    return len(contexts[sample.request]) + len(targets[sample.request])


def _samples(
    lm: Decoder, request: int, context: list[int], target: list[int], num_samples: int, seed: int
) -> list[_Sample]:
    """The noised targets of a request. Where every block has one token there is one way to noise it, so one sample is exact."""
    x0 = torch.tensor(target)
    key = hashlib.sha256(repr((context, target)).encode()).digest()[:7]
    generator = generator_for(seed, int.from_bytes(key, "big"))
    if lm.spec.noise != "absorbing":
        return [_hybrid_sample(lm, request, x0, i / num_samples, num_samples, generator) for i in range(num_samples)]
    sizes = _block_lengths(lm.spec, len(context), len(target))
    if _only_one_way(lm.spec, len(context), len(target)):
        num_samples = 1
    offsets = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    samples = []
    for i in range(num_samples):
        strata = ((offsets + i) / num_samples).clamp(max=1 - 1e-9)
        counts = [int(u * n) + 1 for u, n in zip(strata.tolist(), sizes, strict=True)]
        chosen, start = [], 0
        for n, m in zip(sizes, counts, strict=True):
            chosen.append(start + torch.randperm(n, generator=generator)[:m])
            start += n
        scored, order = torch.cat(chosen).sort()
        weight = torch.cat([torch.full((m,), n / m) for n, m in zip(sizes, counts, strict=True)])[order]
        xt = x0.clone()
        xt[scored] = lm.spec.mask_token_id
        samples.append(_Sample(request, xt, scored, weight, torch.ones(len(scored))))
    return samples


def _block_lengths(spec: DiffusionSpec, num_context: int, num_target: int) -> list[int]:
    """How many tokens of the target each canvas holds; without blocks it is one canvas."""
    position = num_context + torch.arange(num_target)
    block = position // (spec.block_size or 1) if spec.attention == "block" else torch.zeros_like(position)
    return block.unique_consecutive(return_counts=True)[1].tolist()


def _only_one_way(spec: DiffusionSpec, num_context: int, num_target: int) -> bool:
    return spec.noise == "absorbing" and max(_block_lengths(spec, num_context, num_target)) == 1


def _hybrid_sample(
    lm: Decoder, request: int, x0: Tensor, stratum: float, num_samples: int, generator: torch.Generator
) -> _Sample:
    """One time for the target; t = sin^2(pi/2 u) takes the square roots out of the integrand's ends."""
    u = stratum + float(torch.rand((), generator=generator)) / num_samples
    t = torch.full((len(x0),), math.sin(math.pi / 2 * u) ** 2)
    everywhere = torch.ones(len(x0), dtype=torch.bool)
    xt = corrupt(
        x0,
        t,
        everywhere,
        kind=lm.spec.noise,
        vocab_size=lm.vocab_size,
        mask_token_id=lm.spec.mask_token_id,
        p_uniform=lm.spec.p_uniform or 0.0,
        generator=generator,
    )
    weight = torch.full((len(x0),), math.pi / 2 * math.sin(math.pi * u))
    return _Sample(request, xt, torch.arange(len(x0)), weight, t)


def _estimate(lm: Decoder, contexts: list[list[int]], targets: list[list[int]], samples: list[_Sample]) -> list[float]:
    """Sum of weight x nats over the scored tokens of each sample; one forward."""
    rows = [
        _row(lm.spec, torch.tensor(contexts[s.request], dtype=torch.long), s, torch.tensor(targets[s.request]))
        for s in samples
    ]
    width = max(len(row["xt"]) for row in rows)

    def stacked(key: str, fill: int = 0) -> Tensor:
        return torch.stack([F.pad(row[key], (0, width - len(row[key])), value=fill) for row in rows]).to(lm.device)

    layout = Layout(stacked("document", PADDING_DOCUMENT), stacked("view"), stacked("position"), stacked("sees", 1))
    hidden = hidden_states(lm.model, stacked("xt"), layout).flatten(0, 1)
    predictor = torch.cat([row["predictor"] + b * width for b, row in enumerate(rows)]).to(lm.device)
    x0 = torch.cat([torch.tensor(targets[s.request])[s.scored] for s in samples]).to(lm.device)
    head = output_head(lm.model)
    if lm.spec.noise == "absorbing":
        nats = token_nll(hidden[predictor], x0, head).cpu()
    else:
        xt = torch.cat([s.xt[s.scored] for s in samples]).to(lm.device)
        t = torch.cat([s.t for s in samples]).to(lm.device)
        options = {"kind": lm.spec.noise, "vocab_size": lm.vocab_size, "mask_token_id": lm.spec.mask_token_id}
        options["p_uniform"] = lm.spec.p_uniform or 0.0
        chunks = zip(*(x.split(1024) for x in (hidden[predictor], x0, xt, t)), strict=True)
        nats = torch.cat([hybrid_elbo(head(h).float(), *tensors, **options) for h, *tensors in chunks]).cpu()
    parts = nats.double().split([len(s.scored) for s in samples])
    return [float((part * s.weight).sum()) for s, part in zip(samples, parts, strict=True)]


def _row(spec: DiffusionSpec, context: Tensor, sample: _Sample, target: Tensor) -> dict[str, Tensor]:
    """The tokens of one sample as training lays them out: the clean copy that its canvases see, then the noised view."""
    end, first = len(context) + len(target), first_noised_position(spec, len(context))
    num_clean = 0 if spec.attention == "bidirectional" else len(context)
    if spec.attention == "block":
        size = spec.block_size or 1
        num_clean = max((end - 1) // size * size, first)
    clean, noisy = torch.arange(num_clean), torch.arange(first, end)
    view = noisy_view(spec, noisy, num_clean)
    return {
        "xt": torch.cat([torch.cat([context, target])[:num_clean], torch.cat([context, sample.xt])[first:]]),
        "document": torch.ones(num_clean + len(noisy), dtype=torch.long),
        "view": torch.cat([torch.zeros_like(clean), view.view]),
        "position": torch.cat([clean, noisy]),
        "sees": torch.cat([clean_context_lengths(spec, clean), view.sees]),
        "predictor": view.predictor[sample.scored + len(context) - first],
    }


def _summary(values: list[float], exact: bool) -> Nelbo:
    estimates = torch.tensor(values, dtype=torch.float64)
    spread = float(estimates.std()) if len(values) > 1 else math.nan
    return Nelbo(float(estimates.mean()), 0.0 if exact else spread / len(values) ** 0.5, len(values))
