"""What a recipe will cost before it starts: memory of each GPU for each ZeRO stage, the largest micro-batch, the time.

    adapt plan --config recipes/qwen3-0.6b/block.yaml --gpus 8 --gpu_memory 80
    adapt plan --config recipes/qwen3-0.6b/block.yaml --gpus 8 --tokens_per_s 9000 --train_tokens 1e9
    adapt plan --config recipes/qwen3-0.6b/block.yaml --model_config recipes/qwen3-0.6b/config.json --training.micro_batch_size 8

Only the model's config.json is read, from its folder, the Hub or --model_config; no weights are loaded and no memory is taken.
Activations and logits are those of the step itself, run on tensors without data (`footprint.py`); weights, optimizer and
DeepSpeed's copies are counted (`zero_memory.py`). GB are 1e9 bytes. Rows are taken to be full, of text that is all target:
the most that data.seq_len allows. Not seen: CUDA's context, NCCL, kernels' workspaces and fragmentation, for which
--reserve is kept free.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig

from .arguments import CommandParser
from .checkpoint import DiffusionSpec, check_model_folder
from .config import Recipe, check_files
from .footprint import Timeline, trace
from .prepare import attention_kernel
from .rate import benchmark_rate
from .shape_model import shape_model
from .source import check_architecture
from .zero_memory import Peak, Weights, Zero, peak, zero_of, zero_stages

COLUMNS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "total")


@dataclass(frozen=True)
class Row:
    """One way to run the recipe, and what each of its ranks holds at the fullest moment."""

    zero: Zero
    is_recipes: bool
    peak: Peak
    largest_micro_batch: int | None = None
    """that fits and that training.global_batch_size divides into; None: not asked for, 0: none fits"""


class Planner:
    """Traces a recipe's step once for each micro-batch size that is asked about."""

    def __init__(self, recipe: Recipe, config: PretrainedConfig, *, gpus: int, device: str = "cuda") -> None:
        recipe.training.accumulation_steps(gpus)
        self.recipe, self.config, self.gpus, self.device = recipe, config, gpus, device
        self.kernel = attention_kernel(recipe, config, device)
        self._model = cache(self._model)
        self.timeline = cache(self.timeline)

    def _model(self, deepspeed: bool) -> Any:
        return shape_model(self.recipe, self.config, deepspeed=deepspeed)

    def weights(self, deepspeed: bool) -> Weights:
        return Weights.of(self._model(deepspeed), self.recipe)

    def timeline(self, stage: int | None, micro_batch: int) -> Timeline:
        options = {"micro_batch": micro_batch, "kernel": self.kernel, "stage": stage, "device": self.device}
        return trace(self.recipe, self._model(stage is not None), **options)

    def peak(self, zero: Zero, micro_batch: int | None = None) -> Peak:
        """What a rank holds at its fullest moment; micro_batch None: the recipe's."""
        ours = self.recipe.training
        micro_batch = micro_batch or ours.micro_batch_size
        accumulates = ours.global_batch_size > micro_batch * self.gpus
        weights = self.weights(zero.stage is not None)
        traced = zero.stage if zero.stage in (None, 3) else 2  # stages 0 to 2 run the same operations
        return peak(zero, weights, self.timeline(traced, micro_batch).held, self.gpus, accumulates)

    def largest_micro_batch(self, zero: Zero, memory: float) -> int:
        """The largest that fits into `memory` bytes and divides the rows of a step and rank; 0: not even 1 does."""
        ours, own = self.recipe.training, self.peak(zero)  # which the table shows anyway
        rows = ours.global_batch_size // self.gpus
        sizes = [size for size in range(1, rows + 1) if rows % size == 0]
        growing = own.activations + own.logits
        room = memory - (own.total - growing)
        guess = ours.micro_batch_size * (room / growing if growing else room > 0)
        i = sum(size <= guess for size in sizes) - 1

        def fits(size: int) -> bool:
            return self.peak(zero, size).total <= memory

        while i + 1 < len(sizes) and fits(sizes[i + 1]):
            i += 1
        while i >= 0 and not fits(sizes[i]):
            i -= 1
        return sizes[i] if i >= 0 else 0


def own_peak(recipe: Recipe, config: PretrainedConfig, gpus: int) -> Peak:
    """What a rank of the recipe as it stands holds at its fullest moment."""
    return Planner(recipe, config, gpus=gpus).peak(zero_of(recipe))


def model_config(recipe: Recipe, path: Path | None, recipes: list[Path] | None = None) -> PretrainedConfig:
    """The architecture; ValueError where there is no config.json to read it from. recipes: files beside which one may lie."""
    base = recipe.model.base
    beside = [file.parent / "config.json" for file in recipes or [] if (file.parent / "config.json").is_file()]
    example = beside[-1] if beside else "recipes/qwen3-0.6b/config.json"
    if path is not None and not path.exists():
        raise ValueError(f"model_config={path}: no such file; give a model's config.json")
    if path is None and base.endswith(".gguf"):
        raise ValueError(f"model.base={base}: a GGUF file has no config.json; give the original's with --model_config")
    if path is None:
        check_model_folder(base, "model.base")
    try:
        config = AutoConfig.from_pretrained(base if path is None else path)
    except (OSError, ValueError) as error:
        if path is not None:
            raise ValueError(f"model_config={path}: is no model's config.json; give one, such as {example}") from error
        raise ValueError(
            f"model.base={base}: its config.json cannot be had here; give one with --model_config, such as {example}"
        ) from error
    if recipe.objective.name != "ar":
        check_architecture(config, base)  # a plan for what conversion refuses would be of no use
    return config


def resolved(recipe: Recipe, config: PretrainedConfig) -> Recipe:
    """The recipe with what it leaves to a diffusion checkpoint filled in."""
    if getattr(config, "diffusion", None) is None or recipe.objective.name == "ar":
        return recipe
    spec = DiffusionSpec.of(config, recipe.model.base)
    ours = dataclasses.replace(
        recipe.model,
        attention=recipe.model.attention or spec.attention,
        block_size=recipe.model.block_size or spec.block_size,
        clean_context=recipe.model.clean_context or spec.clean_context,
        shift_logits=spec.shift_logits if recipe.model.shift_logits is None else recipe.model.shift_logits,
    )
    return dataclasses.replace(recipe, model=ours)


def plan(planner: Planner, *, memory: float | None = None) -> list[Row]:
    """The recipe's own way first, then the ZeRO stages that it could take instead. memory: bytes that a rank may use."""
    rows = []
    for zero in tqdm(zero_stages(planner.recipe), desc="planning", unit="way", disable=None, leave=False):
        largest = None if memory is None else planner.largest_micro_batch(zero, memory)
        rows.append(Row(zero, zero == zero_of(planner.recipe), planner.peak(zero), largest))
    return rows


def main(argv: list[str]) -> None:
    """The `adapt plan` command."""
    parser = CommandParser(prog="adapt plan", description=__doc__)
    parser.add_argument("--config", action="config", help="a recipe; later arguments override it")
    parser.add_argument("--gpus", type=int, default=1, help="ranks of the run, over all nodes")
    parser.add_argument(
        "--gpu_memory", type=float | None, default=None, help="GB of each; finds the largest micro-batch"
    )
    parser.add_argument("--reserve", type=float, default=0.1, help="share of gpu_memory that is kept free")
    parser.add_argument("--tokens_per_s", type=float | None, default=None, help="clean tokens/s of one GPU")
    parser.add_argument(
        "--benchmark", type=Path | None, default=None, help="take it from a result of benchmarks/train.py"
    )
    parser.add_argument("--train_tokens", type=float | None, default=None, help="clean tokens of the run")
    parser.add_argument(
        "--model_config", type=Path | None, default=None, help="config.json, if model.base is not at hand"
    )
    parser.add_argument("--device", type=str, default="cuda", help="cuda or cpu")
    parser.add_argument("--json", type=bool, default=False, help="print JSON instead")
    parser.add_class_arguments(Recipe, as_group=False)
    check_files(parser, argv)
    given = parser.parse_args(argv)
    made = parser.instantiate(given)
    _check(given)
    recipe = Recipe(made.model, made.data, made.training, made.noise, made.objective)
    config = model_config(recipe, given.model_config, [Path(str(file)) for file in given.config or []])
    planner = Planner(resolved(recipe, config), config, gpus=given.gpus, device=given.device)
    memory = None if given.gpu_memory is None else given.gpu_memory * 1e9 * (1 - given.reserve)
    rows = plan(planner, memory=memory)
    rate, source = given.tokens_per_s, "given"
    if given.benchmark is not None:
        rate, source = benchmark_rate(given.benchmark, planner.recipe, planner.weights(False).count, given.device)
    cost = _cost(planner, rows[0].zero, rate, source, given.train_tokens)
    print(json.dumps(_as_json(rows, cost), indent=1) if given.json else _table(planner, rows, cost, given))


def _check(given: Any) -> None:
    if given.gpus < 1:
        raise ValueError(f"gpus={given.gpus}: must be at least 1")
    if given.device not in ("cpu", "cuda"):
        raise ValueError(f"device={given.device}: choose one of cpu, cuda")
    if not 0 <= given.reserve < 1:
        raise ValueError(f"reserve={given.reserve}: must be at least 0 and below 1")
    for name in ("gpu_memory", "tokens_per_s", "train_tokens"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}: must be above 0")
    if given.benchmark is not None and given.tokens_per_s is not None:
        raise ValueError("benchmark and tokens_per_s: both say how fast it is; give one of them")
    if given.benchmark is not None and not given.benchmark.is_file():
        raise ValueError(f"benchmark={given.benchmark}: no such file; give a report of benchmarks/train.py")
    if given.train_tokens is not None and given.benchmark is None and given.tokens_per_s is None:
        raise ValueError(f"train_tokens={given.train_tokens}: a time needs --tokens_per_s or --benchmark too")


def _cost(planner: Planner, zero: Zero, rate: float | None, source: str, train_tokens: float | None) -> dict[str, Any]:
    ours = planner.recipe.training
    timeline = planner.timeline(zero.stage, ours.micro_batch_size)
    clean = timeline.text_tokens // ours.micro_batch_size * ours.global_batch_size
    cost: dict[str, Any] = {
        "positions_per_step": ours.global_batch_size * planner.recipe.data.seq_len,
        "clean_tokens_per_step": clean,
        "accumulation_steps": ours.accumulation_steps(planner.gpus),
    }
    if rate is None:
        return cost
    cost |= {"clean_tokens_per_s_of_one": rate, "rate_source": source, "seconds_per_step": clean / rate / planner.gpus}
    tokens = train_tokens or (ours.num_steps and ours.num_steps * clean)
    return cost | ({"hours": tokens / rate / planner.gpus / 3600, "train_tokens": tokens} if tokens else {})


def _as_json(rows: list[Row], cost: dict[str, Any]) -> dict[str, Any]:
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


def _table(planner: Planner, rows: list[Row], cost: dict[str, Any], given: Any) -> str:
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
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        rest = "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"{row[0]:<{widths[0]}}  {rest}")
    lines += ["* as the recipe has it", *_legend(recipe, rows[0]), *_fit(recipe, rows[0], planner.gpus, given), ""]
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


def _legend(recipe: Recipe, own: Row) -> list[str]:
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
