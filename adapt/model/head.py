"""The model's own head as a function: what it makes of hidden states, scaled and capped as it does.

Shapes: L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .parts import backbone_of


def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The model's own head as a function: hidden states [..., D] -> logits [..., V], scaled and capped as it does."""
    linear: Any = model.get_output_embeddings()
    post = after_head(model)
    return lambda hidden: post(linear(hidden))


def after_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What the model does to the logits [..., V] that its output embedding gives: scales and caps, or nothing."""
    if model not in _scales_and_caps:
        _scales_and_caps[model] = _scale_and_cap(model)
    scale, soft_cap = _scales_and_caps[model]

    def post(logits: Tensor) -> Tensor:
        if scale != 1:
            logits = logits * scale
        return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap

    return post


_scales_and_caps: WeakKeyDictionary[PreTrainedModel, tuple[float, float | None]] = WeakKeyDictionary()


def _scale_and_cap(model: PreTrainedModel) -> tuple[float, float | None]:
    """(factor of the logits, their soft cap), by sending known ones through the model's own forward.

    Configs call them logit_scale, logits_scaling (a divisor in Granite, a factor in HyperCLOVAX) and other names. No
    parameter is read, so that it works on a model whose weights are elsewhere (DeepSpeed ZeRO-3).
    """
    small, large = 2.0**-10, 1e6
    head: Any = model.get_output_embeddings()
    backbones = {backbone_of(model), model.get_decoder() or model} - {model}  # OPT's forward calls the part of a part
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # what is sent has to come back with its data
    known = torch.tensor([small, large], device=device)[None, :, None].repeat(1, 1, model.config.vocab_size)
    hidden = torch.ones(1, 2, model.config.hidden_size, device=device)
    taken: list[Tensor] = []

    def give_known(hidden: Tensor) -> Tensor:
        taken.append(hidden)
        return known

    forwards: dict[Any, Any] = {module: module.__dict__.get("forward") for module in (*backbones, head)}
    try:
        for backbone in backbones:
            backbone.forward = lambda *_, **__: _OnlyHidden(last_hidden_state=hidden)
        head.forward = give_known
        with torch.no_grad():
            logits: Any = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
    finally:
        for module, forward in forwards.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    low, high = (float(x) for x in logits[0, :, 0])
    scale = float(f"{low / small:.6g}")  # tanh is not quite linear there
    soft_cap = None if high > 0.5 * scale * large else high
    before = float(f"{float(taken[0].float().mean()):.6g}")  # MiniCPM3 scales the hidden states instead
    return scale * before, soft_cap


class _OnlyHidden(BaseModelOutputWithPast):
    """A backbone's output that has nothing else: no attentions, no router logits."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
