"""What a step's loss is made of: the rows for the head, their loss and their weights. The trainer and the planner take it from here.

Shapes: N noised tokens, M clean tokens of an AR loss, D hidden size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...noise.hybrid import hybrid_loss
from ...objective import RowLoss, cross_entropy, diffusion_loss
from ..data.batch import Batch
from ..data.views import Canvases
from ..recipe import Recipe
from .distill import Teacher
from .in_forward import Term


def noised_loss(recipe: Recipe, canvases: Canvases, teacher: Teacher | None) -> RowLoss | None:
    """The loss of a noised token; None: the cross-entropy, which an AR loss has too."""
    if teacher is not None:
        return teacher.row_loss(recipe.objective.distill_weight)
    if recipe.noise.kind == "absorbing" or canvases.is_ar:
        return None
    return partial(
        hybrid_loss,
        kind=recipe.noise.kind,
        vocab_size=canvases.vocab_size,
        mask_token_id=canvases.spec.mask_token_id,
        p_uniform=recipe.noise.p_uniform,
        weight=recipe.objective.weight,
    )


def log_sums(batch: Batch, nats: Tensor, is_ar: bool) -> dict[str, Tensor]:
    """What a log's means are made of: sums of nats [N + M] (the rows' -log p or bound, as the terms gave it) and counts, [] each.

    Of the AR objective the NLL is what its NELBO is: every target token is predicted, once.
    """
    nll, ar_nll = nats.split([len(batch["rows"]), len(batch["ar_rows"])])
    num_ar = torch.full_like(batch["num_maskable"], len(ar_nll))
    if is_ar:
        _, _, metrics = diffusion_loss(ar_nll, torch.ones_like(ar_nll), num_ar)
    else:
        _, _, metrics = diffusion_loss(nll, batch["elbo_weight"], batch["num_maskable"])
    return {**metrics, "ar_nll_sum": ar_nll.sum(), "num_ar": num_ar}


def terms_of(
    batch: Batch, row_loss: RowLoss | None, taught_ND: Tensor | None, per_token: Tensor, per_ar_token: Tensor | None
) -> list[Term]:
    """The noised tokens, and the clean ones of an AR loss; in one term where their loss is the same.

    row_loss: `noised_loss`. taught_ND: the teacher's hidden states, with distillation. per_token, per_ar_token []: what the losses
    of a noised and of a clean token are multiplied with, besides the weight of its time; None: there is no AR loss.
    """
    weights = batch["loss_weight"] * per_token
    ar_weights = None if per_ar_token is None else per_ar_token.expand(len(batch["ar_rows"]))
    if row_loss is None:
        rows, targets = batch["rows"], batch["targets"]
        if ar_weights is not None:
            rows, targets = torch.cat([rows, batch["ar_rows"]]), torch.cat([targets, batch["ar_targets"]])
            weights = torch.cat([weights, ar_weights])
        return [Term(rows, cross_entropy, (targets,), weights)]
    about = (batch["xt"], batch["t"]) if taught_ND is None else (taught_ND, batch["is_taught"])
    terms = [Term(batch["rows"], row_loss, (batch["targets"], *about), weights)]
    if ar_weights is not None:
        terms.append(Term(batch["ar_rows"], cross_entropy, (batch["ar_targets"],), ar_weights))
    return terms
