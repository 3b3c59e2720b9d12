"""LoRA: low-rank adapters on the base's layers, besides which the mask token's embedding row is trained."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .config import LoraConfig


def add_adapters(model: PreTrainedModel, lora: LoraConfig, mask_token_id: int | None):
    """The model as a PeftModel; mask_token_id: whose embedding row is trained (None: the AR objective has no such token).

    Raises ValueError for target_modules that the model does not have. Under ZeRO-3 it is to be called while transformers has
    no DeepSpeed config set: peft's own way to read a scattered embedding row works on CUDA only (peft 0.21).
    """
    import peft

    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rsplit(".", 1)[-1]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        trainable_token_indices=None if mask_token_id is None else {name: [mask_token_id]},
    )
    weight: Any = embedding.weight
    with _gathered(weight) if hasattr(weight, "ds_id") else nullcontext():
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules={lora.target_modules}: {error}") from error


def merge(base_folder: Path, adapter: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes the base with the adapter merged in, in float32, as a Hugging Face folder of `dtype`."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.to(dtype).save_pretrained(out)


def _gathered(weight: torch.nn.Parameter):
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])
