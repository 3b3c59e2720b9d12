"""A recipe becomes a trained checkpoint (or its AR control), with transformers' Trainer, alone or under DeepSpeed.

    train(parse_recipe(["--config", "recipes/smollm2-135m/prefix.yaml"]))

The run is one list of packed rows (`data/packing.py`); a step reads the next global_batch_size of them. Its loss is divided once,
by the tokens of that whole global batch, so the curve is the same for any split over ranks and accumulation steps.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from .. import progress
from ..arguments import wait_for_rank_zero
from ..files.loading import config_of, tokenizer_of
from ..files.provenance import model_files
from ..model.precision import about_precision, resolved_precision
from ..spec import DiffusionSpec
from .checkpoints.pickles import check_checkpoint, errors_while_reading
from .checkpoints.reshard import read_on_any_ranks
from .checkpoints.resume import (
    begun_precision,
    check_not_past,
    check_same_model,
    finished_run,
    newest_checkpoint,
    remove_unfinished,
)
from .checkpoints.run_folder import (
    begin_run,
    check_no_others_results,
    check_nothing_in_the_way,
    check_run_folder,
    results_in,
    run_lock,
    save_provenance,
)
from .checkpoints.save import provenance_of, save_final
from .checkpoints.seal import gathered
from .data.examples import load_examples
from .data.files import check_unchanged, stamps
from .data.held_out import Rows, held_out_rows, load_split
from .data.run_rows import check_curriculum, check_positions, packed_rows, summary, whole_copies
from .data.views import Canvases
from .engine.arguments import check_schedule, training_arguments, whole_weights
from .interruption import Interrupted, failures_name_the_checkpoint
from .loss.distill import teacher_of
from .recipe import Recipe, ignored_by_ar
from .start_model import check_base, check_it_can_be_saved, diffusion_checkpoint, prepared
from .trainer import DiffusionTrainer
from .watch.evaluation import Evaluation
from .watch.metrics import MetricsFile
from .watch.progress import Progress
from .watch.samples import Samples, sample_prompt
from .watch.trackers import RecipeInTrackers

_CAUSAL = DiffusionSpec(
    attention="prefix", mask_token_id=-1
)  # for objective.name=ar, which lays no canvas and draws no noise


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its end and returns the folder of the final model, which `from_pretrained` loads.

    Raises ValueError for settings that do not fit together, before weights are loaded or anything is written; Interrupted
    after SIGTERM or Ctrl-C, when a checkpoint has been saved.
    """
    # 1. Everything that can be refused cheaply.
    output_dir = check_run_folder(recipe.training.output_dir)
    recipe = _with_precision(recipe)
    if finished := finished_run(recipe):
        return finished
    check_base(recipe)
    what = (
        "preparing torch" if recipe.training.deepspeed is None else "starting DeepSpeed (its operators are built once)"
    )
    with progress.doing(what):
        args = training_arguments(recipe)
    if len(found := set(gathered(recipe.training.precision))) > 1:
        raise ValueError(
            f"training.precision=auto: the ranks chose {' and '.join(sorted(found))}, they are different machines; say bf16 or fp32"
        )
    with progress.doing("checking the checkpoints and hashing the data"):
        check_nothing_in_the_way(output_dir)
        results = results_in(output_dir)
        checkpoint = newest_checkpoint(recipe)
        check_checkpoint(checkpoint)
        unread = stamps(recipe.data)
        provenance = provenance_of(recipe, args.world_size)
    with progress.doing("reading the data"), args.main_process_first(local=False):
        rows = load_split(recipe.data)
    check_unchanged(recipe.data, unread)
    with run_lock(output_dir) if args.process_index == 0 else nullcontext():
        if args.process_index == 0:
            check_no_others_results(output_dir, results)
        return _train(recipe, args, checkpoint, provenance, rows)


def _with_precision(recipe: Recipe) -> Recipe:
    """The recipe with `auto` resolved: as the run began that it goes on, else as this machine computes; said on rank 0."""
    asked = recipe.training.precision
    kept = begun_precision(recipe) if asked == "auto" else None
    line = f"precision auto: {kept}, as this run began" if kept else about_precision(asked)
    if line:
        progress.say(line)
    precision = kept or resolved_precision(asked)
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, precision=precision))


def _train(
    recipe: Recipe, args: TrainingArguments, checkpoint: Path | None, provenance: dict[str, Any], rows: Rows
) -> Path:
    """The run itself."""
    output_dir, is_main = Path(recipe.training.output_dir), args.process_index == 0
    # 2. The checkpoint: converted first if it is a causal LM, and probed.
    if is_main:
        begin_run(output_dir)
    with progress.doing("preparing the checkpoint"), args.main_process_first(local=False), whole_weights(args):
        folder = diffusion_checkpoint(recipe, output_dir, is_main)
    provenance |= {"model": model_files(folder)}
    check_same_model(recipe, checkpoint, folder, provenance["model"])
    what = f"model.base={recipe.model.base}"
    config, tokenizer = config_of(folder, what), tokenizer_of(folder, what)
    check_it_can_be_saved(tokenizer, recipe.model.base)
    positions = max(getattr(config, "max_position_embeddings", None) or 0, 0) or None
    spec = _CAUSAL if recipe.objective.name == "ar" else DiffusionSpec.of(config, folder)
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
    with progress.doing("tokenising"), args.main_process_first(local=False):
        examples = load_examples(
            recipe.data,
            tokenizer,
            rows=rows.train,
            piece_length=canvases.piece_length(recipe.data.seq_len),
            is_main_process=is_main,
        )
        if rows.held_out is not None:
            held_out = held_out_rows(recipe, canvases, tokenizer, rows.held_out, is_main)
    with progress.doing("packing rows"):
        examples = whole_copies(recipe, canvases, examples, is_main)
        check_positions(recipe, examples, positions)
        dataset, longest_canvas = packed_rows(recipe, canvases, examples)
    if is_main and canvases.is_ar and (ignored := ignored_by_ar(recipe)):
        progress.say(f"objective.name=ar: draws no noise, so it ignores {', '.join(ignored)}")
    args.max_steps = len(dataset) // recipe.training.global_batch_size
    check_not_past(checkpoint, args.max_steps)
    check_schedule(recipe.training, args.max_steps, is_main)
    check_curriculum(recipe, args.max_steps)
    evaluation = None if rows.held_out is None else Evaluation(recipe, held_out, args.max_steps)
    resharding = read_on_any_ranks(checkpoint, args)
    sampled = None
    if recipe.training.sample_steps:
        sampled = sample_prompt(recipe, tokenizer, examples, positions or sys.maxsize)
    # 4. The loop.
    with progress.doing("loading the weights"):
        model = prepared(folder, recipe, spec, args)
        teacher = teacher_of(recipe, model, folder, args)
    if is_main:
        save_provenance(recipe, provenance, output_dir)
        remove_unfinished(output_dir, checkpoint)
        progress.say(summary(dataset, checkpoint, args))
    trainer = DiffusionTrainer(
        recipe,
        canvases,
        longest_canvas,
        provenance,
        teacher,
        evaluation,
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[MetricsFile(output_dir / "metrics.jsonl"), Progress(output_dir / "metrics.jsonl"), *resharding],
    )
    if recipe.training.report_to:
        trainer.add_callback(RecipeInTrackers(trainer, recipe))
    if sampled is not None:
        trainer.add_callback(Samples(trainer, trainer.metrics, recipe, spec, sampled))
    with failures_name_the_checkpoint(output_dir), trainer.requests.heeding_signals():
        with progress.doing("preparing the loop" if checkpoint is None else f"reading {checkpoint.name}"):
            with errors_while_reading(checkpoint, trainer):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.requests.raise_if_stopped(trainer.state.global_step)
        trainer.guard.report_bad_steps(trainer)
        final = output_dir / "model"
        with progress.doing(f"writing {final}"):
            save_final(trainer, recipe, folder, final, provenance["model"])
        trainer.requests.raise_if_asked_too_late(trainer.state.global_step, final)
    return final


def _share_cores() -> None:
    """Ranks on CPU that share a machine take their part of its cores each, where OMP_NUM_THREADS does not say how many."""
    ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)  # DeepSpeed's, torchrun's
    if ranks_here == 1 or torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // ranks_here))


def run(recipe: Recipe) -> int:
    """The exit code of a rank that trains the recipe; after a signal 128 + its number."""
    _share_cores()
    is_main = int(os.environ.get("RANK", "0")) == 0
    try:
        final = train(recipe)
    except Interrupted as saved:
        if is_main:
            print(f"adapt train: {saved}", file=sys.stderr)
        _leave_the_ranks()
        return saved.exit_code
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
