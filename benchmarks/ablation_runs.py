"""One run of the ablation, in a process that does many: train by recipe, then score the held-out texts."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch, which `start_worker` must precede
    from ablation_texts import Text

EVALUATION_SEED = 1234  # of the Monte-Carlo noise: one for all arms
BATCH = 16  # texts in a forward when scoring
AR_BATCH = 4  # and when reading left to right, where a large vocabulary's logits are all there at once


@dataclass(frozen=True)
class Task:
    """What a worker is to do, and all that its result depends on."""

    arm: str
    stage: str
    """tune or final"""
    learning_rate: float
    seed: int
    num_tokens: int
    """clean tokens to train on, each once, without prompts"""
    num_heldout: int
    """texts"""
    num_samples: int
    """Monte-Carlo samples of each text's NELBO"""
    row_tokens: int
    """clean tokens of an optimizer step, about: one packed row"""
    precision: str = "fp32"
    """of training"""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def start_worker(log: Path) -> None:
    """Sends what libraries print to a file, before they are imported."""
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    import torch

    torch.set_num_threads(1)


def run(task: Task, source: Path, work: Path, train_texts: list[Text], heldout: list[Text]) -> dict[str, Any]:
    """The task's fields and what came of it, {"error": one line} if it failed; never raises for a failed training."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    scratch = work / f"run-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        found = _run(task, source, work, scratch, train_texts, heldout)
    except (Exception, SystemExit) as error:  # a failed run is a row of the table
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    shutil.rmtree(scratch, ignore_errors=True)
    return {**asdict(task), "started": started, **found}


def _run(
    task: Task, source: Path, work: Path, scratch: Path, train_texts: list[Text], heldout: list[Text]
) -> dict[str, Any]:
    from ablation_arms import ARMS, recipe_arguments
    from ablation_texts import write_base
    from transformers import AutoTokenizer

    from adapt.training.recipe import parse_recipe
    from adapt.training.train import train

    # 1. The texts that are read once, and the recipe.
    arm = ARMS[task.arm]
    name = f"random-{task.seed}" if arm.from_scratch else "base"
    prompted = bool(heldout[0].context)
    base = write_base(source, work / name, task.seed if arm.from_scratch else None, end_is_start=not prompted)
    tokenizer: Any = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    chosen = texts_of(train_texts, task.num_tokens)
    documents = scratch / "texts.jsonl"
    documents.write_text("".join(json.dumps(text.row(tokenizer)) + "\n" for text in chosen))
    lengths = [len(text.context or [0]) + len(text.ids) for text in chosen]
    steps = sum(lengths) // task.row_tokens  # about: for shares of the run
    settings = {
        "model.base": base,
        "data.train": documents,
        "data.seq_len": arm.copies * task.row_tokens,
        "training.output_dir": scratch / "run",
        "training.num_epochs": 1,
        "training.global_batch_size": 1,
        "training.micro_batch_size": 1,
        "training.learning_rate": task.learning_rate,
        "training.warmup_steps": max(1, steps // 10),
        "training.weight_decay": 0.0,
        "training.precision": task.precision,
        "training.seed": task.seed,
        "training.logging_steps": 20,
    }
    # 2. Train. CPU seconds of this process, so that neighbours on the machine do not count.
    cpu, wall = time.process_time(), time.perf_counter()
    final = train(parse_recipe(recipe_arguments(arm, settings, steps)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    log = json.loads((scratch / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    # 3. Score.
    at = time.process_time()
    scores = score(final, heldout[: task.num_heldout], task.num_samples)
    return {
        "settings": arm.settings,
        "steps": log["step"],
        "clean_tokens": log["clean_tokens_seen"],
        "positions": log["tokens_seen"],
        "train_nelbo": log["nelbo"],
        "train_cpu_s": round(cpu, 2),
        "train_wall_s": round(wall, 2),
        "score_cpu_s": round(time.process_time() - at, 2),
        **scores,
    }


def texts_of(texts: list[Text], num_tokens: int) -> list[Text]:
    """The first texts that together have that many tokens; ValueError if there are too few."""
    total, chosen = 0, []
    for text in texts:
        if total >= num_tokens:
            break
        total += len(text.ids)
        chosen.append(text)
    if total < num_tokens:
        raise ValueError(f"--tokens={num_tokens}: only {total} tokens were sampled; lower it, or raise --chunks")
    return chosen


def score(folder: Path, texts: list[Text], num_samples: int) -> dict[str, Any]:
    """{"nelbo": nats of each text, "mc_stderr": its error, "ar_nll": nats of each text read left to right, or None}.

    Block models score a text with its last block filled up with end-of-text, as they write it and were trained to.
    """
    import torch

    from adapt import load
    from adapt.decoding.likelihood import nelbo

    # Probed at conversion. A model that a high learning rate has brought to one constant answer would fail here: it is a result.
    lm = load(folder, dtype=torch.float32, device="cpu", attn_implementation="sdpa_pieces", verify=False)
    tokenizer: Any = lm.tokenizer
    size = lm.spec.block_size or 1
    contexts = _contexts(tokenizer, texts)
    targets = [
        text.ids + [tokenizer.eos_token_id] * (-(len(context) + len(text.ids)) % size)
        for text, context in zip(texts, contexts, strict=True)
    ]
    found = nelbo(lm, contexts, targets, num_samples=num_samples, batch_size=BATCH, seed=EVALUATION_SEED)
    causal = lm.spec.attention == "block" and lm.spec.clean_context == "causal"
    return {
        "nelbo": [round(one.nats, 3) for one in found],
        "mc_stderr": [round(one.stderr, 3) for one in found],
        "ar_nll": [round(nats, 3) for nats in ar_nll(folder, texts)] if causal else None,
    }


def ar_nll(folder: Path, texts: list[Text]) -> list[float]:
    """Nats of each text after its context under a plain causal load of the folder, by transformers alone, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    contexts = _contexts(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), texts)
    nats: list[float] = []
    with torch.no_grad():
        for at in range(0, len(texts), AR_BATCH):
            chunk = [(contexts[i], texts[i].ids) for i in range(at, min(at + AR_BATCH, len(texts)))]
            width = max(len(context) + len(ids) for context, ids in chunk)
            rows = [context + ids + [0] * (width - len(context) - len(ids)) for context, ids in chunk]
            labels = [[-100] * len(c) + ids + [-100] * (width - len(c) - len(ids)) for c, ids in chunk]
            logits = model(input_ids=torch.tensor(rows)[:, :-1]).logits
            targets = torch.tensor(labels)[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            nats += loss.view(targets.shape).double().sum(1).tolist()
    return nats


def _contexts(tokenizer: Any, texts: list[Text]) -> list[list[int]]:
    """The tokens before each text: its prompt, or the start-of-text alone."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [list(text.context) or [start] for text in texts]


if __name__ == "__main__":
    sys.exit("run benchmarks/ablations.py")
