"""The place of every token: its document, its view, its position. What the mask rule reads.

View 0 is causal context; views 1, 2, ... are canvases, bidirectional inside themselves, each hanging off the same context and
blind to the others. So

    causal         every token in view 0                       (the original model)
    prefix         the prompt in view 0, the canvas in view 1  (K noisy canvases may share one prompt: views 1..K)
    bidirectional  every token in view 1

Padding is a document of its own, so that no row of the mask is empty (a softmax over nothing is NaN).
Shapes: B rows, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_DOCUMENT = 0  # document ids of real tokens start at 1


@dataclass(frozen=True)
class Layout:
    """Place of every token: document_ids, view_ids, position_ids, each [B, L] of integers."""

    document_ids: Tensor
    view_ids: Tensor
    position_ids: Tensor
    context_lengths: Tensor | None = None
    """[B, L] how many tokens of its document's view 0 a token sees; None = those before it and itself. Needed where a
    canvas hangs off the middle of a context that goes on beside it."""

    @staticmethod
    def of(attention: str, padding_mask: Tensor, num_prompt_tokens: int = 0) -> Layout:
        """Layout of unpacked rows; padding_mask [B, L] is 1 for tokens; num_prompt_tokens columns are prompt.

        Positions count the tokens of each row, so that left padding shifts nothing.
        """
        real = padding_mask.long()
        view_ids = torch.ones_like(real)
        if attention != "bidirectional":
            view_ids[:, :num_prompt_tokens] = 0
        return Layout(real, view_ids, (real.cumsum(-1) - 1).clamp(min=0))

    def last(self, num_queries: int) -> Layout:
        """The layout of the last `num_queries` tokens: what is computed when a KV cache holds the rest."""
        document_ids, view_ids, position_ids = (
            x[:, -num_queries:] for x in (self.document_ids, self.view_ids, self.position_ids)
        )
        context_lengths = None if self.context_lengths is None else self.context_lengths[:, -num_queries:]
        return Layout(document_ids, view_ids, position_ids, context_lengths)


def parts(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(document_ids, view_ids, position_ids), without the context lengths, which only queries have."""
    return layout.document_ids, layout.view_ids, layout.position_ids
