"""The model that a run starts from: converted if it is a causal LM, probed, loaded, wrapped in adapters, compiled."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import set_seed

from ..conversion.base_model import name_of
from ..conversion.convert import convert
from ..files import marks
from ..files.json_file import read_json
from ..files.loading import check_weights, config_of, empty_model, tokenizer_of, weights_of
from ..files.model_folder import check_model_folder, diffusion_section, is_diffusion_checkpoint
from ..files.provenance import first_change, model_files
from ..lm import load
from ..model.kernels import default_kernel, no_flex_attention
from ..model.parts import decoder_layers
from ..spec import DiffusionSpec
from . import lora
from .engine.arguments import compute_dtype, whole_weights
from .loss.in_forward import attach_loss
from .recipe import Recipe

_NOTE = "converted_from.json"


def check_base(recipe: Recipe) -> None:
    base = recipe.model.base
    if not base.endswith(".gguf"):
        check_model_folder(base, "model.base")
    if Path(base).is_dir():
        _config(base, base)
    section = diffusion_section(base)
    if recipe.objective.name == "ar" and isinstance(section, dict) and section.get("attention") == "bidirectional":
        raise ValueError(
            f"objective.name=ar: model.base={base} is a bidirectional diffusion checkpoint, which a plain load does not run "
            f"causally; give the causal LM that it came from ({section.get('base_model')})"
        )


def _config(folder: str | Path, base: str) -> PretrainedConfig:
    return config_of(folder, f"model.base={base}", todo="train a model of transformers' own architectures")


def check_it_can_be_saved(tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """ValueError where the tokenizer loads and cannot be written, such as one with a path for a chat template's name."""
    with tempfile.TemporaryDirectory(prefix="adapt-tokenizer-") as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # of Rust, Jinja or JSON
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"model.base={base}: its tokenizer cannot be saved again ({reason}); mend it there"
            ) from error


def attention_kernel(recipe: Recipe, config: PretrainedConfig, device: str | None = None) -> str:
    """The recipe's model.attn_implementation, or what is fastest for that model on the device (cuda, cpu; None: this machine's).

    Raises ValueError for FlexAttention where it does not train that model, or on a CPU.
    """
    asked = recipe.model.attn_implementation
    if asked == "flex_attention" and (obstacle := no_flex_attention(config)):
        raise ValueError(
            f"model.attn_implementation=flex_attention: {obstacle}; use eager, sdpa or sdpa_pieces, or leave it out"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "flex_attention" and device == "cpu":
        raise ValueError(
            "model.attn_implementation=flex_attention: has no backward pass on a CPU, and torch sees no GPU here; leave it out"
        )
    return asked or default_kernel(config, device, compiled=recipe.model.torch_compile)


def probe_kernel(recipe: Recipe, config: PretrainedConfig) -> str:
    """The kernel that the checkpoint is probed with on the CPU: the run's own, or instead of FlexAttention the CPU's fastest.

    torch 2.13 writes C++ for FlexAttention on a CPU that does not compile; `benchmarks/gpu.py` proves the GPU's kernel.
    """
    kernel = attention_kernel(recipe, config)
    return default_kernel(config, "cpu") if kernel == "flex_attention" else kernel


def diffusion_checkpoint(recipe: Recipe, output_dir: Path, is_main: bool) -> Path:
    """The folder to train from. Rank 0 converts or probes; the others come after it and read what it left."""
    base = recipe.model.base
    if recipe.objective.name == "ar":  # the control arm: the causal LM as it is
        if is_main:
            check_weights(base, f"model.base={base}")
        return Path(base)
    if is_diffusion_checkpoint(base):
        _check_same_spec(recipe, Path(base), "is a diffusion checkpoint with {}; leave the setting out, or say that")
        if is_main:
            load(base, device="cpu", attn_implementation=probe_kernel(recipe, _config(base, base)))
        return Path(base)
    converted = output_dir / "converted"
    if is_main and os.path.lexists(converted):
        _check_same_base(base, converted)
    elif is_main:
        convert(
            base,
            converted,
            attention=recipe.model.attention or "prefix",
            block_size=recipe.model.block_size,
            clean_context=recipe.model.clean_context,
            noise=recipe.noise.kind,
            p_uniform=recipe.noise.p_uniform if recipe.noise.kind == "hybrid" else None,
            mask_token=recipe.model.mask_token,
            shift_logits=bool(recipe.model.shift_logits),
            attn_implementation=partial(probe_kernel, recipe),
        )
    if is_main and (marks.is_as_written(output_dir, _NOTE) or not os.path.lexists(converted.with_name(_NOTE))):
        _note_base(base, converted)
    what = "was converted earlier with {}; remove it, or choose another training.output_dir"
    _check_same_spec(recipe, converted, what)
    return converted


def _note_base(base: str, converted: Path) -> None:
    """Writes beside `converted` what it is made of."""
    marks.write(converted.parent, _NOTE, json.dumps({"base": base, "files": model_files(base)}, indent=1) + "\n")


def _check_same_base(base: str, converted: Path) -> None:
    """ValueError where `converted` was made of something else, by content where the base lies here and by id where on the Hub, or
    where it has been changed since.

    So a base that was moved is the same, and other weights under its path are not.
    """
    way_out = "remove it, or choose another training.output_dir"
    note = converted.with_name(_NOTE)
    if not is_diffusion_checkpoint(converted):
        raise ValueError(
            f"training.output_dir={converted.parent}: {converted.name}/ there is no conversion of ours; move it"
        )
    if changed := marks.changed_since_written(converted):
        raise ValueError(
            f"model.base={base}: {converted} was converted earlier, and its {changed} has changed since; {way_out}"
        )
    if not note.is_file():  # from before there were notes, or a kill came between
        spec = DiffusionSpec.of(_config(converted, base), converted)
        before, now = {"base": spec.base_model, "files": {}}, {}
        is_same = spec.base_model in (base, name_of(base))
    else:
        before, now = read_json(note, f"training.output_dir={converted.parent}"), model_files(base)
        if not isinstance(before.get("files"), dict) or not isinstance(before.get("base"), str):
            raise ValueError(
                f"training.output_dir={converted.parent}: {_NOTE} does not say what converted/ is made of; {way_out}"
            )
        is_same = before["files"] == now and (bool(now) or before["base"] == base)
    if is_same:
        return
    changed = f", where {first_change(before['files'], now)} has changed since" if before["base"] == base else ""
    raise ValueError(f"model.base={base}: {converted} was converted earlier from {before['base']}{changed}; {way_out}")


def _check_same_spec(recipe: Recipe, folder: Path, what: str) -> DiffusionSpec:
    """The folder's spec; ValueError where the recipe says otherwise. `what` says what to do, with {} for what was found."""
    ours = recipe.model
    spec = DiffusionSpec.of(_config(folder, ours.base), folder)
    clean_context = ours.clean_context or ("causal" if ours.attention == "block" else None)
    wanted: dict[str, tuple[object, object]] = {
        "model.attention": (ours.attention or spec.attention, spec.attention),
        "model.block_size": (ours.block_size or spec.block_size, spec.block_size),
        "model.clean_context": (clean_context or spec.clean_context, spec.clean_context),
        "model.shift_logits": (
            spec.shift_logits if ours.shift_logits is None else ours.shift_logits,
            spec.shift_logits,
        ),
        "noise.kind": (recipe.noise.kind, spec.noise),
    }
    if recipe.noise.kind == "hybrid":
        wanted["noise.p_uniform"] = (recipe.noise.p_uniform, spec.p_uniform)
    if ours.mask_token is not None:
        wanted["model.mask_token"] = (ours.mask_token, tokenizer_of(folder, f"model.base={ours.base}").mask_token)
    for setting, (value, found) in wanted.items():
        if value != found:
            raise ValueError(f"{setting}={value}: {folder} {what.format(found)}")
    # What the recipe leaves to the checkpoint has to go with the rest of it.
    model = dataclasses.replace(
        ours, attention=spec.attention, block_size=spec.block_size, clean_context=spec.clean_context
    )
    dataclasses.replace(recipe, model=model)
    return spec


def prepared(folder: Path, recipe: Recipe, spec: DiffusionSpec, args: TrainingArguments):
    """The model with its loss attached, wrapped in adapters and compiled as the recipe says."""
    ours = recipe.model
    _size_nvme_buffers(args, folder)
    options: dict[str, Any] = {"attn_implementation": attention_kernel(recipe, _config(folder, ours.base))}
    if ours.quantization is not None:
        options["quantization_config"] = lora.nf4(compute_dtype(recipe))
    model = weights_of(folder, f"model.base={ours.base}", dtype=torch.float32, **options)
    model.config.use_cache = False
    # Some models ship a generation config that transformers refuses to write again; the base's file is copied at the end.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    attach_loss(model)
    if ours.gradient_checkpointing:
        # transformers 5.23 deprecates the name that 5.2 knows
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if ours.torch_compile:
        _compile_layers(model)
    if ours.lora is None:
        return model
    set_seed(recipe.training.seed)  # the same adapters, whatever drew random numbers before
    with whole_weights(args):
        return lora.add_adapters(model, ours.lora, None if recipe.objective.name == "ar" else spec.mask_token_id)


def _size_nvme_buffers(args: TrainingArguments, folder: Path) -> None:
    """Makes the swap buffers hold the largest weight of the model; DeepSpeed's 100M elements are less than many embeddings."""
    if args.deepspeed is None:
        return
    config = args.hf_deepspeed_config.config
    section = config.get("zero_optimization", {}).get("offload_param") or {}
    if section.get("device") != "nvme" or "buffer_size" in section:
        return
    with whole_weights(args), torch.device("meta"):
        model = empty_model(_config(folder, str(folder)))
    largest = max(weight.numel() for weight in model.parameters())
    section["buffer_size"] = -(-largest // args.world_size)


def _compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer: they share one compilation, seconds instead of the minutes of the whole model."""
    layers = decoder_layers(model)
    if layers is None:
        raise ValueError(
            f"model.torch_compile=true: found no list of {model.config.num_hidden_layers} decoder layers in {type(model).__name__}"
        )
    for layer in layers:
        layer.compile(dynamic=False)  # rows are padded to seq_len, so there is one shape
