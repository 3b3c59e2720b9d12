"""Held-out loss during training: every `training.eval_steps` steps, at the next log, the model as it is on the rows of data.eval.

    eval_nelbo    nats/token, an upper bound on the NLL, at all times whatever band training draws (of the AR objective: the NLL)
    eval_ar_nll   nats/token, next token of the clean target; only where the objective has an AR loss

An evaluation leaves no trace in the run: weights, random numbers, the lines in between and what a checkpoint goes on from are
those of a run without it. Its time is kept out of the rates.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import Trainer, TrainerState

from ... import progress
from ...attention.layout import Layout
from ..data.batch import PackedRows
from ..loss.terms import log_sums, noised_loss, terms_of
from ..recipe import Recipe
from .metrics import RunningMetrics

_SUMS = ("nelbo_sum", "num_maskable", "ar_nll_sum", "num_ar")


class Evaluation:
    """The held-out rows of a run, and when they are scored."""

    def __init__(self, recipe: Recipe, rows: PackedRows, num_steps: int) -> None:
        self.rows, self.batch_size = rows, recipe.training.micro_batch_size
        self.every = recipe.training.eval_steps or -(-num_steps // 10)
        self.is_ar, self.has_ar_loss = rows.canvases.is_ar, rows.canvases.has_ar_loss
        self.noised_loss = noised_loss(recipe, rows.canvases, teacher=None)

    def is_due(self, last_log: float, state: TrainerState) -> bool:
        """Whether a step to be scored has come since the last log, or the run ends; the same for a run that was resumed."""
        return state.global_step // self.every > last_log // self.every or state.global_step >= state.max_steps

    def scores(self, trainer: Trainer, metrics: RunningMetrics, num_chunks: int) -> dict[str, float]:
        """Means over the held-out tokens of all ranks, each of which scores a part. num_chunks: of the head, under ZeRO-3."""
        started = time.perf_counter()
        rank, world_size = trainer.args.process_index, trainer.args.world_size
        num_batches = -(-len(self.rows) // self.batch_size)
        per_rank = -(-num_batches // world_size)
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=trainer.args.device)
        with (
            progress.doing("scoring held-out rows", total=per_rank) as task,
            _evaluating(trainer),
            trainer.accelerator.autocast(),
        ):
            for k in range(rank, per_rank * world_size, world_size):
                found = self._batch_sums(trainer, min(k, num_batches - 1), num_chunks)
                if k < num_batches:  # ranks without a batch left go along: under ZeRO-3 a forward is one of all ranks
                    sums += found
                task.update()
        total = trainer.accelerator.reduce(sums, reduction="sum")
        assert isinstance(total, torch.Tensor)
        nelbo, num_maskable, ar_nll, num_ar = total.tolist()
        metrics.leave_out(time.perf_counter() - started)
        return {"eval_nelbo": nelbo / max(num_maskable, 1)} | ({"eval_ar_nll": ar_nll / num_ar} if num_ar else {})

    def _batch_sums(self, trainer: Trainer, k: int, num_chunks: int) -> torch.Tensor:
        rows = range(k * self.batch_size, min((k + 1) * self.batch_size, len(self.rows)))
        batch: Any = send_to_device(trainer.data_collator([self.rows[row] for row in rows]), trainer.args.device)
        weight = torch.ones((), device=trainer.args.device)
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        _, nats = model(
            input_ids=batch["input_ids"],
            layout=Layout(batch["document_ids"], batch["view_ids"], batch["position_ids"], batch["context_lengths"]),
            pieces=batch["pieces"],
            terms=terms_of(batch, self.noised_loss, None, weight, weight if self.has_ar_loss else None),
            num_chunks=num_chunks,
        )
        found = log_sums(batch, torch.cat(nats), self.is_ar)
        return torch.stack([found[name].double() for name in _SUMS])


@contextmanager
def _evaluating(trainer: Trainer) -> Iterator[None]:
    """Inside, no gradients and no dropout; after it modules and random numbers are as before."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([trainer.args.device] if trainer.args.device.type == "cuda" else []),
        ):
            yield
    finally:
        for module in training:
            module.training = True
