"""What is measured on: models of a given shape with random weights, and documents of exactly chosen lengths.

Timings depend on shapes alone, so nothing is downloaded. Documents are text all the same, of words that are one token each,
so that every arm reads them through its own real data path.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

END = "<|endoftext|>"
SPARE_ROWS = 8  # of the embedding, beyond the tokenizer's words: the mask token takes one, as it does in Qwen3

_QWEN3_103M = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49_153,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
_QWEN3_600M = {
    **_QWEN3_103M,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1_000_000.0,
}
_SMALL = {
    "model_type": "qwen3",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Q": _QWEN3_103M,
    "S": _SMOLLM2_135M,
    "Q600M": _QWEN3_600M,
    "small": _SMALL,
    "tiny": {**_SMALL, "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "windows": {  # of two kinds of layers, one of them with a sliding window
        **_SMALL,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 64,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


@dataclass(frozen=True)
class Workload:
    """Documents in an AR batch, the range of their lengths in tokens (end-of-text included), and whether half is a prompt."""

    batch: int
    shortest: int
    longest: int
    prompts: bool = False

    @staticmethod
    def parse(text: str) -> Workload:
        """`4x512`, `8x64-512` (uniform lengths), `8x256/prompt` (half prompt, half answer); ValueError otherwise."""
        match = re.fullmatch(r"(\d+)x(\d+)(?:-(\d+))?(/prompt)?", text)
        if match is None or int(match[1]) < 1 or not 4 <= int(match[2]) <= int(match[3] or match[2]):
            raise ValueError(
                f"workload={text}: give documents x tokens such as 4x512, 8x64-512 for mixed lengths, 8x256/prompt for "
                "prompts and answers; at least 4 tokens"
            )
        return Workload(int(match[1]), int(match[2]), int(match[3] or match[2]), bool(match[4]))

    @property
    def rows(self) -> int:
        """Packed rows of `longest` tokens that hold about as many tokens as an AR batch; rounded down, so never more."""
        return max(1, self.batch * (self.shortest + self.longest) // (2 * self.longest))


def write_model(folder: Path, shape: dict[str, Any] | Path, seed: int = 0) -> dict[str, int]:
    """Writes a causal LM whose tokenizer has one word per row; returns its sizes. shape: config settings, or a model's folder.

    Of a folder, the weights are linked and its own tokenizer is left out: with it, lengths could not be chosen.
    """
    folder.mkdir(parents=True)
    if isinstance(shape, Path):
        if not (shape / "config.json").is_file():
            raise ValueError(f"model={shape}: not a model folder (no config.json in it)")
        for file in [*shape.glob("*.safetensors"), *shape.glob("*.safetensors.index.json")]:
            (folder / file.name).symlink_to(file.resolve())
        config = AutoConfig.from_pretrained(shape, trust_remote_code=False)
    else:
        config = AutoConfig.for_model(**shape, bos_token_id=None, eos_token_id=0, pad_token_id=0)
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).save_pretrained(folder)
    words = config.vocab_size - SPARE_ROWS
    _tokenizer(words).save_pretrained(folder)
    config.eos_token_id = config.pad_token_id = 0
    config.save_pretrained(folder)
    return _sizes(config, folder) | {"words": words}


def write_documents(path: Path, workload: Workload, num_documents: int, num_words: int, seed: int = 0) -> Path:
    """A jsonl file of texts, or of prompts and completions, that tokenise to the workload's lengths with end-of-text."""
    draw = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in draw.choices(range(1, num_words), k=length))

    with path.open("w") as file:
        for _ in range(num_documents):
            length = draw.randint(workload.shortest, workload.longest) - 1
            prompt = length // 2 if workload.prompts else 0
            row = {"prompt": text(prompt), "completion": text(length - prompt)} if prompt else {"text": text(length)}
            file.write(json.dumps(row) + "\n")
    return path


def _tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    words = {END: 0} | {f"w{i}": i for i in range(1, num_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _sizes(config: PretrainedConfig, folder: Path) -> dict[str, int]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    embedding: Any = model.get_input_embeddings()
    tied = bool(config.tie_word_embeddings)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        # a tied embedding takes part in the head's product, an untied one in none
        "matmul_parameters": parameters if tied else parameters - embedding.weight.numel(),
        "vocabulary": config.vocab_size,
        "layers": config.num_hidden_layers,
        "attention_width": config.num_attention_heads
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
    }
