"""Which attention kernel a model runs with, by what transformers trains it with and on which device."""

from __future__ import annotations

import copy
import inspect
from typing import NoReturn

import torch
from torch._C import DispatchKey
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_op
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..attention.sdpa_pieces import NAME as PIECES
from ..attention.windows import layer_windows
from .parts import backbone_of

_SMALLEST_HEAD = 16  # dimensions; FlexAttention's GPU kernels multiply tiles of no less


def default_kernel(config: PretrainedConfig, device: str, *, compiled: bool = False) -> str:
    """The fastest kernel that the model of this config trains with on the device (cuda, cpu), its layers compiled or not."""
    if device == "cuda" and no_flex_attention(config) is None:
        return "flex_attention"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(model_class, "_supports_sdpa", True):
        return "eager"
    return "sdpa" if compiled or (model_class is not None and not _takes_pieces(config)) else PIECES


class _ArrivedError(Exception):
    """The attention function has got the pieces."""


class _Pieces(dict):
    def __iter__(self) -> NoReturn:
        raise _ArrivedError


def _takes_pieces(config: PretrainedConfig) -> bool:
    """Whether the model hands what `sdpa_pieces` needs on to its attention (StableLM's does not), asked without weights."""
    windows = layer_windows(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=PIECES, trust_remote_code=False
            )
            tokens, mask = torch.zeros(1, 2, dtype=torch.long), torch.empty(1, 1, 0, 0)
        backbone = backbone_of(model)
        inputs = {"attention_mask": dict.fromkeys(windows, mask) if isinstance(windows, dict) else mask}
        if "position_ids" in inspect.signature(backbone.forward).parameters:
            inputs["position_ids"] = tokens
        backbone(input_ids=tokens, **inputs, pieces=_Pieces(), use_cache=False)
    except (
        _ArrivedError,
        NotImplementedError,
    ):  # JetMoE's router asks for data before its attention comes; most do take them
        return True
    except (
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # Falcon knows two kernels; Doge adds to the mask, which is empty
        return False
    return False


def _casts_under_autocast() -> bool:
    """Whether FlexAttention casts its inputs as SDPA does: rotary positions leave queries and keys in float32, values in bf16."""
    return DispatchKey.AutocastCUDA in flex_attention_op.py_kernels


def _smallest_head(config: PretrainedConfig) -> int:
    """Dimensions of a head, the fewest of queries and values (MLA has two); FlexAttention's size where the config tells none."""
    sizes = [size for name in ("qk_head_dim", "v_head_dim") if isinstance(size := getattr(config, name, None), int)]
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not sizes and isinstance(size := getattr(config, "head_dim", None), int):
        sizes = [size]
    elif not sizes and isinstance(width, int) and isinstance(heads, int):
        sizes = [width // heads]
    return min(sizes, default=_SMALLEST_HEAD)


def no_flex_attention(config: PretrainedConfig) -> str | None:
    """Why FlexAttention does not train the model on a GPU; None if it does."""
    if (obstacle := _not_in_transformers(config)) is not None:
        return obstacle
    if (size := _smallest_head(config)) < _SMALLEST_HEAD:
        return f"it takes heads of {_SMALLEST_HEAD} dimensions or more, and the base's have {size}"
    if not _casts_under_autocast():
        return (
            f"torch {torch.__version__} refuses what bf16 autocast hands it, or computes it in float32; upgrade torch"
        )
    return None


def _not_in_transformers(config: PretrainedConfig) -> str | None:
    """Why transformers does not train the model with FlexAttention, whatever its sizes; None if it does."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(model_class, "_supports_flex_attn", True):
        return f"transformers' {config.model_type} does not run with it"
    # attention_dropout, attn_pdrop, attention_probs_dropout_prob: every architecture has its own name.
    rates = {name: value for name, value in config.to_dict().items() if "att" in name and "drop" in name}
    dropout = next((name for name, value in rates.items() if isinstance(value, float) and value > 0), None)
    return dropout and f"it takes no dropout, and the base's config.json has {dropout}={rates[dropout]}"
