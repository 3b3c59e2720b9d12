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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

PADDING_DOCUMENT = 0  # document ids of real tokens start at 1
_KEPT_MASKS = 8
_block_masks: dict[tuple, Any] = {}
_SPAN_FIELDS = {"chunked_attention": "attention_chunk_size", "sliding_attention": "sliding_window"}
_DENSE = ("eager", "sdpa", "sdpa_pieces")


class Chunk(NamedTuple):
    """Attention inside chunks of `size` tokens, counted from the start of the document (Llama 4)."""

    size: int


Span = int | Chunk | None
"""How far a layer sees: a sliding window in tokens, a chunk, or everything (None)."""


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


def layer_windows(config: PretrainedConfig) -> dict[str, Span] | Span:
    """How far the layers see (None = everything): of each layer type, or of all layers where there is one kind.

    Raises ValueError for layers that no mask can make bidirectional (recurrent, linear, convolution).
    """
    layer_types: list[str] = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    foreign = sorted({kind for kind in layer_types if kind not in ("full_attention", *_SPAN_FIELDS)})
    if foreign:
        layers = [i for i, kind in enumerate(layer_types) if kind in foreign]
        listed = str(layers) if len(layers) <= 8 else f"{str(layers[:8])[:-1]}, ... {layers[-1]}]"
        raise ValueError(
            f"base={config.model_type}: layers {listed} are {', '.join(foreign)}, for which a mask does not decide who sees "
            "whom (recurrent, convolution, compressed, indexed); choose a model whose layers are all full, sliding or "
            "chunked attention"
        )
    if getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"base={config.model_type}: none of its layers is attention; choose a transformer model")
    if not set(_SPAN_FIELDS).intersection(layer_types):
        # Mistral has no layer_types: a window there is on every layer.
        return None if layer_types else _span(config, "sliding_attention")
    spans: dict[str, Span] = {}
    for kind in sorted(set(layer_types)):
        spans[kind] = None if kind == "full_attention" else _span(config, kind)
        if kind != "full_attention" and spans[kind] is None:
            raise ValueError(f"base={config.model_type}: config.layer_types has {kind} but no {_SPAN_FIELDS[kind]}")
    return spans


def _span(config: PretrainedConfig, kind: str) -> Span:
    size = getattr(config, _SPAN_FIELDS[kind], None)
    return Chunk(size) if kind == "chunked_attention" and size is not None else size


@contextmanager
def short_spans(model: PreTrainedModel, size: int) -> Iterator[None]:
    """Inside, the sliding windows and chunks of the model are `size` tokens, so that a short text shows them at work.

    transformers reads them from the config at every forward, as we do.
    """
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    changed = [
        (config, field, getattr(config, field))
        for config in configs.values()
        for field in _SPAN_FIELDS.values()
        if isinstance(getattr(config, field, None), int)
    ]
    try:
        for config, field, _ in changed:
            setattr(config, field, size)
        yield
    finally:
        for config, field, before in changed:
            setattr(config, field, before)


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
