"""The rows of a run: which examples fit, how long the run is, and what it says of itself before it starts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import TrainingArguments

from ..recipe import Recipe
from .batch import PackedRows
from .examples import drop_too_long, lengths
from .packing import Packing
from .views import Canvases


def whole_copies(recipe: Recipe, canvases: Canvases, examples: Dataset, is_main: bool) -> Dataset:
    """The examples that fit into a row with all their copies, in any epoch: a run of days must not end at one long tail."""
    needed = canvases.room_needed(lengths(examples, "context"), lengths(examples, "target"))
    what, todo = "take more with all their copies", ", or lower objective.views"
    return drop_too_long(examples, needed, recipe.data, is_main, what=what, todo=todo)


def packed_rows(recipe: Recipe, canvases: Canvases, examples: Dataset) -> tuple[PackedRows, int]:
    """(the rows that the run reads; tokens of the longest stretch in which attention is bidirectional)."""
    ours = recipe.training
    contexts, targets = lengths(examples, "context"), lengths(examples, "target")
    packing = Packing(partial(canvases.sizes, contexts, targets), recipe.data.seq_len, ours.seed)
    num_steps = ours.num_steps or packing.num_rows(ours.num_epochs or 0) // ours.global_batch_size
    if num_steps == 0:
        raise ValueError(
            f"training.num_epochs={ours.num_epochs}: the data has {packing.num_rows(1)} packed rows an epoch, too few for one "
            f"step of training.global_batch_size={ours.global_batch_size}; lower it, or set training.num_steps"
        )
    longest_canvas = canvases.longest_canvas(contexts, targets)
    rows = PackedRows(examples, packing, canvases, num_steps * ours.global_batch_size, ours.global_batch_size)
    return rows, longest_canvas


def check_positions(recipe: Recipe, examples: Dataset, positions: int | None) -> None:
    """ValueError for an example with tokens at positions that the model does not have (None: it does not say how many it has)."""
    longest = int((lengths(examples, "context") + lengths(examples, "target")).max(initial=0))
    if positions is not None and longest > positions:
        raise ValueError(
            f"data.seq_len={recipe.data.seq_len}: an example takes {longest} positions, and model.base={recipe.model.base} has "
            f"{positions}; set data.seq_len={positions} (with data.too_long=drop where prompts are longer), or choose another base"
        )


def check_curriculum(recipe: Recipe, num_steps: int) -> None:
    """ValueError if attention would not have reached, by the end, what the checkpoint says of it."""
    objective = recipe.objective
    for setting, last in (
        ("block_sizes", max(objective.block_sizes, default=0)),
        ("anneal_steps", objective.anneal_steps),
    ):
        if last and last >= num_steps:
            raise ValueError(
                f"objective.{setting}={getattr(objective, setting)}: the run has {num_steps} steps, so attention would never be "
                f"what the checkpoint says; let it end before step {num_steps}"
            )


def summary(rows: PackedRows, checkpoint: Path | None, args: TrainingArguments) -> str:
    """One line: how many rows, how full, how many steps of how many, and from where."""
    packing = rows.packing
    per_epoch = packing.num_rows(1)
    fill = packing.sizes(0).sum() / (per_epoch * packing.seq_len)
    how = f"from step {checkpoint.name.rsplit('-', 1)[1]} ({checkpoint})" if checkpoint else "from the start"
    return (
        f"{packing.num_examples:,} examples in {per_epoch:,} rows of {packing.seq_len} tokens ({fill:.0%} full); "
        f"{args.max_steps:,} steps of {len(rows) // args.max_steps} rows on {args.world_size} rank{'s' * (args.world_size > 1)}, {how}"
    )
