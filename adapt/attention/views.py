"""How clean text and noisy views of it lie beside each other: what each of them sees, by attention pattern."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import DiffusionSpec


def clean_context_lengths(spec: DiffusionSpec, position: Tensor, size: int | None = None) -> Tensor:
    """How many clean tokens a clean token at each position sees: those up to itself, or up to the end of its block."""
    size = size or spec.block_size or 1
    block_causal = spec.attention == "block" and spec.clean_context == "block"
    return (position // size + 1) * size if block_causal else position + 1


def canvas_context_lengths(spec: DiffusionSpec, position: Tensor, size: int | None = None) -> Tensor:
    """How many clean tokens a noised token sees, of a view at consecutive positions: all before its canvas (or block)."""
    first = int(position[0])
    if spec.attention != "block":
        return torch.full_like(position, first)
    size = size or spec.block_size or 1
    return (position // size * size).clamp(min=first)


def first_noised_position(spec: DiffusionSpec, num_context: int, size: int | None = None) -> int:
    """Where a view of the target begins. A clean prompt token that sees all of its block would see clean target tokens in it,
    so with clean_context=block the block that the prompt ends in is a canvas as a whole."""
    if spec.attention == "bidirectional":
        return 0
    size = size or spec.block_size or 1
    block_causal = spec.attention == "block" and spec.clean_context == "block"
    return num_context // size * size if block_causal else num_context


class View(NamedTuple):
    """Where each token of a noisy view stands and what predicts it, [n] each."""

    position: Tensor
    block: Tensor
    """number of its canvas in the view, from 0: of its block, with block attention"""
    view: Tensor
    """its view id in a `Layout`; views of one example count on"""
    sees: Tensor
    """clean tokens before it that it sees"""
    predictor: Tensor
    """place, among the example's tokens, of the hidden state that predicts it; -1: the text's first token has none"""


def noisy_view(spec: DiffusionSpec, position: Tensor, offset: int, number: int = 0, size: int | None = None) -> View:
    """View `number` of an example at consecutive positions [n], which stands behind `offset` tokens of it.

    With shift_logits a token is predicted by the one before it, and a canvas' first token by the last clean token that it sees.
    """
    is_block = spec.attention == "block"
    size = size or spec.block_size or 1
    block = position // size - int(position[0]) // size if is_block else torch.zeros_like(position)
    sees = canvas_context_lengths(spec, position, size)
    predictor = offset + torch.arange(len(position))
    if spec.shift_logits:
        predictor = torch.where(position == sees, sees - 1, predictor - 1)
    return View(position, block, 1 + number * (int(block[-1]) + 1) + block, sees, predictor)
