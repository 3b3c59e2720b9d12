"""The settings of a recipe's model: what it starts from, how it attends, and whether all of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..settings.bounds import Bounds, Tokens, check_settings, one_of
from ..spec import check_attention

_Rank = Annotated[int, Bounds(1, 2**16)]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning; the mask token's embedding row is trained besides."""

    r: _Rank = 16
    """rank"""
    alpha: _Rank = 32
    """scale; the update is alpha / r"""
    dropout: Annotated[float, Bounds(0, 1, high_is_open=True)] = 0.0
    """probability"""
    target_modules: str | list[str] = "all-linear"
    """names of the adapted layers, as peft takes them"""

    def __post_init__(self) -> None:
        check_settings(self, "model.lora")


@dataclass(frozen=True)
class ModelConfig:
    base: str
    """Hub id, folder, or .gguf file; a diffusion checkpoint is trained on as it is, a causal LM is converted first"""
    attention: str | None = None
    """bidirectional, block or prefix. None = a diffusion checkpoint's own; a causal LM is converted to prefix"""
    block_size: Tokens | None = None
    """tokens refined together, which attention=block needs; blocks are counted from the start of the text"""
    clean_context: str | None = None
    """how finished blocks see each other: causal (as in the base; the default of block) or block; used at conversion"""
    shift_logits: bool | None = None
    """hidden state i predicts token i+1, as the AR head was trained to. None = a diffusion checkpoint's own; else false"""
    mask_token: str | None = None
    """default: a reserved unused special token, else a new <|mask|>; used at conversion"""
    attn_implementation: str | None = None
    """flex_attention (GPU); sdpa_pieces: SDPA on the parts of the pattern that are seen; sdpa and eager: a dense mask. None =
    flex_attention on a GPU, where transformers trains the model with it; else sdpa_pieces, or sdpa with torch_compile and where the
    model does not take the pieces, or eager where transformers knows no other"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a quarter slower"""
    torch_compile: bool = False
    """compile the decoder layers, and pad every row to seq_len so that they have one shape"""
    lora: LoraConfig | None = None
    """None = full fine-tuning"""
    quantization: str | None = None
    """nf4: the frozen base is held in 4 bits and model.lora is trained on it (QLoRA, bitsandbytes)"""

    def __post_init__(self) -> None:
        check_settings(self, "model")
        check_attention(self.attention, self.block_size, self.clean_context, "model.")
        if self.attn_implementation is not None:
            kernels = ("eager", "flex_attention", "sdpa", "sdpa_pieces")
            one_of("model.attn_implementation", self.attn_implementation, kernels)
        if self.torch_compile and self.attn_implementation == "sdpa_pieces":
            raise ValueError(
                "model.attn_implementation=sdpa_pieces: its pieces change from batch to batch, each a compilation; with "
                "model.torch_compile=true use flex_attention or sdpa"
            )
        if self.quantization is None:
            return
        one_of("model.quantization", self.quantization, ("nf4",))
        if self.lora is None:
            raise ValueError(
                "model.quantization=nf4: 4-bit weights cannot be trained themselves; set model.lora, such as {r: 16}"
            )
        if self.torch_compile:
            raise ValueError("model.quantization=nf4: does not go with model.torch_compile=true; set one of them back")
