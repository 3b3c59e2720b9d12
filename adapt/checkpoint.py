"""A diffusion checkpoint: an ordinary Hugging Face folder whose config.json has a `diffusion` section."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import adapters
from .model import DiffusionLM
from .probe import probe
from .shards import read_json
from .source import check_no_code

ATTENTIONS = ("bidirectional", "block", "prefix")
CLEAN_CONTEXTS = ("block", "causal")
NOISES = ("absorbing", "hybrid", "uniform")
FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"diffusion.format_version={self.format_version}: this version reads {FORMAT_VERSION}; update adapt-dlm"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"diffusion.attention={self.attention}: choose one of {', '.join(ATTENTIONS)}")
        if self.attention == "block":
            if self.block_size is None or self.block_size < 1:
                raise ValueError(
                    f"diffusion.block_size={self.block_size}: block attention needs one of at least 1; try 32"
                )
            if self.clean_context not in CLEAN_CONTEXTS:
                raise ValueError(
                    f"diffusion.clean_context={self.clean_context}: choose one of {', '.join(CLEAN_CONTEXTS)}"
                )
        if self.noise not in NOISES:
            raise ValueError(f"diffusion.noise={self.noise}: choose one of {', '.join(NOISES)}")
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
        unknown = sorted(set(section) - {field.name for field in dataclasses.fields(DiffusionSpec)})
        if unknown:
            raise ValueError(f"checkpoint={folder}: unknown keys in its `diffusion` section: {', '.join(unknown)}")
        missing = sorted({"attention", "mask_token_id"} - set(section))
        if missing:
            raise ValueError(f"checkpoint={folder}: its `diffusion` section lacks {', '.join(missing)}; convert again")
        return DiffusionSpec(**section)

    def write_to(self, config: PretrainedConfig) -> None:
        """Puts the section into a config, with `is_causal` as the attention pattern needs it."""
        config.diffusion = dataclasses.asdict(self)
        if self.p_uniform is None:
            del config.diffusion["p_uniform"]
        if self.attention == "bidirectional":
            config.is_causal = False


def is_diffusion_checkpoint(folder: str | Path) -> bool:
    """True if the folder's config.json has a `diffusion` section."""
    path = Path(folder) / "config.json"
    try:
        return path.is_file() and "diffusion" in json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download the model again") from error


def load(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> DiffusionLM:
    """The checkpoint as a DiffusionLM in eval mode, on `device` (default: CUDA if there is one).

    adapter: a PEFT folder to merge in. dtype: default is what the checkpoint was saved in. trust_remote_code: run Python files
    that come with the model. verify: run the probe, which raises ValueError if the loaded weights do not attend as the
    checkpoint promises.
    """
    # 1. Everything that can be refused before weights are read.
    folder, adapter = adapters.base_and_adapter(folder, adapter)
    check_model_folder(folder)
    if Path(folder).is_dir() and not trust_remote_code:
        check_no_code(read_json(Path(folder) / "config.json", f"checkpoint={folder}"), f"checkpoint={folder}")
    device, dtype = _device(device), _dtype(dtype)
    spec, tokenizer = spec_and_tokenizer(folder, trust_remote_code=trust_remote_code)
    # 2. The weights, all of them.
    model = _weights(folder, dtype, attn_implementation, trust_remote_code)
    if adapter is not None:
        model = adapters.merged(model, adapter)
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    if spec.mask_token_id >= (rows := len(model.get_input_embeddings().weight)):  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"checkpoint={folder}: diffusion.mask_token_id is {spec.mask_token_id}, but the embedding has {rows} rows; convert again"
        )
    # 3. The proof.
    mask_free = probe(model, spec.attention, spec.clean_context) if verify else False
    return DiffusionLM(model, tokenizer, spec, mask_free)


def spec_and_tokenizer(
    folder: str | Path, *, trust_remote_code: bool = False
) -> tuple[DiffusionSpec, PreTrainedTokenizerBase]:
    """What a checkpoint is besides its weights; ValueError where the two do not go together."""
    trusted = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **trusted)
    except OSError as error:
        if Path(folder).exists():
            raise
        raise ValueError(
            f"checkpoint={folder}: no such folder here, and the Hub does not give it; give the path of a folder with config.json"
        ) from error
    spec = DiffusionSpec.of(config, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    if tokenizer.mask_token_id != spec.mask_token_id:
        raise ValueError(
            f"checkpoint={folder}: diffusion.mask_token_id is {spec.mask_token_id}, but the tokenizer's mask token has "
            f"the id {tokenizer.mask_token_id}; keep the tokenizer files of the conversion beside the weights"
        )
    return spec, tokenizer


def _weights(
    folder: str | Path, dtype: torch.dtype | str | None, kernel: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    options = {name: value for name, value in (("dtype", dtype), ("attn_implementation", kernel)) if value is not None}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    except ImportError as error:  # a kernel of a package that is not installed
        raise ValueError(
            f"model.attn_implementation={kernel}: {error}; install it, or use sdpa or flex_attention"
        ) from error
    model, loading = loaded
    check_loaded(loading, f"checkpoint={folder}")
    return model


def check_loaded(loading: dict[str, Any], what: str) -> None:
    """Raises ValueError for a tensor that was not found: transformers only warns of it, and leaves it random."""
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise ValueError(f"{what}: no weights for {', '.join(missing[:3])}; it is not complete, or not of this model")


def check_model_folder(folder: str | Path, setting: str = "checkpoint") -> None:
    """Raises one clear ValueError, about `setting`, if `folder` is a path that holds no model. Hub ids pass."""
    path = Path(folder)
    looks_local = (
        path.is_absolute() or str(folder).startswith((".", "~")) or path.exists() or str(folder).count("/") != 1
    )
    if not looks_local:
        return
    if not path.exists():
        raise ValueError(
            f"{setting}={folder}: no such folder; give a folder with config.json and safetensors, or a Hub id "
            "(owner/name)"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{setting}={folder}: not a model folder (no config.json in it)")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"device={device}: not usable here ({reason}); use cpu, or install torch for it") from error
    return torch.device(device)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
