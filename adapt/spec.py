"""What a diffusion checkpoint was trained to be: the `diffusion` section of its config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from transformers import (
    PretrainedConfig,
)

ATTENTIONS = ("bidirectional", "block", "prefix")
CLEAN_CONTEXTS = ("block", "causal")
NOISES = ("absorbing", "hybrid", "uniform")
FORMAT_VERSION = 1
_LARGEST_BLOCK = 1 << 20  # tokens
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "attention": ((str,), "a word"),
    "mask_token_id": ((int,), "a whole number"),
    "shift_logits": ((bool,), "true or false"),
    "block_size": ((int,), "a whole number, or null"),
    "clean_context": ((str,), "a word, or null"),
    "noise": ((str,), "a word"),
    "p_uniform": ((int, float), "a number, or null"),
    "base_model": ((str,), "a name"),
    "base_revision": ((str,), "a name, or null"),
    "format_version": ((int,), "a whole number"),
}
_OPTIONAL = ("base_revision", "block_size", "clean_context", "p_uniform")


@dataclass(frozen=True)
class DiffusionSpec:
    """The `diffusion` section of config.json: what the weights were trained to be. ValueError where not valid."""

    attention: str
    """bidirectional: every token sees every token; prefix: the prompt is causal, the canvas sees prompt and canvas; block: a block
    sees itself and all before it."""
    mask_token_id: int
    shift_logits: bool = False
    """Hidden state i predicts token i+1, as the AR head was trained to (Dream, DiffuLLaMA)."""
    block_size: int | None = None
    """Tokens of a block, counted from position 0; only with block attention."""
    clean_context: str | None = None
    """How finished blocks see each other: causal (as in the base) or block (block-causal, as SDAR and serving engines do)."""
    noise: str = "absorbing"
    p_uniform: float | None = None
    """Share of random tokens at t = 1/2; only with hybrid noise, and only there in config.json."""
    base_model: str = ""
    base_revision: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, (kind, meant) in _TYPES.items():
            value = getattr(self, name)
            if not (type(value) in kind or (value is None and name in _OPTIONAL)):
                raise ValueError(f"diffusion.{name}={value!r:.60}: must be {meant}")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"diffusion.format_version={self.format_version}: this version reads {FORMAT_VERSION}; update adapt-dlm"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"diffusion.attention={self.attention}: choose one of {', '.join(ATTENTIONS)}")
        if self.attention == "block":
            if self.block_size is None or not 1 <= self.block_size <= _LARGEST_BLOCK:
                raise ValueError(
                    f"diffusion.block_size={self.block_size}: block attention needs one from 1 to {_LARGEST_BLOCK}; try 32"
                )
            if self.clean_context not in CLEAN_CONTEXTS:
                raise ValueError(
                    f"diffusion.clean_context={self.clean_context}: choose one of {', '.join(CLEAN_CONTEXTS)}"
                )
        if self.noise not in NOISES:
            raise ValueError(f"diffusion.noise={self.noise}: choose one of {', '.join(NOISES)}")
        if (self.p_uniform is None) == (self.noise == "hybrid"):
            raise ValueError(f"diffusion.p_uniform={self.p_uniform}: hybrid noise needs one, other noise has none")
        if self.p_uniform is not None and not 0 < self.p_uniform < 1:
            raise ValueError(f"diffusion.p_uniform={self.p_uniform}: must be above 0 and below 1; try 0.1")

    @staticmethod
    def of(config: PretrainedConfig, folder: str | Path) -> DiffusionSpec:
        """The section of a loaded config; ValueError if there is none or it has keys that we do not know."""
        section = getattr(config, "diffusion", None)
        if section is None:
            raise ValueError(
                f"checkpoint={folder}: its config.json has no `diffusion` section; make it one with "
                f"`adapt convert {folder} OUT`"
            )
        if not isinstance(section, dict):
            raise ValueError(
                f"checkpoint={folder}: its `diffusion` section is {section!r:.60}, not an object; convert again"
            )
        unknown = sorted(set(section) - {field.name for field in dataclasses.fields(DiffusionSpec)})
        if unknown:
            raise ValueError(f"checkpoint={folder}: unknown keys in its `diffusion` section: {', '.join(unknown)}")
        missing = sorted({"attention", "mask_token_id"} - set(section))
        if missing:
            raise ValueError(f"checkpoint={folder}: its `diffusion` section lacks {', '.join(missing)}; convert again")
        try:
            spec = DiffusionSpec(**section)
        except ValueError as error:
            raise ValueError(f"checkpoint={folder}: {error}") from error
        if spec.mask_token_id < 0:
            raise ValueError(
                f"checkpoint={folder}: diffusion.mask_token_id={spec.mask_token_id}: must be a token; convert again"
            )
        return spec

    def write_to(self, config: PretrainedConfig) -> None:
        """Puts the section into a config, with `is_causal` as the attention pattern needs it."""
        config.diffusion = dataclasses.asdict(self)
        if self.p_uniform is None:
            del config.diffusion["p_uniform"]
        if self.attention == "bidirectional":
            config.is_causal = False
