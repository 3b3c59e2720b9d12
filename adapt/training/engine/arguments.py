"""What a recipe means to transformers and DeepSpeed: the TrainingArguments, and the DeepSpeed config held against the recipe."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

import torch
import transformers
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import SchedulerType, set_seed
from transformers.training_args import OptimizerNames

from ... import progress
from ..recipe import Recipe
from ..sections import TrainingConfig
from ..watch.trackers import PROJECT
from .build_locks import check_build_locks
from .ds_config import check_agrees, leave_to_the_recipe, nvme_sections, read_ds_config
from .nvme import prepare_nvme
from .ports import check_master_port, free_port
from .shared_buffers import make_room

_ADAMW = ("adamw_torch", "adamw_torch_fused")
_BITSANDBYTES = tuple(kind.value for kind in OptimizerNames if "8bit" in kind.value or "paged" in kind.value)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    ours = recipe.training
    set_seed(ours.seed)
    for tracker in ours.report_to:
        importlib.import_module(tracker)
    _check_known("training.lr_scheduler", ours.lr_scheduler, [kind.value for kind in SchedulerType])
    _check_known("training.optimizer", ours.optimizer, [kind.value for kind in OptimizerNames])
    if recipe.model.quantization or ours.optimizer in _BITSANDBYTES:
        importlib.import_module("bitsandbytes")  # if it is missing, now and not when weights are loaded
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_master_port()
    args = TrainingArguments(
        output_dir=ours.output_dir,
        max_steps=ours.num_steps or 1,
        per_device_train_batch_size=ours.micro_batch_size,
        gradient_accumulation_steps=ours.accumulation_steps(world_size),
        deepspeed=_deepspeed(ours, world_size),
        learning_rate=ours.learning_rate,
        lr_scheduler_type=ours.lr_scheduler,
        lr_scheduler_kwargs=ours.lr_scheduler_options or None,
        warmup_steps=ours.warmup_steps,
        weight_decay=ours.weight_decay,
        max_grad_norm=ours.max_grad_norm,
        adam_beta2=ours.adam_beta2,
        optim=ours.optimizer,
        bf16=ours.precision == "bf16",
        seed=ours.seed,
        logging_steps=ours.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if ours.save_steps else "no",
        save_steps=ours.save_steps or 500,
        report_to=ours.report_to or "none",
        run_name=os.path.basename(os.path.normpath(ours.output_dir)),
        project=PROJECT,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # or each pinned tensor is waited for
        label_names=["targets"],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() or world_size == 1 else "gloo",
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one GPU: never transformers' nn.DataParallel over all it sees
    return args


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What a run multiplies in, and what its final folder holds."""
    assert recipe.training.precision != "auto", "resolved when a run or a plan begins"
    return torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32


def _check_known(setting: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{setting}={value}: choose one of {', '.join(sorted(allowed))}")


def check_schedule(ours: TrainingConfig, num_steps: int, is_main: bool) -> None:
    """ValueError if the schedule refuses its options, which else shows only when all weights are loaded.

    A warm-up that does not end within the run is said and not refused: recipes are tried with a few steps first.
    """
    if is_main and ours.lr_scheduler != "constant" and ours.warmup_steps >= num_steps:
        print(
            f"training.warmup_steps={ours.warmup_steps}: the run has {num_steps} steps, so it never trains at "
            f"training.learning_rate={ours.learning_rate:g}; lower it",
            file=sys.stderr,
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=ours.learning_rate)
    try:
        scheduler = transformers.get_scheduler(
            ours.lr_scheduler,
            optimizer,
            ours.warmup_steps,
            num_steps,
            scheduler_specific_kwargs=ours.lr_scheduler_options,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training.lr_scheduler_options={ours.lr_scheduler_options}: training.lr_scheduler={ours.lr_scheduler} does not take "
            f"them, or needs others: {error}"
        ) from error
    if ours.max_minutes is not None and not hasattr(scheduler, "lr_lambdas"):
        raise ValueError(
            f"training.lr_scheduler={ours.lr_scheduler}: is no function of the step, which training.max_minutes needs; choose "
            "cosine, linear, warmup_stable_decay ..., or set training.max_minutes=null"
        )


def _deepspeed(ours: TrainingConfig, world_size: int) -> dict | None:
    """The DeepSpeed config, for transformers to fill in; ValueError where the run that it describes could not end well."""
    if ours.deepspeed is None:
        return None
    config = read_ds_config(ours.deepspeed)
    leave_to_the_recipe(config)
    check_agrees(config, ours, world_size)
    offload = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    if offload != "none" and ours.optimizer not in _ADAMW:
        # accelerate 1.15 swaps in DeepSpeed's CPU Adam, without weight decay's decoupling, and does not say so
        raise ValueError(
            f"training.optimizer={ours.optimizer}: training.deepspeed={ours.deepspeed} offloads the optimizer, which DeepSpeed "
            f"does for AdamW only; choose one of {', '.join(_ADAMW)}, or a DeepSpeed config without offload_optimizer"
        )
    if offload == "nvme" and ours.save_steps:
        # DeepSpeed 0.19.8: the resumed curve is off by 2e-4 in the next step and by 14% in the one after; from CPU it is right
        raise ValueError(
            f"training.save_steps={ours.save_steps}: DeepSpeed does not read an optimizer on NVMe back rightly, so a run cannot "
            f"resume; leave it out, or use a copy of {ours.deepspeed} with offload_optimizer.device=cpu"
        )
    if offload == "nvme" and ours.minutes_between_checkpoints:
        progress.say("training.save_minutes: no checkpoints, as DeepSpeed cannot go on with an optimizer on NVMe")
    # What keeps a gradient that is not finite from the weights; training.on_bad_loss rests on it.
    for section, name in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if config.get(section, {}).get(name) is False:
            raise ValueError(
                f"training.on_bad_loss={ours.on_bad_loss}: deepspeed.{section}.{name}=false in {ours.deepspeed} would let a bad "
                "step into the weights; remove it from there"
            )
    import deepspeed
    from deepspeed.runtime import utils

    if not hasattr(utils, "is_invalid_grad_norm"):  # 0.18 updates the weights whatever the norm is
        raise ValueError(
            f"training.deepspeed={ours.deepspeed}: DeepSpeed {deepspeed.__version__} lets a bad step into the weights; run: "
            "pip install --upgrade deepspeed"
        )
    check_build_locks()
    prepare_nvme(ours, nvme_sections(config))
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    if "MASTER_PORT" not in os.environ:
        alone["MASTER_PORT"] = free_port()
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))  # one process, started without the launcher
    if not torch.cuda.is_available():
        make_room()
    # Before ZeRO-3 scatters weights: accelerate initialises torch's process group on CPU, but not DeepSpeed's view of it.
    with open(os.devnull, "w") as nowhere, nullcontext() if progress.debug else redirect_stdout(nowhere):
        # It prints that its operators are built, and has no switch for that.
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return config


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Inside, from_pretrained loads whole weights on this rank; under ZeRO-3 it would scatter them over the ranks."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed is not None:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
