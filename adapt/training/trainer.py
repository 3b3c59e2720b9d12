"""Trains a diffusion checkpoint (or its AR control) with transformers' Trainer, alone or under DeepSpeed.

    adapt train --config recipes/smollm2-135m/prefix.yaml
    deepspeed --num_gpus 8 recipes/train.py --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4

The run is one list of packed rows (`packing.py`); a step reads the next global_batch_size of them. Its loss is divided once, by
the tokens of that whole global batch, so the curve is the same for any split over ranks and accumulation steps.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
)

from .. import progress
from ..attention.layout import Layout
from ..objective import ROWS_PER_GATHER
from .bad_steps import StepGuard
from .checkpoints.save import sealed_checkpoint, without_ties
from .data.batch import Batch, PackedRows, collate
from .data.views import Canvases
from .interruption import Requests, start_worker
from .loss.distill import Teacher
from .loss.in_forward import Term
from .loss.terms import log_sums, noised_loss, terms_of
from .recipe import Recipe
from .time_limit import TimeLimit
from .watch.evaluation import Evaluation
from .watch.metrics import RunningMetrics


class DiffusionTrainer(Trainer):
    """The Trainer with our loss, our normaliser, rows in their own order, and checkpoints that are whole or ignored."""

    def __init__(
        self,
        recipe: Recipe,
        canvases: Canvases,
        longest_canvas: int,
        provenance: dict[str, Any],
        teacher: Teacher | None = None,
        evaluation: Evaluation | None = None,
        **kwargs,
    ) -> None:
        # Compiled kernels want one shape; otherwise a batch is as long as its longest row.
        compiled = recipe.model.torch_compile or kwargs["model"].config._attn_implementation == "flex_attention"
        fixed_length = recipe.data.seq_len if compiled else None
        collator = partial(collate, length=fixed_length, with_teacher=teacher is not None)
        super().__init__(data_collator=collator, **kwargs)
        self.remove_callback(PrinterCallback)
        self.recipe, self.spec, self.longest_canvas = recipe, canvases.spec, longest_canvas
        self.is_ar = canvases.is_ar
        self.ar_weight = 1.0 if canvases.is_ar else recipe.objective.ar_weight
        self.teacher, self.noised_loss = teacher, noised_loss(recipe, canvases, teacher)
        self.loss_is_scaled_for_ga = True
        self.metrics = RunningMetrics(self.args.device)
        self.provenance, self.evaluation = provenance, evaluation
        self.guard = StepGuard(recipe.training, self.args.device)
        self.requests = Requests(self.args, recipe.training.minutes_between_checkpoints)
        ours, self.time_limit = recipe.training, None
        if ours.max_minutes is not None:
            self.time_limit = TimeLimit(ours.max_minutes, self.args.max_steps, ours.warmup_steps)
            self.add_callback(self.time_limit)
        self.add_callback(self.guard)
        self.add_callback(self.requests)
        self.add_callback(self.metrics)

    def compute_loss(
        self, model, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ):
        # 1. What each token sees.
        layout = Layout(inputs["document_ids"], inputs["view_ids"], inputs["position_ids"], inputs["context_lengths"])
        # 2. Forward; the head on the rows of each term only: the weighted sum, and the nats of each row. Weights are divided
        #    once, by the count over ranks and accumulation (the backward pass averages over ranks).
        assert num_items_in_batch is not None
        loss, nats = model(
            input_ids=inputs["input_ids"],
            layout=layout,
            pieces=inputs["pieces"],
            right_window=self._right_window(),
            terms=self._terms(inputs, *(self.args.world_size / num_items_in_batch)),
            num_chunks=self._num_chunks(),
            router_weight=1 / self.args.gradient_accumulation_steps,  # a mean over micro-batches, not over tokens
        )
        # 3. For the log, on the device.
        none = torch.zeros_like(inputs["num_maskable"])
        taught = {"distill_kl_sum": none, "num_taught": none}
        if self.teacher is not None:
            nats[0], kl = nats[0].unbind(1)
            taught = {"distill_kl_sum": kl.sum(), "num_taught": inputs["is_taught"].sum()}
        metrics = log_sums(inputs, torch.cat(nats), self.is_ar) | taught
        metrics |= {name: inputs[name] for name in ("num_useful", "num_clean")}
        self.metrics.add(metrics, num_tokens=inputs["input_ids"].numel())
        return self.guard.nan_if_exploded(loss, self)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The Trainer's sum would be NaN from here on; the guard keeps the bad one.
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = self.guard.drop_bad_update(super()._get_grad_norm(model, grad_norm), self.optimizer)
        self.metrics.end_step(self.guard.is_bad())
        return grad_norm

    def _terms(self, batch: Batch, per_token: Tensor, per_ar_token: Tensor) -> list[Term]:
        taught = None
        if self.teacher is not None:
            with self.accelerator.autocast():  # which the wrapped model's forward has by itself
                taught = self.teacher.hidden(batch)
        per_ar_token = self.ar_weight * per_ar_token
        return terms_of(batch, self.noised_loss, taught, per_token, per_ar_token if self.ar_weight else None)

    def _num_chunks(self) -> int:
        """Chunks of the head's rows under ZeRO-3: the same on all ranks, because each is a collective."""
        recipe = self.recipe
        return -(-recipe.training.micro_batch_size * recipe.data.seq_len // ROWS_PER_GATHER)

    def _right_window(self) -> int | None:
        """Annealing, causal to bidirectional: how many tokens to its right a canvas token sees at this step; None = all."""
        steps = self.recipe.objective.anneal_steps
        if self.state.global_step >= steps:
            return None
        return self.longest_canvas * self.state.global_step // steps

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """[2]: tokens that the diffusion and the AR loss of a step are divided by, over accumulation and ranks."""
        maskable, noised, ar = (sum(counts) for counts in zip(*(b["counts"] for b in batch_samples), strict=True))
        divisor = maskable if self.recipe.objective.weight == "elbo" else noised
        here = torch.tensor([divisor, ar]).to(device, non_blocking=True)
        total = self.accelerator.reduce(torch.cat([here, self.requests.of_this_rank()]), reduction="sum")
        assert isinstance(total, Tensor)
        self.requests.share(total[2:])
        return total[:2].clamp(min=1)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        return scheduler if self.time_limit is None else self.time_limit.paced(scheduler)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate reads this one, and on resume copies the outer
        loader.worker_init_fn = inner.worker_init_fn = partial(start_worker, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(rows, PackedRows)
        return torch.utils.data.SequentialSampler(rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        assert isinstance(self.train_dataset, PackedRows)
        # The Trainer counts the run as one epoch; what a reader wants is passes over the data.
        self.state.epoch = self.train_dataset.epochs(self.state.global_step * self.recipe.training.global_batch_size)
        if "loss" in logs:
            before = next((line for line in reversed(self.state.log_history) if "loss" in line), {})
            logs |= self._scores(before.get("step", 0))
            loss_of_good_steps, num_skipped = self.guard.report_bad_steps(self)
            if loss_of_good_steps is not None:
                logs["loss"] = loss_of_good_steps
            if self.recipe.training.on_bad_loss == "skip":
                logs["skipped_steps"] = before.get("skipped_steps", 0) + num_skipped
            logs = {**logs, **self.metrics.drain(self.accelerator, before)}
            if not (self.is_ar or self.recipe.noise.covers_all_times):
                del logs["nelbo"]  # with some times left out it is no bound
            if not (self.is_ar or self.recipe.noise.kind == "absorbing"):
                del logs["mask_ratio"]  # all tokens are predicted, noised or not
        super().log(logs, start_time)

    def _scores(self, last_log: float) -> dict[str, float]:
        """Held-out losses, where they are due; not after a signal, whose checkpoint has to be written within seconds."""
        evaluation = self.evaluation
        if evaluation is None or self.requests.stopped or not evaluation.is_due(last_log, self.state):
            return {}
        return evaluation.scores(self, self.metrics, self._num_chunks())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, None if state_dict is None else without_ties(self.model, state_dict))

    def _get_output_dir(self, trial) -> str:
        return os.path.join(self.recipe.training.output_dir, "checkpoints")

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with progress.doing(f"saving {folder.name}"), sealed_checkpoint(self, self.recipe, folder, self.provenance):
            super()._save_checkpoint(model, trial)
