"""What a plan prints: bytes of each rank by kind, the largest micro-batch, and what to change."""

from __future__ import annotations

from typing import Any

from ..text_table import text_table
from ..training.recipe import Recipe
from .planner import Planner, Row

COLUMNS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "total")


def plan_json(rows: list[Row], cost: dict[str, Any]) -> dict[str, Any]:
    ways = [
        {
            "way": str(row.zero),
            "is_recipes": row.is_recipes,
            "largest_micro_batch": row.largest_micro_batch,
            **{name: getattr(row.peak, name) for name in (*COLUMNS, "moment", "host", "disk")},
        }
        for row in rows
    ]
    return {"bytes_per_rank": ways, **cost}


def plan_table(planner: Planner, rows: list[Row], cost: dict[str, Any], given: Any) -> str:
    recipe, weights = planner.recipe, planner.weights(False)
    ranks = _counted(planner.gpus, "GPU" if given.device == "cuda" else "CPU process")
    in_micro_batch = _counted(recipe.training.micro_batch_size, "row")
    lines = [
        f"{recipe.model.base}: {weights.count / 1e6:,.1f}M parameters, {weights.trained / 1e6:,.1f}M trained; {ranks}, "
        f"{in_micro_batch} of {recipe.data.seq_len} tokens in a micro-batch, {planner.kernel}",
        "",
    ]
    head = ["GB of each rank", *COLUMNS, "fullest at", "in host memory"]
    head += ["on disk"] * any(row.peak.disk for row in rows)
    head += [] if given.gpu_memory is None else [f"largest micro-batch in {given.gpu_memory:g} GB"]
    cells = [head]
    for row in rows:
        cell = [f"{'*' if row.is_recipes else ' '} {row.zero}"]
        cell += [f"{getattr(row.peak, name) / 1e9:.2f}" for name in COLUMNS] + [row.peak.moment]
        cell += [f"{row.peak.host / 1e9:.2f}"] + [f"{row.peak.disk / 1e9:.2f}"] * ("on disk" in head)
        cell += [] if row.largest_micro_batch is None else [str(row.largest_micro_batch or "none fits")]
        cells.append(cell)
    lines += text_table(cells)
    lines += ["* as the recipe has it", *legend(recipe, rows[0]), *_fit(recipe, rows[0], planner.gpus, given), ""]
    micro_batches = _counted(cost["accumulation_steps"], "micro-batch")
    lines.append(
        f"a step: {_counted(recipe.training.global_batch_size, 'row')}, {micro_batches} on each rank, "
        f"{cost['positions_per_step']:,} positions, {cost['clean_tokens_per_step']:,} clean tokens if rows are full"
    )
    if "seconds_per_step" in cost:
        of_run = f"; {cost['hours']:,.1f} hours for {cost['train_tokens']:,.0f}" if "hours" in cost else ""
        rate = f"{cost['clean_tokens_per_s_of_one']:,.0f} clean tokens/s of each rank ({cost['rate_source']})"
        lines.append(f"time at {rate}: {cost['seconds_per_step']:,.2f} s a step{of_run}")
    more = ["--gpu_memory GB adds the largest micro-batch that fits"] * (given.gpu_memory is None)
    more += ["--tokens_per_s or --benchmark adds the time"] * ("seconds_per_step" not in cost)
    more += ["--train_tokens adds the hours"] * ("seconds_per_step" in cost and "hours" not in cost)
    return "\n".join([*lines, *(["; ".join(more)] if more else [])])


def _counted(number: int, word: str) -> str:
    ending = "" if number == 1 else "es" if word.endswith(("s", "ch")) else "s"
    return f"{number:,} {word}{ending}"


def legend(recipe: Recipe, own: Row) -> list[str]:
    """What each way keeps on a rank, for a reader who does not know ZeRO."""
    is_bf16 = recipe.training.precision == "bf16"
    whole = "weights, gradients and optimizer whole on each rank"
    plain = f"no DeepSpeed: {whole}, in float32{'; only the computing is in bf16' * is_bf16}"
    zero_0 = (
        f"ZeRO-0: {whole}, weights and gradients in bf16; its optimizer keeps a float32 copy of the weights, and its step makes "
        "one of the gradients (in buffers)"
        if is_bf16
        else f"ZeRO-0: {whole}, in float32"
    )
    split = (
        "ZeRO-1 splits the optimizer over the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too (those gathered at a time "
        "are in buffers)"
    )
    return [*([plain] if own.zero.stage is None else []), zero_0, split]


def _fit(recipe: Recipe, own: Row, gpus: int, given: Any) -> list[str]:
    """What the largest micro-batch is chosen from, and what to do where the recipe's own does not fit."""
    if own.largest_micro_batch is None:
        return []
    room = f"{given.gpu_memory:g} GB less the {given.reserve:.0%} kept free by --reserve"
    rows = _counted(recipe.training.global_batch_size // gpus, "row")
    lines = [f"largest micro-batch: of those that divide the {rows} of a step and rank, into {room}"]
    if own.peak.total <= given.gpu_memory * 1e9 * (1 - given.reserve):
        return lines
    checkpointing = "" if recipe.model.gradient_checkpointing else "--model.gradient_checkpointing true, or "
    todo = (
        f"--training.micro_batch_size {own.largest_micro_batch}"
        if own.largest_micro_batch
        else f"{checkpointing}a way above that fits, --training.deepspeed zero3_offload, or more GPUs"
    )
    return [*lines, f"the recipe does not fit as it is: try {todo}"]
