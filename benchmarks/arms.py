"""The arms: plain transformers.Trainer as its users write it, and ours as a recipe runs it. A new arm is a new line.

Ours is `adapt.training.train.train` itself, and only a callback of transformers' own (worker.py) stands in the loop, so that what is
timed is what users get.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from shapes import Workload

PLAIN: dict[str, dict[str, Any]] = {  # overrides of TrainingArguments
    "ar": {},
    "ar_grouped": {"train_sampling_strategy": "group_by_length"},
}
OURS: dict[str, dict[str, Any]] = {  # overrides of a recipe
    "control": {"objective.name": "ar"},
    "bidirectional": {"model.attention": "bidirectional"},
    "bidirectional_compiled": {
        "model.attention": "bidirectional",
        "model.torch_compile": True,
    },
    "bidirectional_checkpointed": {"model.attention": "bidirectional", "model.gradient_checkpointing": True},
    "prefix": {"model.attention": "prefix"},
    "block32": {"model.attention": "block", "model.block_size": 32},
    "block32_checkpointed": {
        "model.attention": "block",
        "model.block_size": 32,
        "model.gradient_checkpointing": True,
    },
    "block32_ar": {"model.attention": "block", "model.block_size": 32, "objective.ar_weight": 1.0},
}
ARMS = (*PLAIN, *OURS)
LEARNING_RATE = 1e-4


def run_plain(
    base: Path, documents: Path, workload: Workload, overrides: dict[str, Any], out: Path, steps: int
) -> None:
    """AR fine-tuning as a user of transformers writes it: padded batches, loss over all logits, fused AdamW, bf16 autocast."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    end = tokenizer.eos_token_id

    def tokenise(row: dict) -> dict:
        prompt = tokenizer(row["prompt"])["input_ids"] if workload.prompts else []
        target = [*tokenizer(row["completion" if workload.prompts else "text"])["input_ids"], end]
        return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}

    rows = load_dataset("json", data_files=str(documents), split="train", cache_dir=str(out / "cache"))
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=workload.batch,
        learning_rate=LEARNING_RATE,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **overrides,
    )
    args._n_gpu = min(args.n_gpu, 1)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    Trainer(
        model,
        args,
        train_dataset=rows.map(tokenise, remove_columns=rows.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    ).train()


def run_ours(base: Path, documents: Path, workload: Workload, overrides: dict[str, Any], out: Path, steps: int) -> None:
    """The run of a recipe: packed rows, conversion and all."""
    from adapt.training.recipe import parse_recipe
    from adapt.training.train import train

    train(parse_recipe(ours_argv(base, documents, workload, overrides, out, steps)))


def ours_argv(
    base: Path, documents: Path, workload: Workload, overrides: dict[str, Any], out: Path, steps: int
) -> list[str]:
    """The recipe of a run as the arguments of `adapt train`; its folder is out/run."""
    settings = {
        "model.base": base,
        "data.train": documents,
        "data.seq_len": copies(overrides) * workload.longest,
        "training.output_dir": out / "run",
        "training.num_steps": steps,
        "training.global_batch_size": workload.rows,
        "training.micro_batch_size": workload.rows,
        "training.learning_rate": LEARNING_RATE,
        "training.lr_scheduler": "linear",
        "training.optimizer": "adamw_torch_fused",
        "training.precision": "bf16",
        "training.max_grad_norm": 1.0,
        **overrides,
    }
    argv: list[str] = []
    for setting, value in settings.items():
        argv += [f"--{setting}", value if isinstance(value, str) else json.dumps(value, default=str).strip('"')]
    return argv


def copies(overrides: dict[str, Any]) -> int:
    """Tokens of a row that a token of a document takes at most: its noisy views, and a clean copy for block attention."""
    return int(overrides.get("objective.views", 1)) + (overrides.get("model.attention") == "block")
