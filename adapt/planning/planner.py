"""A recipe's step traced, for each way to hold the model: what a rank holds at its fullest moment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .. import progress
from ..conversion.base_model import check_architecture
from ..files.loading import config_of
from ..files.model_folder import check_model_folder
from ..model.precision import resolved_precision
from ..spec import DiffusionSpec
from ..training.recipe import Recipe
from ..training.start_model import attention_kernel
from .activations import Timeline, trace
from .shape_model import shape_model
from .zero import Peak, Weights, Zero, peak, zero_of, zero_stages


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
        precision = resolved_precision(recipe.training.precision, device)
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, precision=precision))
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
    if path is None and base.endswith(".gguf"):
        raise ValueError(f"model.base={base}: a GGUF file has no config.json; give the original's with --model_config")
    if path is None:
        check_model_folder(base, "model.base")
    todo = "plan a model of transformers' own architectures"
    what = f"model.base={base}" if path is None else f"model_config={path}"
    try:
        config = config_of(base if path is None else path, what, todo=todo)
    except (OSError, ValueError) as error:
        if path is not None:
            reason = str(error).removeprefix(f"{what}: ")
            raise ValueError(f"{what}: is no model's config.json; give one, such as {example} ({reason})") from error
        if isinstance(error, ValueError) and "no such folder here" not in str(error):
            raise
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
    ways = zero_stages(planner.recipe)
    with progress.doing("planning", total=len(ways)) as task:
        for zero in ways:
            largest = None if memory is None else planner.largest_micro_batch(zero, memory)
            rows.append(Row(zero, zero == zero_of(planner.recipe), planner.peak(zero), largest))
            task.update()
    return rows
