"""What a diffusion checkpoint was trained to be: the `diffusion` section of its config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .settings.bounds import Bounds, MayBeEmpty, Share, check_settings, one_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTIONS = ("bidirectional", "block", "prefix")
CLEAN_CONTEXTS = ("block", "causal")
NOISES = ("absorbing", "hybrid", "uniform")
DTYPE_NAMES = ("bfloat16", "float16", "float32")
FORMAT_VERSION = 1


def check_attention(
    attention: str | None, block_size: int | None, clean_context: str | None, section: str = ""
) -> None:
    """ValueError unless the three settings, called `section` and their name, go together; attention None = a checkpoint's own."""
    if attention is not None:
        one_of(f"{section}attention", attention, ATTENTIONS)
    if clean_context is not None:
        one_of(f"{section}clean_context", clean_context, CLEAN_CONTEXTS)
    for name, value in (("block_size", block_size), ("clean_context", clean_context)):
        if value is not None and attention != "block":
            raise ValueError(f"{section}{name}={value}: belongs to {section}attention=block; set that, or leave it out")
    if attention == "block" and block_size is None:
        raise ValueError(f"{section}block_size=None: {section}attention=block needs one; try 16 or 32")


@dataclass(frozen=True)
class DiffusionSpec:
    """The `diffusion` section of config.json: what the weights were trained to be. ValueError where not valid."""

    attention: str
    """bidirectional: every token sees every token; prefix: the prompt is causal, the canvas sees prompt and canvas; block: a block
    sees itself and all before it."""
    mask_token_id: Annotated[int, Bounds(-1, 2**31 - 1)]
    shift_logits: bool = False
    """Hidden state i predicts token i+1, as the AR head was trained to (Dream, DiffuLLaMA)."""
    block_size: Annotated[int, Bounds(1, 2**20)] | None = None
    """Tokens of a block, counted from position 0; only with block attention."""
    clean_context: str | None = None
    """How finished blocks see each other: causal (as in the base) or block (block-causal, as SDAR and serving engines do)."""
    noise: str = "absorbing"
    p_uniform: Share | None = None
    """Share of random tokens at t = 1/2; only with hybrid noise, and only there in config.json."""
    base_model: MayBeEmpty = ""
    base_revision: str | None = None
    format_version: Annotated[int, Bounds(0, 10**6)] = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_settings(self, "diffusion")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"diffusion.format_version={self.format_version}: this version reads {FORMAT_VERSION}; update adapt-dlm"
            )
        check_attention(self.attention, self.block_size, self.clean_context, "diffusion.")
        if self.attention == "block":
            one_of("diffusion.clean_context", self.clean_context, CLEAN_CONTEXTS)
        one_of("diffusion.noise", self.noise, NOISES)
        if (self.p_uniform is None) == (self.noise == "hybrid"):
            raise ValueError(f"diffusion.p_uniform={self.p_uniform}: hybrid noise needs one, other noise has none")

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
