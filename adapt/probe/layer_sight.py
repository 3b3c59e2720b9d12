"""Who sees whom in each layer of a loaded model, exactly, from gradients.

Edits of a token show what reaches a query through all layers together: one layer with a wrong mask hides behind another that
sees more, and in a model that was just initialised, or in bfloat16, what a token moves may drown in rounding. Gradients have
neither fault. A masked key has attention weight exactly zero, so a layer's output has gradient exactly zero with respect to it; a key
that is seen has one that is not zero, however small. So the criterion needs no tolerance, and no dtype or scale changes it.
Shapes: B rows, L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.parts import decoder_layers


class Sight(NamedTuple):
    """What one call of a layer showed."""

    index: int
    """of the layer in the model"""
    layer: str
    """name of its class"""
    sees: Tensor
    """[L, L] of bool: query, key"""


def layer_sight(model: PreTrainedModel, forward: Callable[[], Any], length: int) -> list[Sight]:
    """Who sees whom in each layer that `forward` calls, in the order of the calls; on `length` rows of one layout, or more.

    Row r asks for the gradient of token r. Every layer starts from hidden states of its own, so that only its own attention
    counts; a layer that takes keys and values from an earlier one (shared KV) is asked about that one's hidden states. Memory:
    the activations of one layer. Raises ValueError where the layers cannot be told apart.
    """
    layers = _layers(model)
    seen: list[Sight] = []
    inputs: list[Tensor] = []
    rows = torch.arange(length, device=model.device)
    direction: Tensor | None = None

    def separate(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        leaf = hidden.detach().requires_grad_()
        inputs.append(leaf)
        fresh = leaf.clone()  # some layers add to their input in place
        return ((fresh, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fresh})

    def ask(layer: nn.Module, _args: tuple, _kwargs: dict, outputs: Any) -> Any:
        nonlocal direction
        output: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        if (
            output.dim() < 3
            or output.shape[-3] < length
            or output.shape[-2] != length
            or output.shape[-1] != inputs[-1].shape[-1]
        ):
            raise ValueError(f"base={type(model).__name__}: its layers do not hand on hidden states [.., B, L, D]")
        if direction is None:
            generator = torch.Generator().manual_seed(0)
            direction = torch.randn(output.shape[-1], generator=generator).to(output)
        own = output[..., rows, rows, :]
        (gradients, *others) = torch.autograd.grad(
            (own * direction).sum(), [inputs[-1], *inputs[:-1]], retain_graph=True, allow_unused=True
        )
        sees = _moved(gradients, length)
        if not (sees & ~torch.eye(length, dtype=torch.bool, device=sees.device)).any():
            sees = torch.stack([sees, *(_moved(g, length) for g in others if g is not None)]).any(0)
        seen.append(Sight(layers[layer], type(layer).__name__, sees))
        return (output.detach(), *outputs[1:]) if isinstance(outputs, tuple) else output.detach()

    hooks = [layer.register_forward_pre_hook(separate, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(ask, with_kwargs=True) for layer in layers]
    try:
        with torch.enable_grad(), _frozen(model):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _layers(model: PreTrainedModel) -> dict[nn.Module, int]:
    """{layer: its index}."""
    layers = decoder_layers(model)
    if layers is None:
        raise ValueError(
            f"base={type(model).__name__}: has no list of its {getattr(model.config, 'num_hidden_layers', None)} layers, so what "
            "each of them sees cannot be shown"
        )
    return {layer: index for index, layer in enumerate(layers)}


def _moved(gradients: Tensor | None, length: int) -> Tensor:
    assert gradients is not None, "the layer's output does not depend on its input"
    flat = gradients.movedim((-3, -2), (0, 1))[:length].reshape(length, length, -1)
    return (flat != 0).any(-1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for its gradient, which would be as large as the model."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
