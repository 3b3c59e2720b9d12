"""The parts of a Hugging Face model: its backbone, and its decoder layers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def backbone_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head. ValueError where transformers does not say which part that is."""
    if model.base_model is not model:
        return model.base_model
    for part in model.children():  # Llama 4's base_model_prefix names no attribute of it
        if isinstance(part, PreTrainedModel) and model.get_input_embeddings() in part.modules():
            return part
    raise ValueError(f"base={type(model).__name__}: has no base_model apart from its head, so it cannot be adapted")


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The list of config.num_hidden_layers modules that holds most of the parameters; None where there is none."""
    count = getattr(model.config, "num_hidden_layers", None)
    modules = backbone_of(model).modules()
    lists = [module for module in modules if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=None)
