"""What decoding and likelihood ask of a model: a handful of things, and no tokenizer.

`adapt.DiffusionLM` is one; so is what an export makes of a model that transformers has loaded, and whatever else is to be
decoded here (a foreign diffusion LM, a server's model) needs no more.
"""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import PreTrainedModel

from ..spec import DiffusionSpec


class Decoder(Protocol):
    """A model that is decoded by refinement."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def spec(self) -> DiffusionSpec: ...

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a text."""
        ...

    @property
    def start_token_id(self) -> int | None:
        """What stands before a text whose first token needs a predictor."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens that uniform noise is drawn from; the embedding may have more rows."""
        ...

    @property
    def mask_free(self) -> bool:
        """Plain bidirectional attention needs no explicit mask on this model."""
        ...

    @property
    def device(self) -> torch.device: ...
