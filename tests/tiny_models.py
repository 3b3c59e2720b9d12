"""Tiny random causal LMs with a real tokenizer, as Hugging Face folders: what the tests convert and decode with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    StableLmConfig,
)

VOCABULARY = 300
"""Tokens of the tokenizer; Qwen3's embedding has 20 rows more, as the real one has, so that it need not grow."""
WINDOW = 3
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = ["The cat sat on the mat, and the dog ran after the cat.", "One, two, three and four: 1 2 3 4 5 6 7 8 9."]


def build_tokenizer(*extra_special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens (and the extra ones) with `<|endoftext|>` and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(_TEXT * 4, trainer)
    assert bpe.get_vocab_size() == VOCABULARY
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=128
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra_special_tokens)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def config_of(kind: str, **changes) -> PretrainedConfig:
    """The config of a model of two layers and 32 dimensions."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    of_kind = {
        "llama": lambda: LlamaConfig(**{**common, "tie_word_embeddings": False, **changes}),
        "qwen3": lambda: Qwen3Config(
            **{**common, "vocab_size": 320, "head_dim": 8, "tie_word_embeddings": True, **changes}
        ),
        "gemma3": lambda: Gemma3TextConfig(
            **{
                **common,
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "tie_word_embeddings": True,
                **changes,
            }
        ),
        "gpt2": lambda: GPT2Config(
            **{
                **gpt2,
                "vocab_size": VOCABULARY,
                "initializer_range": 0.3,
                "bos_token_id": 0,
                "eos_token_id": 0,
                **changes,
            }
        ),
        "stablelm": lambda: StableLmConfig(**{**common, "tie_word_embeddings": False, **changes}),
    }
    return of_kind[kind]()


def build_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def save_base(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **changes) -> Path:
    """A base model as the Hub has it: GPT-2 with the names of its bare backbone, Llama in several shards."""
    model = build_model(config_of(kind, **changes))
    if kind == "gpt2":
        model.config.save_pretrained(folder)
        weights = {name: tensor.contiguous() for name, tensor in model.base_model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(folder, max_shard_size="40KB" if kind == "llama" else "1GB")
    tokenizer.save_pretrained(folder)
    return folder
