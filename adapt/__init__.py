"""Turns any pretrained causal language model into a diffusion language model. Table of contents, in reading order."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint import DiffusionSpec as DiffusionSpec
    from .checkpoint import load as load
    from .conversion import convert as convert
    from .likelihood import nelbo as nelbo
    from .model import DiffusionLM as DiffusionLM
    from .objective import diffusion_loss as diffusion_loss
    from .sampler import GenerateOutput as GenerateOutput
    from .sampler import SamplerConfig as SamplerConfig
    from .trainer import train as train

_CONTENTS = {  # name -> the module that it lives in; imported on first use, so that `adapt --help` does not load torch
    "DiffusionLM": "model",
    "DiffusionSpec": "checkpoint",
    "GenerateOutput": "sampler",
    "SamplerConfig": "sampler",
    "convert": "conversion",
    "diffusion_loss": "objective",
    "load": "checkpoint",
    "nelbo": "likelihood",
    "train": "trainer",
}
__all__ = sorted(_CONTENTS)


def __getattr__(name: str):
    if name not in _CONTENTS:
        raise AttributeError(f"module 'adapt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_CONTENTS[name]}", __name__), name)
