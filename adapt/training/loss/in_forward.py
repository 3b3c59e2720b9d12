"""The loss inside the model's forward, the only call that DeepSpeed ZeRO-3, autocast and PEFT see.

Shapes: B rows, L tokens, N chosen rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.layout import Layout
from ...attention.sdpa_pieces import Geometry
from ...model.forward import backbone_outputs
from ...model.head import after_head
from ...objective import RowLoss, weighted_loss
from .router import has_router_loss, router_aux_loss


class Term(NamedTuple):
    """Rows that go through the head for one loss; see `objective.weighted_loss`."""

    rows: Tensor
    """[N] of the flattened [B * L] hidden states"""
    row_loss: RowLoss
    row_tensors: tuple[Tensor, ...]
    """[N, ...] each: what row_loss takes besides the logits"""
    weights: Tensor
    """[N]"""


def attach_loss(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose forward also answers `model(input_ids, layout=, terms=, ...)` with (loss [], [nats of each term's rows]).

    The loss has to be inside `forward`, because that is the only call that DeepSpeed ZeRO-3, autocast and PEFT see. Without
    `terms` the forward is the model's own. A mixture of experts that has a balancing loss adds router_weight times it.
    """
    plain_forward = model.forward
    after_head(model)  # while the forward is still the model's own

    def forward(*args, terms: list[Term] | None = None, **kwargs):
        if terms is None:
            return plain_forward(*args, **kwargs)
        return _loss(model, terms, *args, **kwargs)

    model.forward = forward
    return model


def _loss(
    model: PreTrainedModel,
    terms: list[Term],
    *,
    input_ids: Tensor,
    layout: Layout,
    num_chunks: int,
    pieces: Geometry | None = None,
    right_window: int | None = None,
    router_weight: float = 1.0,
    **_: None,  # what PEFT adds
) -> tuple[Tensor, list[Tensor]]:
    routed = has_router_loss(model)
    options = {"pieces": pieces, "right_window": right_window, "output_router_logits": routed}
    outputs = backbone_outputs(model, input_ids, layout, **options)
    hidden = outputs.last_hidden_state.flatten(0, 1)
    # The head as it is now: PEFT replaces a tied one when it trains the mask token's row.
    linear: Any = model.get_output_embeddings()
    post = after_head(model)
    sums, nats = zip(
        *(
            weighted_loss(
                hidden.index_select(0, term.rows),
                linear,
                post,
                term.row_loss,
                term.row_tensors,
                term.weights,
                num_chunks,
            )
            for term in terms
        ),
        strict=True,
    )
    loss = torch.stack(sums).sum()
    return loss + router_weight * router_aux_loss(model, outputs, layout) if routed else loss, list(nats)
