"""The row that a model is probed with: two documents and padding, laid out as each pattern of attention has them.

As short as it can be, because all of a model's layers are asked about it, a text for each token: the first document reaches beyond
two windows, the layout of blocks has two canvases that must not see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.layout import PADDING_DOCUMENT, Layout
from ..attention.mask import mask_rule
from ..attention.windows import layer_windows

SPAN = 3
FIRST = 7
"""Tokens of the first document: more than two windows of SPAN, and no multiple of it, so that chunks are not counted by column."""
_DOCUMENTS = [1] * FIRST + [2] * 4 + [PADDING_DOCUMENT]
_POSITIONS = [*range(FIRST), *range(4), 0]
_VIEWS = {"prefix": [0] * 4 + [1] * 3 + [0] * 2 + [1] * 2 + [0], "causal": [0] * 12}  # a prompt is longer than SPAN
# Blocks of two: the clean copy of four (or two) tokens, then noised blocks at positions 2 and 4 that see what is before them.
_BLOCK_DOCUMENTS = [1] * 8 + [2] * 4 + [PADDING_DOCUMENT]
_BLOCK_VIEWS = [0] * 4 + [1] * 2 + [2] * 2 + [0] * 2 + [1] * 2 + [0]
_BLOCK_POSITIONS = [0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 2, 3, 0]
_BLOCK_SEES = {
    "block": [2, 2, 4, 4, 2, 2, 4, 4, 2, 2, 2, 2, 1],
    "causal": [1, 2, 3, 4, 2, 2, 4, 4, 1, 2, 2, 2, 1],
}


def row_layout(attention: str, clean_context: str | None, device: torch.device) -> Layout:
    """Of the row, [1, L]."""
    parts: list[list[int]] = [_DOCUMENTS, _VIEWS.get(attention, [1] * len(_DOCUMENTS)), _POSITIONS]
    if attention == "block":
        parts = [_BLOCK_DOCUMENTS, _BLOCK_VIEWS, _BLOCK_POSITIONS, _BLOCK_SEES[clean_context or "causal"]]
    return Layout(*(torch.tensor(part, device=device)[None] for part in parts))


def each_part(layout: Layout, change: Callable[[Tensor], Tensor]) -> Layout:
    """The layout with all its tensors changed alike."""
    lengths = layout.context_lengths
    return Layout(
        change(layout.document_ids),
        change(layout.view_ids),
        change(layout.position_ids),
        None if lengths is None else change(lengths),
    )


def stacked(first: Layout, second: Layout) -> Layout:
    """Two rows as the rows of one layout."""
    # What every token sees of the context where the layout does not say it.
    lengths = [x.position_ids + 1 if x.context_lengths is None else x.context_lengths for x in (first, second)]
    return Layout(
        torch.cat([first.document_ids, second.document_ids]),
        torch.cat([first.view_ids, second.view_ids]),
        torch.cat([first.position_ids, second.position_ids]),
        None if first.context_lengths is None and second.context_lengths is None else torch.cat(lengths),
    )


def distinct_tokens(model: PreTrainedModel, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`length` tokens and another for each, no two with one embedding (rows never trained are often alike); the mask token first
    among the others, where the config names it.
    """
    embedding: Any = model.get_input_embeddings()  # as a module: its weights may be in a file (`in_place.py`)
    mask_token_id = (getattr(model.config, "diffusion", None) or {}).get("mask_token_id")
    candidates = torch.randperm(len(embedding.weight), generator=torch.Generator().manual_seed(seed))[: 64 * length]
    candidates = candidates[candidates != mask_token_id] if mask_token_id is not None else candidates
    _, kinds = torch.unique(embedding(candidates.to(embedding.weight.device)), dim=0, return_inverse=True)
    num_kinds = int(kinds.max()) + 1
    if num_kinds < 2 * length:
        raise ValueError(
            f"base={type(model).__name__}: only {num_kinds} different rows in its embedding; wrong weights?"
        )
    # Kinds are in lexicographic order: far apart there, so that no two are alike but for rounding.
    chosen = [(kinds == kind).nonzero()[0] for kind in torch.linspace(0, num_kinds - 1, 2 * length).long().tolist()]
    picked = candidates[torch.cat(chosen).cpu()].to(model.device)
    others = picked[length:]
    if mask_token_id is not None:
        others[0] = mask_token_id
    return picked[:length], others


def edited(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """[1 + L, L]: a text, and below it the text with each of its tokens edited in turn."""
    tokens, others = distinct_tokens(model, length, seed)
    edits = torch.where(torch.eye(length, device=tokens.device).bool(), others, tokens)
    return torch.cat([tokens[None], edits])


def who_sees_whom(model: PreTrainedModel, layout: Layout) -> list[Tensor]:
    """Who sees whom, [query, key], for each layer of the model."""
    windows = layer_windows(model.config)
    if isinstance(windows, dict):
        per_layer = [windows[kind] for kind in model.config.layer_types]
    else:
        per_layer = [windows] * model.config.num_hidden_layers
    index = torch.arange(layout.position_ids.shape[1], device=layout.position_ids.device)
    zero = torch.zeros((), dtype=torch.long, device=index.device)
    rules = {window: mask_rule(layout, layout, window=window) for window in set(per_layer)}
    seen = {window: rule(zero, zero, index[:, None], index[None, :]) for window, rule in rules.items()}
    return [seen[window] for window in per_layer]
