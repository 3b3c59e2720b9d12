"""LoRA: low-rank adapters on the base's layers, besides which the mask token's embedding row is trained."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..files import adapters
from ..files.loading import weights_of
from .model_section import LoraConfig


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
        fan_in_fan_out=any(
            isinstance(module, Conv1D) for module in model.modules()
        ),  # GPT-2 keeps its weights transposed
        trainable_token_indices=None if mask_token_id is None else {name: [mask_token_id]},
    )
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 packs a 4-bit layer anew when it runs in eval mode on such a CPU, as a teacher or for a sample,
            # and from then on no gradient goes through it.
            module.support_avx512bf16_for_cpu = False
    weight: Any = embedding.weight
    with _gathered(weight) if hasattr(weight, "ds_id") else nullcontext(), warnings.catch_warnings():
        # peft 0.21 asks for transformers' old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules={lora.target_modules}: {error}") from error


def nf4(compute_dtype: torch.dtype):
    """How transformers is to load a base for QLoRA: linear layers but the head in NF4, computed with in `compute_dtype`.

    Block scales are themselves quantised, 4.1 bits a weight. QLoRA, arXiv:2305.14314.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def merge(
    base_folder: Path, adapter: Path, out: Path, dtype: torch.dtype, quantization: BitsAndBytesConfig | None = None
) -> None:
    """Writes the base with the adapter merged in, in float32, as a Hugging Face folder of `dtype`.

    quantization: what the adapter was trained on. It has learned to mend the rounding of the 4-bit weights, so it is merged
    into those, dequantised, and not into the originals. Raises ValueError if merged it does not compute what it does beside them.
    """
    quantized: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    model: Any = weights_of(base_folder, f"model.base={base_folder}", dtype=torch.float32, **quantized)
    if quantization is not None:
        model = model.dequantize(dtype=torch.float32)
    whole: Any = adapters.merged(model, adapter)
    whole.to(dtype).save_pretrained(out)


def _gathered(weight: torch.nn.Parameter):
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])
