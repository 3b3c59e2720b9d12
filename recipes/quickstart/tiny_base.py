"""The base model of `adapt quickstart --fast`: random weights, so small that every step takes seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapt.files.marks import publish_marked
from adapt.files.outputs import scratch_beside


def write_tiny_base(base: Path, text: str) -> None:
    """Writes a random Llama of 0.1 M parameters, with a tokenizer trained on `text`, as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.token_to_id(special[0]),
            pad_token_id=tokenizer.token_to_id(special[0]),
            bos_token_id=None,
        )
    )
    with scratch_beside(base) as scratch:
        model.save_pretrained(scratch / "base")
        wrapped.save_pretrained(scratch / "base")
        publish_marked(scratch / "base", base)
