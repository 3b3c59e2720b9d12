"""From hidden states to a loss: the head on chosen rows only, in chunks, summed in nats.

[B, L, V] logits never exist: the rows whose hidden state predicts something are gathered first, and the head runs over them in
chunks whose gradients are taken at once, in the forward pass (the idea of Liger's fused linear cross-entropy), so that memory
grows with neither vocabulary x length nor the number of rows, and nothing is computed twice.

    weighted_loss     what a training step minimises: the weights, divided by the step's tokens, are inside (`trainer.py`)
    diffusion_loss    the public NELBO of -log p that are at hand, a sum and a count: a step reports it and does not minimise it

Shapes: N chosen rows, n of them in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**28  # n x V of a chunk: 0.5 GB in bfloat16
ROWS_PER_GATHER = 2048  # under ZeRO-3, where each chunk gathers the head's weights
SLICE_LOGITS = {"cpu": 2**22, "cuda": 2**26}  # of a slice of it: what stays in a CPU's cache; enough to fill a GPU

# (logits [n, V] in float32, tensors of the rows [n, ...]) -> (loss of each row [n], for the log its -log p or bound [n], or that
# and more beside it [n, m]), nats
RowLoss = Callable[..., tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p(target), the same) of each row, [n] in nats."""
    nll = F.cross_entropy(logits, targets, reduction="none")
    return nll, nll


def weighted_loss(
    hidden_ND: Tensor,
    linear: torch.nn.Module,
    post: Callable[[Tensor], Tensor],
    row_loss: RowLoss,
    row_tensors: tuple[Tensor, ...],
    weights_N: Tensor,
    num_chunks: int,
) -> tuple[Tensor, Tensor]:
    """The training step's loss: (sum of weight x loss over the rows [], their nats [N] or [N, m] without a gradient).

    The logits are post(linear(hidden)): the model's head, and how it scales and caps what that gives. num_chunks is used where
    the weights are scattered (ZeRO-3): gathering them is a collective, so all ranks must take as many chunks; there the head is
    recomputed in the backward pass.
    """
    if any(hasattr(parameter, "ds_id") for parameter in linear.parameters()):
        return _recomputed(hidden_ND, linear, post, row_loss, row_tensors, weights_N, num_chunks)
    if type(linear) is not torch.nn.Linear or not hidden_ND.requires_grad:  # PEFT's own modules have parameters inside
        num_chunks = 4 * _num_chunks(hidden_ND, linear)  # several float32 tensors of a chunk at a time
        return _recomputed(hidden_ND, linear, post, row_loss, row_tensors, weights_N, num_chunks)
    names, parameters = zip(*linear.named_parameters(), strict=True)
    loss, nats = _GradientInForward.apply(hidden_ND, weights_N, post, names, row_loss, row_tensors, linear, *parameters)
    return loss, nats


def _num_chunks(hidden_ND: Tensor, linear: torch.nn.Module) -> int:
    vocabulary = max(parameter.shape[0] for parameter in linear.parameters())
    return max(1, -(-len(hidden_ND) * vocabulary // CHUNK_LOGITS))


def _recomputed(hidden_ND, linear, post, row_loss, row_tensors, weights_N, num_chunks) -> tuple[Tensor, Tensor]:
    def chunk_loss(hidden: Tensor, weights: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        loss, nats = row_loss(post(linear(hidden)).float(), *tensors)
        return (loss * weights).sum(), nats.detach()

    chunks = zip(*(x.tensor_split(num_chunks) for x in (hidden_ND, weights_N, *row_tensors)), strict=True)
    losses, nats = zip(*(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks), strict=True)
    return torch.stack(losses).sum(), torch.cat(nats)


class _GradientInForward(torch.autograd.Function):
    """Each chunk's logits are overwritten by their gradient, a slice at a time, which then goes through the head's matrix.

    Two sizes, because fresh memory is what costs here: a chunk is one matrix product and one buffer, a slice of it is small
    enough that its float32 softmax stays in cached memory.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weights_N, post, names, row_loss, row_tensors, linear, *parameters):  # pyright: ignore
        trained = ctx.needs_input_grad[7:]
        leaves = [p.detach().requires_grad_(on) for p, on in zip(parameters, trained, strict=True)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        num_chunks = _num_chunks(hidden_ND, linear)
        hidden_grads, nats, total, sums = [], [], torch.zeros((), device=hidden_ND.device), []
        chunks = zip(*(x.tensor_split(num_chunks) for x in (hidden_ND, weights_N, *row_tensors)), strict=True)
        for hidden, *tensors in chunks:
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                raw = functional_call(linear, dict(zip(names, leaves, strict=True)), (hidden,))
            num_slices = max(1, -(-raw.numel() // SLICE_LOGITS.get(raw.device.type, 2**26)))
            logits = raw.detach()
            for part, weights, *rest in zip(*(x.tensor_split(num_slices) for x in (logits, *tensors)), strict=True):
                with torch.enable_grad():
                    part_in = part.detach().requires_grad_()
                    losses, part_nats = row_loss(post(part_in).float(), *rest)
                    loss = (losses * weights).sum()
                part.copy_(torch.autograd.grad(loss, part_in)[0])
                total += loss.detach()
                nats.append(part_nats.detach())
            grads = torch.autograd.grad(raw, [hidden, *wanted], grad_outputs=logits)
            hidden_grads.append(grads[0])
            if sums:
                for accumulated, grad in zip(sums, grads[1:], strict=True):
                    accumulated += grad
            else:  # in float32: chunks of a bfloat16 weight would round each other away
                sums = [grad.float() if num_chunks > 1 else grad for grad in grads[1:]]
        ctx.trained, ctx.dtypes = trained, [leaf.dtype for leaf in wanted]
        ctx.gradients = torch.cat(hidden_grads), *sums
        nats = torch.cat(nats)
        ctx.mark_non_differentiable(nats)
        return total, nats

    @staticmethod
    def backward(ctx, grad_loss, _):  # pyright: ignore
        hidden_grad, *sums = (gradient.mul_(grad_loss) for gradient in ctx.gradients)
        del ctx.gradients
        scaled = iter(total.to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True))
        return hidden_grad, *(None,) * 6, *(next(scaled) if on else None for on in ctx.trained)


def token_nll(hidden_ND: Tensor, targets_N: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """-log p(target) of each row, [N] in float32 nats, without a gradient; `head`: [n, D] -> logits [n, V]."""
    rows = max(1, CHUNK_LOGITS // 2**18)
    pairs = zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    return torch.cat([F.cross_entropy(head(h).float(), y, reduction="none") for h, y in pairs])


def diffusion_loss(
    nll_N: Tensor, elbo_weight_N: Tensor, num_maskable: Tensor, weight: str = "elbo"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Masked-diffusion NELBO, summed: (loss_sum [], num_tokens [], metrics), in nats. MDLM, arXiv:2406.07524.

    E_t[ -alpha_prime / (1 - alpha_t) * sum over noised tokens of -log p(x0_i | xt) ], estimated at one t for each view, or for
    each block of it (BD3-LM, arXiv:2503.09573). nll_N: -log p of the noised tokens; elbo_weight_N: their -alpha_prime / (1 -
    alpha_t); num_maskable []: tokens that might have been noised. Other weights than "elbo" divide by the number of noised
    tokens: not a bound, less variance. The caller divides once, over the whole global batch.
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
