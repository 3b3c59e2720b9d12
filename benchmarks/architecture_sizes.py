"""Tiny configs of every causal language model of the installed transformers: what the sweep and its test build.

Sizes are shrunk by the names of the fields, which are much alike everywhere; an architecture that needs more says so in `OVERRIDES`.
One layer of each kind is kept, and at least two.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 96
WINDOW = 3
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
OVERRIDES: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of a few thousand parameters. Raises whatever the config class does where it cannot be made."""
    cls: Any = CONFIG_MAPPING[model_type]
    plain = cls()
    known = plain.to_dict()
    sizes = {name: size for name, size in _SIZES.items() if known.get(name) is not None or name.endswith("token_id")}
    kinds = list(dict.fromkeys(getattr(plain, "layer_types", None) or []))
    if kinds:
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return cls(**sizes | OVERRIDES.get(model_type, {}))
