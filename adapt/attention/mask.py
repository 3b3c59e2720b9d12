"""Who sees whom: one closed-form rule for causal, prefix and bidirectional attention, packed or not.

Every token carries three numbers, its place in a `Layout`: the document that it belongs to, its position in that
document, and its view. View 0 is causal context; views 1, 2, ... are canvases, bidirectional inside themselves, each
hanging off the same context and blind to the others. So

    causal         every token in view 0                       (the original model)
    prefix         the prompt in view 0, the canvas in view 1  (K noisy canvases may share one prompt: views 1..K)
    bidirectional  every token in view 1

Padding is a document of its own, so that no row of the mask is empty (a softmax over nothing is NaN).
Shapes: B rows, Q queries, L keys (Q < L when a KV cache holds the first L - Q).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .layout import Layout
from .windows import Chunk, Span, layer_windows

_KEPT_MASKS = 8
_block_masks: dict[tuple, Any] = {}
_DENSE = ("eager", "sdpa", "sdpa_pieces")


def mask_rule(
    queries: Layout, keys: Layout, *, window: Span = None, right_window: Tensor | int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as a function (b, h, q, k) -> bool, True where query q sees key k; FlexAttention's `mask_mod`.

    window: sliding-window size or chunk of the layer, None = full. Causal context keeps transformers' causal convention
        (distance < window); a canvas has its bidirectional one (distance <= window), so that a plain load of a
        bidirectional checkpoint attends as we trained it. A chunk is the same for both.
    right_window: how far a canvas sees to its right while attention is annealed from causal to bidirectional
        (DiffuLLaMA, arXiv:2410.17891, opens future edges at random; a window does it in closed form). None = all.
    """
    # Tensors, not objects and not a number that changes with the step: what the rule closes over is what FlexAttention
    # compiles against, and anything but a tensor would be a new kernel each time.
    query_document, query_views, query_position = queries.document_ids, queries.view_ids, queries.position_ids
    key_document, key_views, key_position = keys.document_ids, keys.view_ids, keys.position_ids
    right = None if right_window is None else _number_on(key_position.device, right_window)
    context_lengths = queries.context_lengths
    chunk, distance = (window.size, None) if isinstance(window, Chunk) else (None, window)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ahead = key_position[b, k] - query_position[b, q]  # > 0: the key lies in the query's future
        query_view, key_view = query_views[b, q], key_views[b, k]
        in_canvas = key_view == query_view
        if right is not None:
            in_canvas = in_canvas & (ahead <= right)
        before = ahead <= 0 if context_lengths is None else key_position[b, k] < context_lengths[b, q]
        seen = torch.where(key_view == 0, before, in_canvas)
        if chunk is not None:
            seen = seen & (key_position[b, k] // chunk == query_position[b, q] // chunk)
        if distance is not None:
            reach = torch.where(query_view == 0, distance - 1, distance)
            seen = seen & (ahead.abs() <= reach)
        return seen & (query_document[b, q] == key_document[b, k])

    return rule


def _number_on(device: torch.device, number: Tensor | int) -> Tensor:
    """The number as a tensor there; an integer is filled in there, because a copy would be waited for."""
    return number.to(device) if isinstance(number, Tensor) else torch.full((), number, device=device)


def attention_mask(
    config: PretrainedConfig,
    keys: Layout,
    *,
    num_queries: int | None = None,
    right_window: Tensor | int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_key: bytes | None = None,
):
    """What to pass as a transformers model's `attention_mask`, in the form that its kernel takes.

    A [B, 1, Q, L] mask (boolean for SDPA, additive in `dtype` for eager), a BlockMask for FlexAttention, or a dict of
    them by layer type where the model mixes full and sliding layers. num_queries: only the last Q tokens are computed,
    the others are in the KV cache. cache_key: names the layout (`pieces.Geometry`); FlexAttention's masks of the last few
    are kept, so that batches of one layout build it once. Raises ValueError for kernels that take no such mask (flash
    attention does not).
    """
    num_queries = num_queries or keys.position_ids.shape[1]
    queries = keys.last(num_queries)
    kernel = config._attn_implementation

    def build(window: Span):
        rule = mask_rule(queries, keys, window=window, right_window=right_window)
        if kernel == "flex_attention":
            if cache_key is None or right_window is not None:
                return _block_mask(rule, keys, num_queries)
            name = (cache_key, window, keys.position_ids.device)
            if name not in _block_masks:
                if len(_block_masks) == _KEPT_MASKS:
                    del _block_masks[next(iter(_block_masks))]  # the oldest
                _block_masks[name] = _block_mask(rule, keys, num_queries)
            return _block_masks[name]
        if kernel not in _DENSE:
            raise ValueError(
                f"model.attn_implementation={kernel}: this attention pattern needs an explicit mask, which that kernel "
                "does not take; use flex_attention or sdpa"
            )
        return _dense_mask(rule, keys, num_queries, dtype if kernel == "eager" else None)

    windows = layer_windows(config)
    if isinstance(windows, dict):
        return {layer_type: build(window) for layer_type, window in windows.items()}
    return build(windows)


def _indices(batch: int, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, ...]:
    def arange(n: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = n
        return torch.arange(n, device=device).view(shape)

    return arange(batch, 0), arange(1, 1), arange(num_queries, 2), arange(num_keys, 3)


def _dense_mask(rule: Callable, keys: Layout, num_queries: int, additive: torch.dtype | None) -> Tensor:
    batch, num_keys = keys.position_ids.shape
    seen = rule(*_indices(batch, num_queries, num_keys, keys.position_ids.device))
    if additive is None:
        return seen
    lowest = max(torch.finfo(additive).min, torch.finfo(torch.float32).min)  # several models add it in float32
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill_(~seen, lowest)


def _block_mask(rule: Callable, keys: Layout, num_queries: int):
    batch, num_keys = keys.position_ids.shape
    device = keys.position_ids.device
    create = _block_mask_factory(compiled=device.type == "cuda")
    return create(rule, B=batch, H=None, Q_LEN=num_queries, KV_LEN=num_keys, device=str(device))


@cache
def _block_mask_factory(*, compiled: bool) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask

    # Uncompiled, every step of the rule is a [B, Q, L] tensor of int64: 2 GB each at 4 rows of 8192 tokens.
    return torch.compile(create_block_mask) if compiled else create_block_mask
