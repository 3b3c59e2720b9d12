"""Steps whose loss or gradient is no number, or explodes: kept from the weights, and reported with their examples."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .. import progress
from .checkpoints.run_folder import grow
from .data.batch import PackedRows
from .sections import TrainingConfig

_WINDOW = 64  # logged losses that the median of max_loss_ratio is taken over
_FEWEST = 8  # below so many there is no median to speak of


class BadStep(NamedTuple):
    step: int
    loss: float
    grad_norm: float


class StepGuard(TrainerCallback):
    """Keeps the update of a bad step from the weights, and reports it when losses are logged.

    A step is bad if its gradient norm is not finite, which every rank sees alike; an exploding loss is made one by multiplying
    it by NaN before the backward pass. The update is then left out: by torch's fused optimizers on the device (what loss
    scaling uses), by DeepSpeed's own check, and by other optimizers because their gradients are taken away, which needs one
    host sync a step. So weights and checkpoints never hold a bad step, though it is reported only with the next log.
    """

    def __init__(self, settings: TrainingConfig, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.is_deepspeed = settings.deepspeed is not None
        self.limit = math.inf
        self._loss = torch.zeros((), device=device)
        self._grad_norm: Tensor | float | None = None
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []  # since the last log: loss on this rank, norm, bad

    def nan_if_exploded(self, loss: Tensor, trainer: Trainer) -> Tensor:
        """The micro-batch's loss, NaN if with it the step's loss (mean over ranks) is above the limit."""
        self._loss += loss.detach()
        if self.settings.max_loss_ratio is None or not trainer.accelerator.sync_gradients:
            return loss
        total = trainer.accelerator.reduce(self._loss.clone(), reduction="mean")
        assert isinstance(total, Tensor)
        return loss * torch.where(total <= self.limit, 1.0, math.nan)

    def drop_bad_update(self, grad_norm: Tensor | float | None, optimizer: Any) -> Tensor | float | None:
        """Between the backward pass and the optimizer: leaves out the update if the norm is not finite. Returns the norm."""
        norm = self._grad_norm if grad_norm is None else grad_norm
        assert norm is not None
        norm_on_device = torch.as_tensor(norm, device=self.device, dtype=torch.float32)
        is_bad = ~torch.isfinite(norm_on_device)
        if not self.is_deepspeed:  # whose step is over when it tells the norm
            _leave_out(optimizer, is_bad)
        self._steps.append((self._loss, norm_on_device, is_bad))
        self._loss, self._grad_norm = torch.zeros((), device=self.device), None
        return grad_norm

    def is_bad(self) -> Tensor:
        """[] whether the last step was bad, on the device."""
        return self._steps[-1][2]

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self._set_limit(state.log_history)
        inner = getattr(optimizer, "optimizer", optimizer)
        if not self.is_deepspeed:
            return
        if isinstance(inner, torch.optim.Optimizer):  # ZeRO 0 in float32: DeepSpeed hands it any gradient
            inner.register_step_pre_hook(self._before_deepspeed_steps)
        # The schedule is one of steps, left out or not; accelerate would stop it where DeepSpeed leaves one out.
        assert optimizer is not None
        optimizer.__has_overflow__ = False

    def _before_deepspeed_steps(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        _leave_out(optimizer, ~torch.isfinite(self._grad_norm))

    def report_bad_steps(self, trainer: Trainer) -> tuple[float | None, int]:
        """Called with every log: (mean loss of the good steps, None if none was bad; number of bad steps) since the last.

        With on_bad_loss=stop, ValueError that names the first bad step and its examples.
        """
        if not self._steps:
            return None, 0
        values = torch.stack([torch.stack([loss, norm, bad.float()]) for loss, norm, bad in self._steps])
        mean = trainer.accelerator.reduce(values.double(), reduction="mean")
        assert isinstance(mean, Tensor)
        losses, norms, bad = mean.T.tolist()
        first = trainer.state.global_step - len(losses) + 1
        steps = [BadStep(first + i, losses[i], norms[i]) for i in range(len(losses)) if bad[i]]
        self._steps.clear()
        for step in steps:
            self._report(step, trainer)
        good = [loss for loss, is_bad in zip(losses, bad, strict=True) if not is_bad]
        return (statistics.fmean(good or losses) if steps else None), len(steps)

    def _report(self, bad: BadStep, trainer: Trainer) -> None:
        rows, global_batch = trainer.train_dataset, self.settings.global_batch_size
        assert isinstance(rows, PackedRows)
        numbers = range((bad.step - 1) * global_batch, bad.step * global_batch)
        places = [place for k in numbers for place in rows.packing.row(k)]
        path = Path(self.settings.output_dir) / "bad_steps.jsonl"
        if trainer.args.should_save:
            tokenizer: Any = trainer.processing_class
            texts = [rows.examples[place.example] for place in places]
            examples = [
                {"example": place.example, "epoch": place.epoch, **{key: tokenizer.decode(text[key]) for key in text}}
                for place, text in zip(places, texts, strict=True)
            ]
            line = {**bad._asdict(), "limit": self.limit, "rows": list(numbers), "examples": examples}
            _append(path, line)
        shown = ", ".join(str(place.example) for place in places[:12]) + (", ..." if len(places) > 12 else "")
        why = f"loss {bad.loss:.4g}, grad_norm {bad.grad_norm:.4g}"
        if bad.loss > self.limit:
            why = f"loss {bad.loss:.4g} is above training.max_loss_ratio={self.settings.max_loss_ratio} x median = {self.limit:.4g}"
        line = (
            f"step {bad.step}: {why}; rows {numbers[0]}-{numbers[-1]}, examples {shown} (their text is in {path}); the update "
            "was left out"
        )
        if self.settings.on_bad_loss == "stop":
            raise ValueError(
                f"training.on_bad_loss=stop: {line}, no checkpoint was saved since; look at the data or lower "
                "training.learning_rate, or set training.on_bad_loss=skip to go on without such steps"
            )
        if trainer.args.should_save:
            print(f"adapt train: {line}", file=sys.stderr)

    def _set_limit(self, history: list[dict[str, float]]) -> None:
        """From the logged losses, which a checkpoint holds: a resumed run has the limits of one that never stopped."""
        logged = [line["loss"] for line in history[-_WINDOW:] if math.isfinite(line.get("loss", math.nan))]
        if self.settings.max_loss_ratio is not None and len(logged) >= _FEWEST:
            self.limit = self.settings.max_loss_ratio * statistics.median(logged)

    def on_log(self, args, state, control, **kwargs) -> None:
        self._set_limit(state.log_history)


def _leave_out(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Makes the optimizer's next step do nothing if [] is_bad, on the device where it can."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if getattr(inner, "_step_supports_amp_scaling", False):
        inner.grad_scale, inner.found_inf = None, is_bad.float()
    elif bool(is_bad):
        for group in inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        grow(path)
    except ValueError as error:  # a user's, put there since the run began: no reason to end it, on one rank alone
        return progress.say(str(error))
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
