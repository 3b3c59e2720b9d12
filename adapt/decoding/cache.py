"""What stands before a canvas: how much of it is seen from each position, and while decoding its KV cache.

Shapes: A rows, M columns that joined the context, W canvas columns, D hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from ..attention.layout import Layout, parts

if TYPE_CHECKING:
    pass


class Context:
    """What stands before the canvas: its KV cache, and where each slot of it stands. Rows may differ in length."""

    def __init__(self, cache: DynamicCache, layout: Layout, num_columns: Tensor) -> None:
        self.cache, self.layout, self.num_columns = cache, layout, num_columns
        self.last_hidden: Tensor | None = None  # [A, 1, D], predicts the canvas' first token where logits are shifted

    @staticmethod
    def empty(batch: int, device: torch.device) -> Context:
        nothing = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return Context(
            DynamicCache(), Layout(nothing, nothing, nothing), torch.zeros(batch, dtype=torch.long, device=device)
        )

    def followed_by(self, layout: Layout) -> Layout:
        both = Layout(*(torch.cat(pair, dim=1) for pair in zip(parts(self.layout), parts(layout), strict=True)))
        if layout.context_lengths is None:
            return both
        asks_nothing = torch.zeros_like(self.layout.position_ids)  # cached tokens are keys only
        return dataclasses.replace(both, context_lengths=torch.cat([asks_nothing, layout.context_lengths], dim=1))

    def append(self, layout: Layout, hidden: Tensor, num_new: int, num_columns: Tensor) -> Tensor | None:
        """Keeps the first num_new of the slots that a forward has added; the last hidden state of each context."""
        self.cache.crop(num_new - hidden.shape[1])  # negative: forget that many of the newest
        self.layout = self.followed_by(Layout(*(x[:, :num_new] for x in parts(layout))))
        if num_new:
            newest, grew = hidden[:, num_new - 1 : num_new], (num_columns > self.num_columns)[:, None, None]
            self.last_hidden = newest if self.last_hidden is None else torch.where(grew, newest, self.last_hidden)
        self.num_columns = num_columns.clone()
        return self.last_hidden

    def select(self, going: Tensor) -> None:
        """Keeps the rows where going [A] is True."""
        self.cache.batch_select_indices(going.nonzero().flatten())
        self.layout = Layout(*(x[going] for x in parts(self.layout)))
        self.num_columns = self.num_columns[going]
        self.last_hidden = None if self.last_hidden is None else self.last_hidden[going]
