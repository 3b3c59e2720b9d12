"""Turns any pretrained causal language model into a diffusion language model. Table of contents, in reading order."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .conversion.convert import convert as convert
    from .decoding.likelihood import nelbo as nelbo
    from .decoding.sampler import GenerateOutput as GenerateOutput
    from .decoding.settings import SamplerConfig as SamplerConfig
    from .lm import DiffusionLM as DiffusionLM
    from .lm import load as load
    from .objective import diffusion_loss as diffusion_loss
    from .spec import DiffusionSpec as DiffusionSpec
    from .training.train import train as train

_CONTENTS = {  # name -> the module that it lives in; imported on first use, so that `adapt --help` does not load torch
    "DiffusionLM": "lm",
    "DiffusionSpec": "spec",
    "GenerateOutput": "decoding.sampler",
    "SamplerConfig": "decoding.settings",
    "convert": "conversion.convert",
    "diffusion_loss": "objective",
    "load": "lm",
    "nelbo": "decoding.likelihood",
    "train": "training.train",
}
_MODULES = ("noise", "objective")  # whose functions are public as adapt.noise.q_sample and the like
__all__ = sorted([*_CONTENTS, *_MODULES])


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _CONTENTS:
        raise AttributeError(f"module 'adapt' has no attribute {name!r}")
    return getattr(import_module(f".{_CONTENTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
