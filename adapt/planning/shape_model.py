"""A recipe's model as tensors that have shapes and dtypes and no data: what `start_model.prepared` makes, for no memory.

    model = shape_model(recipe, config, deepspeed=True)

4-bit layers and attention kernels stand in by what they keep for the backward pass, as bitsandbytes and flash kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..files.loading import empty_model
from ..files.model_config import one_line
from ..training import lora
from ..training.engine.arguments import compute_dtype
from ..training.loss.in_forward import attach_loss
from ..training.recipe import Recipe

FLASH = "footprint"
"""an attention kernel that keeps what flash kernels do (a name with flash in it would be looked up on the Hub)"""


def shape_model(recipe: Recipe, config: PretrainedConfig, *, deepspeed: bool) -> Any:
    """The model of a run as `start_model.prepared` makes it, in fake tensors: adapters, 4-bit weights, dtypes. Takes no memory."""
    ours = recipe.model
    with torch.device("meta"), no_init_weights():
        with one_line(f"model.base={ours.base}: config.json makes no model"):
            model: Any = empty_model(config, dtype=torch.float32, attn_implementation=FLASH)
        model.tie_weights()
        if ours.quantization is not None:
            _quantize(model, compute_dtype(recipe))
        attach_loss(model)
        if ours.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if ours.lora is not None:
            model = lora.add_adapters(model, ours.lora, None if recipe.objective.name == "ar" else 0)
        if deepspeed and recipe.training.precision == "bf16":
            model = model.to(torch.bfloat16)
    return without_data(model.train(), FakeTensorMode())


def without_data(model: Any, mode: FakeTensorMode) -> Any:
    """The model of the meta device as one that says it is on a CPU, which autocast and SDPA choose by; still no memory."""
    made: dict[int, Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        like = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_weight = isinstance(tensor, torch.nn.Parameter)
                        made[id(tensor)] = torch.nn.Parameter(like, tensor.requires_grad) if is_weight else like
                    tensors[name] = made[id(tensor)]
    return model


def _flash(module: torch.nn.Module, query, key, value, attention_mask, scaling=None, **_):
    """Attention that keeps what every flash kernel does, FlexAttention among them: no L x L, dropout as a seed."""
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_, **__) -> None:
    return None


AttentionInterface.register(FLASH, _flash)
AttentionMaskInterface.register(FLASH, _no_mask)


class _Nf4Linear(torch.nn.Linear):
    """What bitsandbytes' Linear4bit holds and does, in shapes: it keeps no input, and makes its weight anew in either pass."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        transposed = not isinstance(linear, torch.nn.Linear)  # GPT-2's Conv1D
        rows, columns = linear.weight.shape[::-1] if transposed else linear.weight.shape
        self.in_features, self.out_features, self.bias, self.compute_dtype = columns, rows, linear.bias, dtype
        size = rows * columns
        self.weight = torch.nn.Parameter(torch.empty(-(-size // 2), 1, dtype=torch.uint8), requires_grad=False)
        # Of 64 weights one scale in 8 bits, of 256 scales one in 32. QLoRA, arXiv:2305.14314, section 3.
        self.register_buffer("scales", torch.empty(-(-size // 64), dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-size // (64 * 256)), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        out = _Dequantized.apply(x.to(self.compute_dtype), self.out_features, self.in_features)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, columns):  # pyright: ignore
        ctx.shape = rows, columns
        return F.linear(x, x.new_empty(rows, columns))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        return grad @ grad.new_empty(ctx.shape), None, None


def _quantize(model: Any, dtype: torch.dtype) -> None:
    """Puts shapes of 4-bit layers where transformers puts bitsandbytes': every linear layer but the head."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (torch.nn.Linear, Conv1D)) and child is not head:
                setattr(parent, name, _Nf4Linear(child, dtype))
    model.requires_grad_(False)
