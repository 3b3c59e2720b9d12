"""Tiny random arms over a byte-level tokenizer, and small lm-eval tasks: everything that a comparison needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapt

SHOUT_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/shout.jsonl, train: {folder}/shout.jsonl}}}}
training_split: train
fewshot_split: train
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: "{{{{word}}}}:"
doc_to_target: "{{{{shout}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: {do_sample}, max_gen_toks: 12{more}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
LAST_YAML = """\
task: tiny_last
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/shout.jsonl}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{word}}}}:"
doc_to_target: "{{{{shout}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
CHOICE_YAML = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/shout.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}}:"
doc_to_choice: ["A", "BB", "CCC"]
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING_YAML = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/shout.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{word}}}} {{{{shout}}}}"
metric_list:
  - {{metric: bits_per_byte}}
  - {{metric: byte_perplexity}}
metadata: {{version: 1.0}}
"""


class Arms(NamedTuple):
    base: Path
    control: Path
    adapted: Path
    tasks: Path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, end-of-text and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def save_llama(folder: Path, seed: int) -> Path:
    """A random two-layer Llama, wide-ranged so that its guesses are not all alike."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # what it writes is readable, so that tests can stop at a letter
        readable = {i for i in range(256) if chr(32) < tokenizer.decode([i]) < chr(127)}
        model.lm_head.weight[[i for i in range(config.vocab_size) if i not in readable]] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    folder = tmp_path_factory.mktemp("arms")
    base, control = save_llama(folder / "base", 0), save_llama(folder / "control", 1)
    adapted = adapt.convert(base, folder / "adapted", attention="prefix")
    tasks = folder / "tasks"
    tasks.mkdir()
    words = [f"word{i}" + "x" * (i % 5) for i in range(10)]
    documents = [{"word": w, "shout": w.upper(), "gold": i % 3} for i, w in enumerate(words)]
    (tasks / "shout.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, yaml in {
        "tiny_shout": SHOUT_YAML.format(name="tiny_shout", folder=tasks, do_sample="false", more=""),
        "tiny_hot": SHOUT_YAML.format(name="tiny_hot", folder=tasks, do_sample="true", more=", temperature: 1.0"),
        "tiny_last": LAST_YAML.format(folder=tasks),
        "tiny_choice": CHOICE_YAML.format(folder=tasks),
        "tiny_rolling": ROLLING_YAML.format(folder=tasks),
    }.items():
        (tasks / f"{name}.yaml").write_text(yaml)
    return Arms(base, control, adapted, tasks)
