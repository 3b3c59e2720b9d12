"""How clean text and noisy views of it lie beside each other: what each of them sees, by attention pattern."""

from __future__ import annotations

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
