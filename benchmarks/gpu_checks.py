"""What a GPU computes held against what is known: kernels against eager, ZeRO against plain, compiled against not, bf16 against fp32.

Each check yields what it has found so far, so that a check that is cut short loses nothing, and raises ValueError, in one line, where
a difference is too large. The runs are `adapt train` itself; only a callback of transformers' own looks at the gradients.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from arms import ours_argv, run_ours
from shapes import SHAPES, Workload, write_documents, write_model
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[1]
Found = dict[str, Any]
"""What a part has found: `rows` (a table of the page, all rows with the same keys), and whatever else goes into the JSON"""


class NotPossible(Exception):
    """The machine lacks what a part is about."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs and how large."""

    device: str
    tiny: bool
    """shapes of a rehearsal, which show that a part runs and nothing about speed"""
    scratch: Path
    peak_tflops: float | None = None

    def made(self, shape: str, workload: Workload, num_words: int | None = None) -> tuple[Path, Path]:
        """(base, documents) of a shape's random weights and a workload's random words, made once."""
        base, documents = self.scratch / f"base-{shape}", self.scratch / "documents.jsonl"
        if not base.exists():
            write_model(base, SHAPES[shape])
        write_documents(documents, workload, 64 if self.tiny else 512, num_words or SHAPES[shape]["vocab_size"] - 8)
        return base, documents


PATTERNS: dict[str, Found] = {  # documents of mixed lengths, so all rows are packed and padded
    "prefix": {"model.attention": "prefix"},
    "block": {"model.attention": "block", "model.block_size": 16},
    "bidirectional": {"model.attention": "bidirectional"},
    "prefix, bf16": {"model.attention": "prefix", "training.precision": "bf16"},
    "block, AR loss": {"model.attention": "block", "model.block_size": 16, "objective.ar_weight": 1.0},
    "annealed": {"model.attention": "bidirectional", "objective.anneal_steps": 1},
    "sliding windows": {"model.attention": "prefix"},
}
KERNELS = ("flex_attention", "sdpa_pieces", "sdpa")
GRADIENT_TOLERANCE = {
    "fp32": 1e-3,
    "bf16": 0.1,
}  # of the norm of all gradients; GPUs sum in another order, bf16 has 8 bits
CURVE_TOLERANCE = 1e-3  # of a loss in fp32, over a few steps
BF16_TOLERANCE = 0.03  # of the last losses' mean


def kernels(setting: Setting, patterns: dict[str, Found] = PATTERNS) -> Iterator[Found]:
    """Loss and gradients of one step on the same batch, each attention kernel beside eager."""
    workload = Workload(4, 10, 40, prompts=True) if setting.tiny else Workload(8, 40, 200, prompts=True)
    rows, wrong, errors, eager = [], [], {}, {}
    for kernel in KERNELS:
        for pattern, overrides in patterns.items():
            row = {
                "pattern": pattern,
                "kernel": kernel,
                "loss": None,
                "loss difference": None,
                "gradient difference": None,
            }
            rows.append(row)
            if kernel == "flex_attention" and setting.device == "cpu":
                row["loss"] = "not possible on a CPU"
                continue
            overrides = {"training.precision": "fp32", **overrides}
            try:
                if pattern not in eager:
                    eager[pattern] = one_step(setting, pattern, workload, "eager", overrides)
                step = one_step(setting, pattern, workload, kernel, overrides)
            except Exception as error:  # the other pairs are worth knowing all the more
                errors[f"{kernel} with {pattern}"] = traceback.format_exc()
                row["loss"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                row["loss"], row["loss difference"] = step.loss, abs(step.loss / eager[pattern].loss - 1)
                row["gradient difference"] = step.difference(eager[pattern])
                allowed = GRADIENT_TOLERANCE[overrides["training.precision"]]
                if max(row["loss difference"], row["gradient difference"]) > allowed:
                    wrong.append(f"{kernel} with {pattern} ({row['gradient difference']:.1e})")
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            yield {"rows": rows, "graphs compiled": graphs, "errors": errors}
    if wrong or errors:
        raise ValueError(f"not eager's loss and gradients: {'; '.join([*wrong, *errors])}")


class KeepStep(TrainerCallback):
    """The loss of a run's first step, and the gradients that its optimizer was given."""

    def __init__(self) -> None:
        self.loss, self.gradients = 0.0, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.gradients:
            self.gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}

    def difference(self, other: KeepStep) -> float:
        """Norm of the difference of all gradients, as a share of theirs."""
        assert self.gradients.keys() == other.gradients.keys()
        pairs = [(self.gradients[name], gradient) for name, gradient in other.gradients.items()]
        norm = sum(float(theirs.square().sum()) for _, theirs in pairs)
        return (sum(float((ours - theirs).square().sum()) for ours, theirs in pairs) / norm) ** 0.5


def one_step(setting: Setting, pattern: str, workload: Workload, kernel: str, overrides: Found) -> KeepStep:
    """The first step of a run, seen by a callback; the same documents, noise and weights whatever the kernel."""
    base, documents = setting.made("windows" if pattern == "sliding windows" else "tiny", workload)
    out = setting.scratch / f"{pattern}-{kernel}"
    keep = KeepStep()
    overrides = {"model.attn_implementation": kernel, "training.max_grad_norm": 1e6, **overrides}
    transformers.trainer.DEFAULT_CALLBACKS.append(keep)
    try:
        run_ours(base, documents, workload, overrides, out, steps=1 + overrides.get("objective.anneal_steps", 0))
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(keep)
    keep.loss = losses_of(out)[0]
    return keep


def zero(setting: Setting) -> Iterator[Found]:
    """Losses of 8 steps under DeepSpeed ZeRO 0 to 3 and with offload, one process of its launcher each, beside a run without it."""
    workload = Workload(4, 10, 40) if setting.tiny else Workload(8, 40, 200)
    base, documents = setting.made("tiny", workload)
    stages = ["plain", "zero0", "zero1", "zero2", "zero3"]
    if setting.device == "cuda":  # a CPU's tests have them; they compile an operator for a minute
        stages += ["zero2_offload", "zero3_offload"]

    def launch(stage: str) -> subprocess.Popen:
        overrides = {"model.attention": "prefix", "training.precision": "fp32"}
        overrides |= {} if stage == "plain" else {"training.deepspeed": stage}
        out = setting.scratch / stage
        out.mkdir()
        argv = ours_argv(base, documents, workload, overrides, out, steps=8)
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
        command = [sys.executable, *([] if stage == "plain" else launcher), str(ROOT / "recipes" / "train.py"), *argv]
        with (out / "log.txt").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    # A machine with a GPU has the cores for all at once.
    launched = {stage: launch(stage) for stage in stages} if setting.device == "cuda" else {}
    rows, wrong, logs, plain = [], [], {}, []
    for stage in stages:
        code = (launched[stage] if stage in launched else launch(stage)).wait()
        logs[stage] = (setting.scratch / stage / "log.txt").read_text(errors="replace")[-4000:]
        row = {"run": stage, "exit code": code, "first loss": None, "last loss": None, "difference": None}
        rows.append(row)
        if code != 0:
            wrong.append(f"{stage} ended with {code}")
        else:
            losses = losses_of(setting.scratch / stage)
            plain = plain or losses
            row |= {"first loss": losses[0], "last loss": losses[-1], "difference": apart(losses, plain)}
            if row["difference"] > CURVE_TOLERANCE:
                wrong.append(f"{stage} is {row['difference']:.1e} from plain")
        yield {"rows": rows, "logs": logs}
    if wrong:
        raise ValueError("; ".join(wrong))


def compiled(setting: Setting) -> Iterator[Found]:
    """Losses of 4 steps with torch.compile and without."""
    workload = Workload(4, 16, 64) if setting.tiny else Workload(8, 128, 512)
    base, documents = setting.made("tiny" if setting.tiny else "small", workload)
    losses, rows = {}, []
    for how in (False, True):
        overrides = {"model.attention": "bidirectional", "training.precision": "fp32", "model.torch_compile": how}
        if setting.device == "cpu":
            overrides["model.attn_implementation"] = "sdpa"
        run_ours(base, documents, workload, overrides, setting.scratch / f"compiled-{how}", steps=4)
        losses[how] = losses_of(setting.scratch / f"compiled-{how}")
        name, difference = ("compiled" if how else "not compiled"), apart(losses[how], losses[False])
        rows.append({"run": name, "first loss": losses[how][0], "last loss": losses[how][-1], "difference": difference})
        rows[-1]["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield {"rows": rows}
    if rows[1]["graphs"] == rows[0]["graphs"]:
        raise ValueError("nothing was compiled")
    if rows[-1]["difference"] > CURVE_TOLERANCE:
        raise ValueError(f"compiled losses differ by {rows[-1]['difference']:.1e}, allowed {CURVE_TOLERANCE:.0e}")


def bf16(setting: Setting) -> Iterator[Found]:
    """The loss curve of a small run in bf16 beside fp32, on documents of few words, which can be learnt."""
    steps, workload = (6, Workload(4, 16, 32)) if setting.tiny else (80, Workload(16, 64, 256))
    base, documents = setting.made("tiny" if setting.tiny else "small", workload, num_words=32)
    curves, rows = {}, []
    for precision in ("fp32", "bf16"):
        overrides = {"model.attention": "prefix", "training.precision": precision, "training.learning_rate": 1e-3}
        run_ours(base, documents, workload, overrides, setting.scratch / precision, steps=steps)
        curves[precision] = losses_of(setting.scratch / precision)
        last = statistics.fmean(curves[precision][-steps // 4 :])
        rows.append({"precision": precision, "steps": steps, "first loss": curves[precision][0], "last quarter": last})
        yield {"rows": rows, "curves": curves}
    off = abs(rows[1]["last quarter"] / rows[0]["last quarter"] - 1)
    if off > BF16_TOLERANCE:
        raise ValueError(f"bf16 ends {off:.1%} from fp32, allowed {BF16_TOLERANCE:.0%}")


def losses_of(out: Path) -> list[float]:
    """Loss of each step of a run of `arms`."""
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def apart(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
