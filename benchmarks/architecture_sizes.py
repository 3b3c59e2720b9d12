"""Tiny configs of every causal language model of the installed transformers: what the sweep and its test build.

Sizes are shrunk by the names of the fields, which are much alike everywhere; an architecture that needs more says so in `OVERRIDES`.
Two layers of each kind are kept where there is one kind, one of each where there are several.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 96
SPAN = 3
"""Tokens of a sliding window or chunk."""
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "dim_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), SPAN),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    "rotary_dim": 4,
    "use_cache": False,
    "is_decoder": True,
}
_SET_WHERE_NONE = ("head_dim", "n_routed_experts", "num_experts_per_tok", "num_key_value_heads", "n_shared_experts")
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": SPAN}
_CONV_AND_FULL = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        **_SLIDING_AND_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "dots1": {"moe_intermediate_size": 48, "n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
    "gemma4_text": {"global_head_dim": 8, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": SPAN},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "lfm2": _CONV_AND_FULL,
    "lfm2_moe": _CONV_AND_FULL,
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {
        "head_dim": 8,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 48,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "minicpm3": {"dim_model_base": 16},
    "mixtral": {"sliding_window": SPAN},
    "phi3": {"sliding_window": SPAN},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": 48,
    },
    "qwen3_moe": {"sliding_window": SPAN, "use_sliding_window": True},
    "starcoder2": {"sliding_window": SPAN},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of a few thousand parameters. Raises whatever the config class does where it cannot be made."""
    cls: Any = CONFIG_MAPPING[model_type]
    more = OVERRIDES.get(model_type, {})
    try:
        plain = cls()
    except Exception:  # Gemma 4's assistant has no default that it accepts
        plain = cls(**more)
    known = plain.to_dict()
    sizes = {
        name: size
        for name, size in _SIZES.items()
        if known.get(name) is not None or (name in known and name in _SET_WHERE_NONE)
    }
    if "qk_rope_head_dim" in known:  # its head_dim is made of others
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not isinstance(known.get(name), int) or known[name] >= VOCABULARY or known[name] < 0:
            sizes[name] = None if known.get(name) is None else 1
    kinds = list(dict.fromkeys(known.get("layer_types") or []))
    if kinds:
        if kinds == ["full_attention"]:
            windowed = known.get("sliding_window") is not None or "use_sliding_window" in known
            kinds = ["sliding_attention" if windowed else "full_attention", *kinds]
            sizes |= {"sliding_window": SPAN, "use_sliding_window": True} if windowed else {}
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return cls(**sizes | more)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, fewer than the models have rows: real vocabularies are padded too."""
    words = ["<|endoftext|>", *(f"w{i}" for i in range(VOCABULARY - 7))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
