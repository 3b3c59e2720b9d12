"""A tiny base model, data and recipes that the training tests share; plain functions, so that launched processes use them too."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import kill_resume
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "sat",
    "ran",
    "the",
    "a",
    "on",
    "mat",
    "tree",
    ".",
]
_FILLERS = [f"w{i}" for i in range(42)]  # the probe wants more different tokens than the tests do
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def tiny_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token for each of WORDS; </s> ends a text, and with `bos` <s> is put in front of one."""
    special = ["<unk>", "</s>", "<s>", "user", "assistant"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *_FILLERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>", bos_token="<s>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_llama(vocab_size: int = 64, *, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random two-layer Llama in float32; its initial weights are large enough for the losses to differ."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def write_base(folder: Path, *, bos: bool = False, **changes) -> Path:
    """A causal LM as a Hugging Face folder."""
    tokenizer = tiny_tokenizer(bos=bos)
    tiny_llama(len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def write_pairs(path: Path, rows: int = 64, *, seed: int = 0, low: int = 2, high: int = 9) -> Path:
    """A jsonl file of prompts and completions of mixed lengths."""
    generator = random.Random(seed)
    pairs = [
        {"prompt": sentence(generator, low, high), "completion": sentence(generator, low, high)} for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def recipe_argv(base: Path, data: Path, out: Path, **overrides) -> list[str]:
    """Arguments of `adapt train`: 6 steps of 8 rows in float32; overrides are settings with __ for the dot."""
    settings = {
        "model.base": base,
        "data.train": data,
        "data.seq_len": 32,
        "training.output_dir": out,
        "training.num_steps": 6,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 8,
        "training.learning_rate": 1e-3,
        "training.precision": "fp32",
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    argv: list[str] = []
    for key, value in settings.items():
        if value is not None:
            argv += [f"--{key}", value if isinstance(value, str) else json.dumps(value, default=str).strip('"')]
    return argv


def at_step(step: int, ranks: tuple[int, ...], does: str) -> str:
    """A patch for `train_ranks`: in those ranks, where the step after `step` begins, it runs the Python line `does`."""
    return f"""
import os, psutil, signal
from adapt.training import trainer
real = trainer.DiffusionTrainer.compute_loss
def compute_loss(self, model, inputs, *args, **kwargs):
    if rank in {ranks} and self.state.global_step == {step}:
        {does}
    return real(self, model, inputs, *args, **kwargs)
trainer.DiffusionTrainer.compute_loss = compute_loss
"""


DIES = "os.kill(os.getpid(), signal.SIGKILL)"


def train_ranks(argv: list[str], log: Path, ranks: int = 2, patch: str = "") -> str:
    """Trains to the end in forked processes, a seventh of a launch's cost; what they said. `patch` is Python run in each first."""
    codes = kill_resume.finish(kill_resume.start(argv, ranks, log, patch), log)
    assert codes == [0] * ranks, log.read_text()
    return log.read_text()


def two_ranks(argv: list[str], port: int) -> subprocess.Popen[str]:
    """recipes/train.py on two CPU ranks under the deepspeed launcher; stdout and stderr in one pipe."""
    train = Path(__file__).resolve().parents[1] / "recipes" / "train.py"
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port), str(train), *argv]
    env = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"} | {"DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a launch printed; an AssertionError with it if the launch failed."""
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher takes its ranks with it
        output, _ = process.communicate()
        raise AssertionError(f"no end after 600 s:\n{output}") from None
    assert process.returncode == 0, output
    return output


def stored(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, dtype) of the tensors in a folder of one safetensors file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    """Loss of each step of a run."""
    return {line["step"]: line["loss"] for line in metrics(out)}
