"""Distillation from the frozen original: its next-token distribution at each noised token, given the clean text before it.

The original reads the clean text once, causally; the adapted model is pulled towards what it says there, by
KL(original || adapted) beside the loss of the noise. With LoRA the original is the same weights with the adapters off, at no
extra memory; with full fine-tuning it is a second, frozen copy of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from ...attention.layout import Layout
from ...files.loading import weights_of
from ...model.forward import hidden_states
from ...model.head import after_head
from ...objective import RowLoss, cross_entropy
from ..data.batch import Batch
from ..engine.arguments import compute_dtype, whole_weights
from ..recipe import Recipe


class Teacher:
    """The original, and what it says at the noised tokens of a batch."""

    def __init__(self, model: PreTrainedModel, without_adapters: Callable[[], Any] = nullcontext) -> None:
        self.model, self.without_adapters = model, without_adapters

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [N, D] that predict each noised token from the clean text before it."""
        documents = batch["teacher_document_ids"]
        layout = Layout(documents, torch.zeros_like(documents), batch["teacher_position_ids"])
        was_training = self.model.training
        self.model.eval()  # no dropout
        with self.without_adapters():
            states = hidden_states(self.model, batch["teacher_input_ids"], layout, pieces=batch["teacher_pieces"])
        self.model.train(was_training)
        return states.flatten(0, 1)[batch["teacher_rows"]]

    def row_loss(self, weight: float) -> RowLoss:
        """(logits, targets, the teacher's hidden states, is_taught) -> -log p + weight x KL of each row, and (-log p, KL) [n, 2]."""
        head, post = _without_adapters(self.model.get_output_embeddings()), after_head(self.model)

        def loss(logits: Tensor, targets: Tensor, hidden: Tensor, is_taught: Tensor) -> tuple[Tensor, Tensor]:
            nll, _ = cross_entropy(logits, targets)
            with torch.no_grad():
                log_p = post(head(hidden)).float().log_softmax(-1)
            log_q = logits.log_softmax(-1)[
                :, : log_p.shape[1]
            ]  # a teacher from elsewhere has no row for the mask token
            kl = is_taught * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            return nll + weight * kl, torch.stack([nll, kl], dim=1)

        return loss


def _without_adapters(head: Any) -> torch.nn.Module:
    """The frozen layer inside what PEFT puts around a head that it trains a row of, or adapts."""
    for name in ("token_adapter", "base_layer"):
        head = getattr(head, name, head)
    return head


def load_teacher(folder: str | Path, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> Teacher:
    """A frozen copy of the base; its mask token's row, if it has one, is never asked for."""
    model: Any = weights_of(folder, f"model.base={folder}", dtype=dtype, attn_implementation=attn_implementation)
    model.config.is_causal = True  # the layout says who sees whom
    return Teacher(model.to(device).requires_grad_(False).eval())


def teacher_of(recipe: Recipe, model, folder: Path, args: TrainingArguments) -> Teacher | None:
    """The teacher that a recipe asks for: the model that is trained without its adapters, or a copy of the base; None = none."""
    if not recipe.objective.distill_weight or recipe.objective.name == "ar":
        return None
    if recipe.model.lora is not None:
        return Teacher(model.get_base_model(), model.disable_adapter)
    with whole_weights(args):
        return load_teacher(folder, compute_dtype(recipe), args.device, model.config._attn_implementation)
