"""How far each layer sees: everything, a sliding window, or a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

_SPAN_FIELDS = {"chunked_attention": "attention_chunk_size", "sliding_attention": "sliding_window"}


class Chunk(NamedTuple):
    """Attention inside chunks of `size` tokens, counted from the start of the document (Llama 4)."""

    size: int


Span = int | Chunk | None
"""How far a layer sees: a sliding window in tokens, a chunk, or everything (None)."""


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
