"""A diffusion checkpoint: an ordinary Hugging Face folder whose config.json has a `diffusion` section."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from .model import DiffusionLM
from .probe import probe

ATTENTIONS = ("bidirectional", "block", "prefix")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class DiffusionSpec:
    """The `diffusion` section of config.json: what the weights were trained to be. Raises ValueError where it is not valid."""

    attention: str
    """bidirectional: every token sees every token; prefix: the prompt is causal, the canvas sees prompt and canvas."""
    mask_token_id: int
    shift_logits: bool = False
    """Hidden state i predicts token i+1, as the AR head was trained to (Dream, DiffuLLaMA)."""
    block_size: int | None = None
    clean_context: str | None = None
    noise: str = "absorbing"
    base_model: str = ""
    base_revision: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"diffusion.format_version={self.format_version}: this version reads {FORMAT_VERSION}; update adapt-dlm"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"diffusion.attention={self.attention}: choose one of {', '.join(ATTENTIONS)}")
        if self.attention == "block":
            raise ValueError("diffusion.attention=block: not available in this version; use prefix or bidirectional")
        if self.noise != "absorbing":
            raise ValueError(f"diffusion.noise={self.noise}: this version has absorbing noise only")

    @staticmethod
    def of(config: PretrainedConfig, folder: str | Path) -> DiffusionSpec:
        """The section of a loaded config; ValueError if there is none or it has keys that we do not know."""
        section = getattr(config, "diffusion", None)
        if section is None:
            raise ValueError(
                f"checkpoint={folder}: its config.json has no `diffusion` section; make it one with `adapt convert {folder} OUT`"
            )
        unknown = sorted(set(section) - {field.name for field in dataclasses.fields(DiffusionSpec)})
        if unknown:
            raise ValueError(f"checkpoint={folder}: unknown keys in its `diffusion` section: {', '.join(unknown)}")
        return DiffusionSpec(**section)

    def write_to(self, config: PretrainedConfig) -> None:
        """Puts the section into a config, with `is_causal` as the attention pattern needs it."""
        config.diffusion = dataclasses.asdict(self)
        if self.attention == "bidirectional":
            config.is_causal = False


def is_diffusion_checkpoint(folder: str | Path) -> bool:
    """True if the folder's config.json has a `diffusion` section."""
    path = Path(folder) / "config.json"
    return path.is_file() and "diffusion" in json.loads(path.read_text())


def load(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    verify: bool = True,
) -> DiffusionLM:
    """The checkpoint as a DiffusionLM in eval mode, on `device` (default: CUDA if there is one).

    adapter: a PEFT folder to merge in. dtype: default is what the checkpoint was saved in. verify: run the probe, which
    raises ValueError if the loaded weights do not attend as the checkpoint promises.
    """
    check_model_folder(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": _dtype(dtype), "attn_implementation": attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(folder, **{k: v for k, v in options.items() if v is not None})
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model = model.to(device).eval()
    spec = DiffusionSpec.of(model.config, folder)
    mask_free = probe(model, spec.attention) if verify else False
    return DiffusionLM(model, AutoTokenizer.from_pretrained(folder), spec, mask_free)


def check_model_folder(folder: str | Path) -> None:
    """Raises one clear ValueError if `folder` is a path that holds no model. Hub ids pass."""
    path = Path(folder)
    looks_local = path.is_absolute() or str(folder).startswith((".", "~")) or path.exists() or str(folder).count("/") != 1
    if not looks_local:
        return
    if not path.exists():
        raise ValueError(f"checkpoint={folder}: no such folder; give a folder with config.json and safetensors, or a Hub id")
    if not (path / "config.json").is_file():
        raise ValueError(f"checkpoint={folder}: not a model folder (no config.json in it)")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in known:
        raise ValueError(f"dtype={dtype}: choose one of auto, {', '.join(known)}")
    return known[dtype]
