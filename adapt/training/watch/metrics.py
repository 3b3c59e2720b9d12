"""What a run reports: sums kept on the device and reduced over ranks when logged; one JSON line a log step.

The keys of metrics.jsonl. Means are over all tokens of all ranks since the last line; speeds are rates since the last line.

    step                  optimizer steps since the start of the run
    epoch                 passes over the data
    loss                  what is minimised: the diffusion loss plus ar_weight times ar_nll, and distill_weight times the KL
    nelbo                 nats/token, an upper bound on the NLL (of the AR objective: the NLL). Absent with a band of times
    noised_nll            nats/token, of the noised tokens, unweighted (of uniform and hybrid noise: the bound's terms)
    ar_nll                nats/token, next token of the clean target. Only where the objective has an AR loss
    eval_nelbo            nats/token, and eval_ar_nll: of the rows of data.eval, at the steps that score them (`evaluation.py`)
    distill_kl            nats/token, KL(original || adapted) of the noised tokens that have a teacher. Only with distillation
    mask_ratio            noised share of the tokens that might have been noised. Absent for uniform and hybrid noise
    grad_norm             L2, over all parameters, before clipping
    learning_rate         of the step
    tokens_per_s          positions computed: noisy copies and padding included
    useful_tokens_per_s   positions computed that are not padding
    clean_tokens_per_s    the examples' own tokens, each counted once: what compares with AR training on the same data
    tokens_seen           positions computed since the start of the run
    clean_tokens_seen     the examples' own tokens since the start of the run, once an epoch
    elapsed_s             seconds of training since the start of the run, without samples and without the time it lay killed
    peak_memory_gb        1e9 bytes, of the rank that has needed most: allocated on its GPU, or else resident
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from ...files.staging import write_whole
from ..checkpoints.run_folder import grow

_COUNTS = ("num_tokens", "num_useful", "num_clean")  # of what was computed, whatever came of it
_SUMS = (
    "nelbo_sum",
    "noised_nll_sum",
    "num_noised",
    "num_maskable",
    "ar_nll_sum",
    "num_ar",
    "distill_kl_sum",
    "num_taught",
    *_COUNTS,
)


class RunningMetrics(TrainerCallback):
    """Sums since the last log, on the device: adding costs no host sync."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.of_step = torch.zeros_like(self.sums)
        self.is_count = torch.tensor([name in _COUNTS for name in _SUMS], device=device)
        self.since = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.since = time.perf_counter()  # not the time that engines and checkpoints took to load

    def add(self, metrics: dict[str, Tensor], num_tokens: int) -> None:
        here = {**metrics, "num_tokens": torch.full_like(metrics["num_maskable"], num_tokens)}
        self.of_step += torch.stack([here[name].to(self.sums) for name in _SUMS])

    def end_step(self, is_bad: Tensor) -> None:
        """Adds the step's sums; of one whose update is left out only the tokens, because one NaN would hide all others."""
        self.sums += torch.where(is_bad & ~self.is_count, 0.0, self.of_step)
        self.of_step.zero_()

    def leave_out(self, seconds: float) -> None:
        """Takes time that was not spent on training out of the rates."""
        self.since += seconds

    def drain(self, accelerator: Accelerator, before: Mapping[str, float]) -> dict[str, float]:
        """Metrics over all ranks since the last call, as the module's docstring names them.

        before: the line before this one, so that its counts go on when a run is resumed; {} at the start.
        """
        elapsed = time.perf_counter() - self.since
        here = torch.cat([self.sums, self.sums.new_tensor([_peak_memory_bytes()])])
        ranks = accelerator.gather(here[None])
        assert isinstance(ranks, Tensor)
        total = dict(zip(_SUMS, ranks[:, :-1].sum(0).tolist(), strict=True))
        self.sums.zero_()
        self.since = time.perf_counter()
        ar = {"ar_nll": total["ar_nll_sum"] / total["num_ar"]} if total["num_ar"] else {}
        distill = {"distill_kl": total["distill_kl_sum"] / total["num_taught"]} if total["num_taught"] else {}
        return {
            "nelbo": total["nelbo_sum"] / max(total["num_maskable"], 1),
            "noised_nll": total["noised_nll_sum"] / max(total["num_noised"], 1),
            **ar,
            **distill,
            "mask_ratio": total["num_noised"] / max(total["num_maskable"], 1),
            "tokens_per_s": total["num_tokens"] / elapsed,
            "useful_tokens_per_s": total["num_useful"] / elapsed,
            "clean_tokens_per_s": total["num_clean"] / elapsed,
            "tokens_seen": int(before.get("tokens_seen", 0) + total["num_tokens"]),
            "clean_tokens_seen": int(before.get("clean_tokens_seen", 0) + total["num_clean"]),
            "elapsed_s": before.get("elapsed_s", 0.0) + elapsed,
            "peak_memory_gb": float(ranks[:, -1].max()) / 1e9,
        }


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl, one line a log step; on resume, lines of steps that are run again are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            grow(self.path)
            drop_lines_after(self.path, state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # A resumed run averages from its checkpoint on, so this one starts a new average there too; and no step goes unreported.
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def drop_lines_after(path: Path, step: int) -> list[dict]:
    """The lines (JSON objects with a step) of a run's file up to that step, to which it is cut; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = [line for line in lines if _step(line) <= step]
    write_whole(path, "".join(f"{line}\n" for line in kept))
    return [json.loads(line) for line in kept]


def _step(line: str) -> float:
    """inf where the line is not a run's: a kill may have cut the last one short, or somebody's editor another."""
    try:
        step = json.loads(line)["step"]
    except (KeyError, RecursionError, TypeError, ValueError):
        return math.inf
    return step if isinstance(step, int) and 0 <= step < 2**53 else math.inf


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
