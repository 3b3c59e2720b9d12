"""Who holds what under DeepSpeed ZeRO: weights, gradients, optimizer and copies of one rank, in bytes.

ZeRO, arXiv:1910.02054, section 3, with what DeepSpeed 0.19 keeps besides: a float32 gradient of its part during the optimizer
step, a bucket for reductions, under ZeRO-3 the weights that are gathered at a time. bf16 under DeepSpeed means weights and
gradients in 2 bytes and float32 master weights; without DeepSpeed weights, gradients and optimizer are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training.engine.ds_config import read_ds_config
from ..training.recipe import Recipe

# Bytes of optimizer state for each trained number. 8-bit states have a float32 scale for each block of 256; bitsandbytes
# 0.50 keeps tensors of less than 4,096 numbers in float32. arXiv:2110.02861.
_ADAM, _ADAM_8BIT = 8.0, 2 + 2 * 4 / 256
_SMALL_8BIT = 4096
OPTIMIZERS = {
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "adamw_8bit": _ADAM_8BIT,
    "adamw_bnb_8bit": _ADAM_8BIT,
    "paged_adamw_8bit": _ADAM_8BIT,
    "paged_adamw": _ADAM,
    "paged_adamw_32bit": _ADAM,
}
# DeepSpeed's defaults, for what a JSON leaves out: elements.
_BUCKET, _LIVE, _SUB_GROUP = 5e8, 1e9, 1e9


@dataclass(frozen=True)
class Zero:
    """One way to hold a model over several ranks."""

    stage: int | None
    """None: without DeepSpeed"""
    optimizer_on: str = "gpu"
    """gpu, cpu or nvme"""
    parameters_on: str = "gpu"
    bucket: float | None = None
    """elements; None: hidden size squared, as transformers fills in"""
    overlap: bool = False
    live: float = _LIVE
    """elements that ZeRO-3 gathers, at most, or one layer"""
    sub_group: float = _SUB_GROUP

    def __str__(self) -> str:
        if self.stage is None:
            return "no DeepSpeed"
        places = [
            f"{what} on {place}" for what, place in (("weights", self.parameters_on), ("optimizer", self.optimizer_on))
        ]
        return ", ".join([f"ZeRO-{self.stage}", *(place for place in places if not place.endswith("gpu"))])


@dataclass(frozen=True)
class Weights:
    """What the model itself takes."""

    count: int
    """parameters; 4-bit ones counted one by one"""
    trained: int
    bytes: int
    """of all weights and buffers, as the model is held for multiplication"""
    trained_bytes: int
    optimizer_bytes: float
    """of the states of all trained weights"""
    frozen_copy_bytes: int
    """a second copy for distillation, whole on every rank"""
    largest: int
    """elements of the largest weight"""
    hidden_size: int

    @staticmethod
    def of(model: Any, recipe: Recipe) -> Weights:
        optimizer = recipe.training.optimizer
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"training.optimizer={optimizer}: its memory is not known here; choose one of {', '.join(sorted(OPTIMIZERS))}"
            )
        tensors = list(model.parameters())
        trained = [p for p in tensors if p.requires_grad]
        small = 0 if OPTIMIZERS[optimizer] == _ADAM else sum(p.numel() for p in trained if p.numel() < _SMALL_8BIT)
        in_trained = sum(p.numel() for p in trained)
        count = sum(p.numel() * (2 if p.dtype.itemsize == 1 else 1) for p in tensors)
        has_copy = recipe.objective.distill_weight and recipe.objective.name != "ar" and recipe.model.lora is None
        return Weights(
            count=count,
            trained=in_trained,
            bytes=sum(x.numel() * x.element_size() for x in [*tensors, *model.buffers()]),
            trained_bytes=sum(p.numel() * p.element_size() for p in trained),
            optimizer_bytes=(in_trained - small) * OPTIMIZERS[optimizer] + small * _ADAM,
            frozen_copy_bytes=count * (2 if recipe.training.precision == "bf16" else 4) if has_copy else 0,
            largest=max(p.numel() for p in tensors),
            hidden_size=model.config.hidden_size,
        )


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank at its fullest moment."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    """DeepSpeed's and DDP's buckets, and copies that an optimizer step makes"""
    moment: str
    """forward and backward pass, or optimizer step"""
    host: float
    """of offloaded weights and states, in the machine's memory"""
    disk: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


def zero_of(recipe: Recipe) -> Zero:
    """How the recipe's training.deepspeed holds the model."""
    name = recipe.training.deepspeed
    if name is None:
        return Zero(None)
    config = read_ds_config(name)
    section = config.get("zero_optimization", {})

    def number(key: str, default: float | None) -> float | None:
        value = section.get(key, default)
        return None if value == "auto" else value

    place = {key: (section.get(f"offload_{key}") or {}).get("device", "none") for key in ("optimizer", "param")}
    stage = section.get("stage", 0)
    return Zero(
        stage=stage,
        optimizer_on=place["optimizer"].replace("none", "gpu"),
        parameters_on=place["param"].replace("none", "gpu"),
        bucket=number("reduce_bucket_size", _BUCKET),
        overlap=bool(section.get("overlap_comm", stage == 3)),
        live=number("stage3_max_live_parameters", _LIVE) or _LIVE,
        sub_group=number("sub_group_size", _SUB_GROUP) or _SUB_GROUP,
    )


def zero_stages(recipe: Recipe) -> list[Zero]:
    """The recipe's own way, then the stages of DeepSpeed beside it, offloading where the recipe does and the stage can."""
    own = zero_of(recipe)
    others = [
        Zero(
            stage=stage,
            optimizer_on=own.optimizer_on if stage > 0 else "gpu",
            parameters_on=own.parameters_on if stage == 3 else "gpu",
            overlap=stage > 1,
        )
        for stage in (0, 1, 2, 3)
        if stage != own.stage
    ]
    return [own, *others]


def peak(zero: Zero, weights: Weights, held: np.ndarray, ranks: int, accumulates: bool) -> Peak:
    """What a rank holds at its fullest moment. held: `footprint.Timeline.held`; accumulates: several micro-batches in a step."""
    n, trained, stage = ranks, weights.trained, zero.stage
    scattered = stage in (2, 3)
    # 1. What stays through the step.
    parameters = float(weights.bytes)
    optimizer, master = weights.optimizer_bytes, 4.0 * trained
    buffers = held_gradients = step_copies = host = disk = 0.0
    if stage is None:
        buffers = 0.0 if n == 1 else float(weights.trained_bytes)  # DistributedDataParallel's buckets
    elif stage == 0:
        is_bf16 = weights.trained_bytes < 4 * trained
        optimizer += master if is_bf16 else 0
        step_copies = 4.0 * trained if is_bf16 else 0
    else:
        optimizer = (optimizer + master) / n
        element = weights.trained_bytes / trained
        bucket = zero.bucket if zero.bucket is not None else weights.hidden_size**2
        buffers = element * bucket * (2 if zero.overlap else 1)
        step_copies = (4.0 + element) * trained / n
        if stage == 3:
            gathered = weights.bytes / weights.count * min(weights.count, max(zero.live, weights.largest))
            buffers += gathered
            parameters, step_copies = parameters / n, 4.0 * min(trained / n, zero.sub_group)
        held_gradients = weights.trained_bytes / n if scattered else 0.0
        if zero.optimizer_on != "gpu":  # float32 gradients of its part lie with the states
            moved = optimizer + 4.0 * trained / n
            buffers += element * weights.largest
            optimizer = step_copies = held_gradients = 0.0
            host, disk = (moved, disk) if zero.optimizer_on == "cpu" else (host, moved)
        if zero.parameters_on != "gpu":
            host, disk = (host + parameters, disk) if zero.parameters_on == "cpu" else (host, disk + parameters)
            parameters = 0.0
    parameters += weights.frozen_copy_bytes
    # 2. The fullest moment of a forward and backward pass, or the optimizer step after it.
    passing = scattered or accumulates
    if accumulates and not scattered:
        held_gradients = float(weights.trained_bytes)
    moments = held[:, :2].sum(1) + held[:, 3 if passing else 2] + held_gradients
    fullest = int(moments.argmax())
    whole = held_gradients if scattered else float(weights.trained_bytes)
    if whole + step_copies > moments[fullest]:
        return Peak(parameters, whole, optimizer, 0, 0, buffers + step_copies, "optimizer step", host, disk)
    activations, logits = held[fullest, :2]
    gradients = moments[fullest] - activations - logits
    return Peak(parameters, gradients, optimizer, activations, logits, buffers, "backward pass", host, disk)
