"""Mixture of experts: the router's load-balancing loss, by transformers' own function and the model's own coefficient.

    outputs = ...                                  # of the backbone, called with output_router_logits=True
    loss = nelbo + router_aux_loss(model, outputs, layout)

Shapes: B rows, L tokens, E experts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...attention.layout import PADDING_DOCUMENT, Layout


def has_router_loss(model: PreTrainedModel) -> bool:
    """True if the model routes tokens to experts and its config asks for a balancing loss (router_aux_loss_coef > 0).

    False for models that balance in another way (DeepSeek-V3's bias), as transformers trains them without such a loss too.
    """
    return bool(getattr(model, "router_aux_loss_coef", 0)) and _balancing_loss(model) is not None


def router_aux_loss(model: PreTrainedModel, outputs: Any, layout: Layout | None) -> Tensor:
    """router_aux_loss_coef times the load-balancing loss of one micro-batch, [].

    outputs: of the backbone, called with output_router_logits=True. Padding takes no part; layout None = there is none. The
    loss is a product of two means over the micro-batch's tokens, so it is to be averaged over accumulation steps and ranks,
    not divided by token counts. Switch Transformer, arXiv:2101.03961, equations 4 to 6, over all layers at once as
    transformers computes it.
    """
    balancing_loss = _balancing_loss(model)
    assert balancing_loss is not None
    ours: Any = model
    is_token = None if layout is None else layout.document_ids != PADDING_DOCUMENT
    return ours.router_aux_loss_coef * balancing_loss(
        outputs.router_logits, ours.num_experts, ours.num_experts_per_tok, is_token
    )


def _balancing_loss(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The function that the model's own forward calls; None if it has none, or one that is called in another way."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if function is None or not hasattr(model, "num_experts_per_tok"):
        return None
    names = list(inspect.signature(function).parameters)
    return function if names == ["gate_logits", "num_experts", "top_k", "attention_mask"] else None
