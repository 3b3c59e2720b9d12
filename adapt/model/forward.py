"""A converted model in memory: hidden states under an attention pattern, and the head on chosen rows only.

Nothing here knows an architecture. Masks and positions go in through transformers' public arguments, and the head is
the model's own; `probe.py` proves both on the loaded weights.
Shapes: B rows, L tokens, D hidden size, V vocabulary, N chosen rows.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..attention.layout import Layout
from ..attention.mask import attention_mask
from ..attention.sdpa_pieces import NAME as PIECES
from ..attention.sdpa_pieces import Geometry, Masked, geometry_of, with_masks
from ..attention.windows import layer_windows
from .parts import backbone_of

if TYPE_CHECKING:
    pass


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    layout: Layout | None,
    *,
    cache: Cache | None = None,
    pieces: Geometry | Masked | None = None,
    right_window: Tensor | int | None = None,
    dense: bool = False,
) -> Tensor:
    """Last hidden states [B, Q, D] of input_ids [B, Q] under the attention pattern of `layout`.

    layout: of all keys; with a KV cache it is longer than input_ids, which are its last tokens. None = plain
    bidirectional attention on unpadded rows, for models with `config.is_causal = False`: no mask is built and flash
    kernels apply. pieces: the layout's geometry, where the caller has it on the host already (`collate`), or with its masks. dense: the
    tokens stand in no particular order, so that a kernel that cuts the layout into pieces takes a mask over everything.
    """
    options = {"cache": cache, "pieces": pieces, "right_window": right_window, "dense": dense}
    return backbone_outputs(model, input_ids, layout, **options).last_hidden_state


def backbone_outputs(
    model: PreTrainedModel,
    input_ids: Tensor,
    layout: Layout | None,
    *,
    cache: Cache | None = None,
    pieces: Geometry | Masked | None = None,
    right_window: Tensor | int | None = None,
    dense: bool = False,
    output_router_logits: bool = False,
) -> Any:
    """The backbone's outputs; with output_router_logits those of the experts' routers are among them."""
    more = {"output_router_logits": True} if output_router_logits else {}
    if layout is None:
        return backbone_of(model)(input_ids=input_ids, use_cache=False, **more)
    num_queries = input_ids.shape[1]
    inputs: dict[str, Any] = {"input_ids": input_ids, "past_key_values": cache, "use_cache": cache is not None}
    if model.config._attn_implementation == PIECES and cache is None and not dense:
        windows = layer_windows(model.config)
        nothing = input_ids.new_empty(1, 1, 0, 0)  # four dimensions: transformers builds no mask of its own
        inputs["attention_mask"] = {kind: nothing for kind in windows} if isinstance(windows, dict) else nothing
        if not isinstance(pieces, dict):
            pieces = with_masks(pieces or geometry_of(layout), layout, windows, right_window)
        inputs["pieces"] = pieces
    else:
        inputs["attention_mask"] = attention_mask(
            model.config,
            layout,
            num_queries=num_queries,
            right_window=right_window,
            dtype=model.dtype,
            cache_key=pieces.key if isinstance(pieces, Geometry) else None,
        )
    backbone = backbone_of(model)
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = layout.last(num_queries).position_ids
    return backbone(**inputs, **more)
