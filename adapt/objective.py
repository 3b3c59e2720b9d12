"""From hidden states to a loss: the head on noised rows only, in chunks, summed in nats.

[B, L, V] logits never exist: the rows whose hidden state predicts a noised token are gathered first, and beyond CHUNK rows
the head is recomputed in the backward pass, so that memory grows with neither vocabulary nor length.
Shapes: N noised rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # rows; 2048 x 152k vocabulary x 4 bytes = 1.2 GB, the peak of the loss


def token_nll(
    hidden_ND: Tensor, targets_N: Tensor, head: Callable[[Tensor], Tensor], num_chunks: int | None = None
) -> Tensor:
    """-log p(target) of each row, [N] in float32 nats, from hidden states [N, D] and `head`: [n, D] -> logits [n, V]."""

    def nll(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    num_chunks = num_chunks or max(1, -(-len(hidden_ND) // CHUNK))
    if num_chunks == 1:
        return nll(hidden_ND, targets_N)
    pairs = zip(hidden_ND.tensor_split(num_chunks), targets_N.tensor_split(num_chunks), strict=True)
    return torch.cat([checkpoint(nll, hidden, targets, use_reentrant=False) for hidden, targets in pairs])


def diffusion_loss(
    nll_N: Tensor, elbo_weight_N: Tensor, num_maskable: Tensor, weight: str = "elbo"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Masked-diffusion NELBO, summed: (loss_sum [], num_tokens [], metrics), in nats. MDLM, arXiv:2406.07524.

    E_t[ -alpha_prime / (1 - alpha_t) * sum over noised tokens of -log p(x0_i | xt) ], estimated at one t for each view.
    nll_N: -log p of the noised tokens; elbo_weight_N: their -alpha_prime / (1 - alpha_t); num_maskable []: tokens that might
    have been noised. weight="uniform" weighs noised tokens alike and divides by their number: not a bound, less variance;
    the AR objective is that with every target token "noised". The caller divides once, over the whole global batch.
    """
    nelbo_sum, nll_sum = (nll_N * elbo_weight_N).sum(), nll_N.sum()
    num_noised = torch.full_like(num_maskable, len(nll_N))
    metrics = {
        "nelbo_sum": nelbo_sum.detach(),
        "noised_nll_sum": nll_sum.detach(),
        "num_noised": num_noised,
        "num_maskable": num_maskable,
    }
    return (nelbo_sum, num_maskable, metrics) if weight == "elbo" else (nll_sum, num_noised, metrics)
