"""How far a run is, on rank 0's standard error: `adapt.progress` with the figures of the last log."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from transformers import TrainerCallback

from ... import progress

# What stands in the line, in words. The rest of a log (grad_norm, mask_ratio, tokens/s with padding ...) is in metrics.jsonl.
LEGEND = {
    "nelbo": "nats per token, an upper bound on the NLL",
    "noised_nll": "nats per token, of the noised tokens",
    "ar_nll": "nats per token, of the next token",
    "distill_kl": "nats per token, away from the original",
    "eval_nelbo": "of the held-out rows",
    "eval_ar_nll": "of the held-out rows",
    "loss": "their weighted sum, which is minimised",
    "tokens/s": "the examples' own tokens, without copies and padding",
    "lr": "learning rate",
    "memory": "of the rank that has needed most",
}


class Progress(TrainerCallback):
    """The step, the time that is left and the figures: a bar on a terminal, else a line every 10 s, the first and the last."""

    def __init__(self, metrics_file: Path | None = None) -> None:
        self.metrics_file = metrics_file

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.task: progress.Task | None = None
        self.scores: dict[str, float] = {}  # of the last evaluation
        self.explained: set[str] = set()
        if state.is_world_process_zero:
            self.task = progress.begin("train", state.max_steps, done=state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.task is None:
            return
        self.task.total = state.max_steps  # training.max_minutes may lower it on the way
        self.task.update(speak=not control.should_log)  # a log of this step brings fresher figures in a moment
        if not (control.should_log or self.task.was_spoken_of):
            self.task.speak()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.task is None or not logs or "loss" not in logs:
            return
        self.scores |= {name: logs[name] for name in ("eval_nelbo", "eval_ar_nll") if name in logs}
        self.task.figures = progress_figures({**self.scores, **logs})
        self._explain(self.task.figures)
        if not self.task.was_spoken_of or self.task.is_due():
            self.task.speak()

    def _explain(self, figures: list[str]) -> None:
        """Says once what each means, in as many lines as a terminal needs."""
        names = [name for figure in figures if (name := figure.split("=")[0]) not in self.explained]
        if not names:
            return
        more = f"; more in {self.metrics_file}" if self.metrics_file and not self.explained else ""
        self.explained |= set(names)
        legend = "train: " + "; ".join(f"{name} = {LEGEND[name]}" for name in names) + more
        width = progress.columns(sys.stderr)
        progress.say(textwrap.fill(legend, width - 1) if width else legend)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.task is not None:
            self.task.close(last_line=True)


def progress_figures(logs: Mapping[str, float]) -> list[str]:
    """key=value of a log, the most important first."""
    bound = "nelbo" if "nelbo" in logs else "noised_nll"
    if logs[bound] == logs.get("ar_nll"):  # the AR objective
        bound = "ar_nll"
    names = dict.fromkeys((bound, "ar_nll", "distill_kl"))
    terms = [f"{name}={logs[name]:.3f}" for name in names if name in logs]
    score = "eval_ar_nll" if bound == "ar_nll" else "eval_nelbo"
    scores = [f"{score}={logs[score]:.3f}"] if score in logs else []
    speed = f"tokens/s={logs['clean_tokens_per_s']:,.0f}"
    loss = [f"loss={logs['loss']:.3f}"] if len(terms) > 1 else []  # of one term it is the bound over again
    return [*terms, *scores, speed, *loss, f"lr={logs['learning_rate']:.1e}", f"memory={logs['peak_memory_gb']:.1f}GB"]
