"""Trains a diffusion checkpoint (or its AR control) with transformers' Trainer, alone or under DeepSpeed.

    adapt train --config recipes/smollm2-135m/prefix.yaml
    deepspeed --num_gpus 8 recipes/train.py --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4

The run is one list of packed rows (`packing.py`); a step reads the next global_batch_size of them. Its loss is divided once, by
the tokens of that whole global batch, so the curve is the same for any split over ranks and accumulation steps.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import disable_progress_bars
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from .arguments import wait_for_rank_zero
from .attention import Layout
from .canvases import Canvases
from .checkpoint import DiffusionSpec
from .collate import Batch, PackedRows, collate
from .config import Recipe, ignored_by_ar, parse_recipe
from .data import load_examples, load_rows
from .distill import Teacher, teacher_of
from .engine import check_schedule, training_arguments, whole_weights
from .guard import StepGuard, Terminated, failures_name_the_checkpoint, start_worker
from .hybrid_noise import hybrid_loss
from .metrics import MetricsFile, Progress, RunningMetrics
from .model import Term
from .objective import ROWS_PER_GATHER, RowLoss, cross_entropy, diffusion_loss
from .prepare import check_base, diffusion_checkpoint, prepared
from .resume import hold, newest_checkpoint, remove_unfinished, whole_checkpoints
from .rows import check_curriculum, packed_rows, summary, that_fit
from .saving import facts, save_final, save_provenance, sealed_checkpoint
from .trackers import RecipeInTrackers
from .universal import read_on_any_ranks
from .watch import Samples, sample_prompt

_CAUSAL = DiffusionSpec(
    attention="prefix", mask_token_id=-1
)  # for objective.name=ar, which lays no canvas and draws no noise


class DiffusionTrainer(Trainer):
    """The Trainer with our loss, our normaliser, rows in their own order, and checkpoints that are whole or ignored."""

    def __init__(
        self,
        recipe: Recipe,
        canvases: Canvases,
        longest_canvas: int,
        about: dict[str, Any],
        teacher: Teacher | None = None,
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
        self.teacher, self.noised_loss = teacher, _noised_loss(recipe, canvases, teacher)
        self.loss_is_scaled_for_ga = True
        self.metrics = RunningMetrics(self.args.device)
        self.about = about
        self.guard = StepGuard(recipe.training, self.args.device, self.args.world_size)
        self.add_callback(self.guard)
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
        nll, ar_nll = torch.cat(nats).split([len(inputs["rows"]), len(inputs["ar_rows"])])
        if self.is_ar:  # the NLL is what its NELBO is: every target token is predicted, once
            num_ar = torch.full_like(inputs["num_maskable"], len(ar_nll))
            _, _, metrics = diffusion_loss(ar_nll, torch.ones_like(ar_nll), num_ar)
        else:
            _, _, metrics = diffusion_loss(nll, inputs["elbo_weight"], inputs["num_maskable"])
        metrics |= {name: inputs[name] for name in ("num_useful", "num_clean")}
        metrics |= {
            "ar_nll_sum": ar_nll.sum(),
            "num_ar": torch.full_like(inputs["num_maskable"], len(ar_nll)),
            **taught,
        }
        self.metrics.add(metrics, num_tokens=inputs["input_ids"].numel())
        return self.guard.weigh_loss(loss, self)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The Trainer's sum would be NaN from here on; the guard keeps the bad one.
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = self.guard.weigh_update(super()._get_grad_norm(model, grad_norm), self.optimizer)
        self.metrics.end_step(self.guard.is_bad())
        return grad_norm

    def _terms(self, batch: Batch, per_token: Tensor, per_ar_token: Tensor) -> list[Term]:
        """The rows for the head: noised tokens, and the clean ones of an AR loss; in one term where their loss is the same."""
        ar_weights = (self.ar_weight * per_ar_token).expand(len(batch["ar_rows"]))
        weights = batch["loss_weight"] * per_token
        if self.noised_loss is None:
            rows = torch.cat([batch["rows"], batch["ar_rows"]])
            targets = torch.cat([batch["targets"], batch["ar_targets"]])
            return [Term(rows, cross_entropy, (targets,), torch.cat([weights, ar_weights]))]
        terms = [Term(batch["rows"], self.noised_loss, self._row_tensors(batch), weights)]
        if self.ar_weight:
            terms.append(Term(batch["ar_rows"], cross_entropy, (batch["ar_targets"],), ar_weights))
        return terms

    def _row_tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        if self.teacher is not None:
            with self.accelerator.autocast():  # which the wrapped model's forward has by itself
                return batch["targets"], self.teacher.hidden(batch), batch["is_taught"]
        return batch["targets"], batch["xt"], batch["t"]

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
        total = self.accelerator.reduce(torch.cat([here, self.guard.asked_to_end()]), reduction="sum")
        assert isinstance(total, Tensor)
        self.guard.agree(total[2])
        return total[:2].clamp(min=1)

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
            loss_of_good_steps, num_skipped = self.guard.told(self)
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

    def _get_output_dir(self, trial) -> str:
        return os.path.join(self.recipe.training.output_dir, "checkpoints")

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with sealed_checkpoint(self, self.recipe, folder, self.about):
            super()._save_checkpoint(model, trial)


def _noised_loss(recipe: Recipe, canvases: Canvases, teacher: Teacher | None) -> RowLoss | None:
    """The loss of a noised token; None: the cross-entropy, which an AR loss has too."""
    if teacher is not None:
        return teacher.row_loss(recipe.objective.distill_weight)
    if recipe.noise.kind == "absorbing" or canvases.is_ar:
        return None
    return partial(
        hybrid_loss,
        kind=recipe.noise.kind,
        vocab_size=canvases.vocab_size,
        mask_token_id=canvases.spec.mask_token_id,
        p_uniform=recipe.noise.p_uniform,
        weight=recipe.objective.weight,
    )


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its end and returns the folder of the final model, which `from_pretrained` loads.

    Raises ValueError for settings that do not fit together, before weights are loaded or anything is written; Terminated
    after SIGTERM, when a checkpoint has been saved.
    """
    output_dir = Path(recipe.training.output_dir)
    # 1. Everything that can be refused cheaply.
    final = output_dir / "model"
    if final.exists():
        raise ValueError(
            f"training.output_dir={output_dir}: holds a finished run (model/); choose a new folder, with model.base={final} to go on "
            "from it, or remove it"
        )
    check_base(recipe)
    args = training_arguments(recipe)
    checkpoint = newest_checkpoint(recipe)
    about = facts(recipe, args.world_size)
    with args.main_process_first(local=False, desc="read the data"):
        rows = load_rows(recipe.data)
    with hold(output_dir) if args.process_index == 0 else nullcontext():
        return _train(recipe, args, checkpoint, about, rows)


def _train(recipe: Recipe, args: TrainingArguments, checkpoint: Path | None, about: dict[str, Any], rows: Any) -> Path:
    """The run itself; rows: of the data, as `load_rows` reads them."""
    output_dir, is_main = Path(recipe.training.output_dir), args.process_index == 0
    # 2. The checkpoint: converted first if it is a causal LM, and probed.
    with args.main_process_first(local=False, desc="convert"), whole_weights(args):
        folder = diffusion_checkpoint(recipe, output_dir, is_main)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = _CAUSAL if recipe.objective.name == "ar" else DiffusionSpec.of(AutoConfig.from_pretrained(folder), folder)
    if recipe.data.canvas_start == "anywhere" and spec.attention == "bidirectional":
        raise ValueError(
            "data.canvas_start=anywhere: a bidirectional checkpoint has no causal context for a canvas to hang off; "
            "set it to prompt, or convert with model.attention=prefix"
        )
    canvases = Canvases(
        spec,
        recipe.noise,
        recipe.objective,
        recipe.data.canvas_length,
        recipe.data.canvas_start,
        tokenizer.eos_token_id,
        recipe.training.seed,
        recipe.data.seq_len,
        len(tokenizer),
    )
    # 3. The data, as rows in the order of the run.
    with args.main_process_first(local=False, desc="tokenise"):
        examples = load_examples(
            recipe.data,
            tokenizer,
            rows=rows,
            piece_length=canvases.piece_length(recipe.data.seq_len),
            is_main_process=is_main,
        )
    examples = that_fit(recipe, canvases, examples, is_main)
    if is_main and canvases.is_ar and (ignored := ignored_by_ar(recipe)):
        print(f"objective.name=ar: draws no noise, so it ignores {', '.join(ignored)}", file=sys.stderr)
    dataset, longest_canvas = packed_rows(recipe, canvases, examples)
    args.max_steps = len(dataset) // recipe.training.global_batch_size
    check_schedule(recipe.training, args.max_steps, is_main)
    check_curriculum(recipe, args.max_steps)
    resharding = read_on_any_ranks(checkpoint, args)
    sampled = None
    if recipe.training.sample_steps:
        positions = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
        sampled = sample_prompt(recipe, tokenizer, examples, positions or sys.maxsize)
    # 4. The loop.
    model = prepared(folder, recipe, spec, args)
    if is_main:
        save_provenance(recipe, about, output_dir)
        remove_unfinished(output_dir, checkpoint)
        print(summary(dataset, checkpoint, args), file=sys.stderr)
    trainer = DiffusionTrainer(
        recipe,
        canvases,
        longest_canvas,
        about,
        teacher_of(recipe, model, folder, args),
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[MetricsFile(output_dir / "metrics.jsonl"), Progress(), *resharding],
    )
    if recipe.training.report_to:
        trainer.add_callback(RecipeInTrackers(trainer, recipe))
    if sampled is not None:
        trainer.add_callback(Samples(trainer, trainer.metrics, recipe, spec, sampled))
    with failures_name_the_checkpoint(output_dir), trainer.guard.heeding_sigterm():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.guard.terminated:
            raise Terminated(
                f"SIGTERM: {whole_checkpoints(output_dir)[-1]} is saved; start the same command again to go on from it"
            )
        trainer.guard.told(trainer)
        final = output_dir / "model"
        save_final(trainer, recipe, folder, final)
    return final


def _quiet_libraries() -> None:
    """Leaves the console to us: one bar, and one line for what happens, on rank 0."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if int(os.environ.get("RANK", "0")) != 0:
        disable_progress_bars()
    for name in ("accelerate", "bitsandbytes", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed|accelerate|peft")


def main(argv: list[str]) -> int:
    """The `adapt train` command, and what `recipes/train.py` runs on every rank; 143 after SIGTERM, as a shell would say."""
    _quiet_libraries()
    is_main = int(os.environ.get("RANK", "0")) == 0
    try:
        final = train(parse_recipe(argv, __doc__))
    except Terminated as saved:
        if is_main:
            print(f"adapt train: {saved}", file=sys.stderr)
        _leave_the_ranks()
        return 128 + signal.SIGTERM
    except Exception:
        wait_for_rank_zero()
        raise
    if is_main:
        print(f"{final}", file=sys.stderr)
    _leave_the_ranks()
    return 0


def _leave_the_ranks() -> None:
    """Ends gloo's threads: one that still runs at the interpreter's exit aborts it now and then, and a finished run would
    count as a failed one (pytorch/pytorch#190489). After an error they are left: joining them could wait on another rank.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
