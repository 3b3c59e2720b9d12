"""The DeepSpeed JSON of a run: one that ships in launch/ds, or the user's own, made to agree with the recipe.

    config = read_ds_config("zero2")                 also a path: ~/mine.json
    leave_to_the_recipe(config)
    check_agrees(config, recipe.training, world_size)
    TrainingArguments(deepspeed=config, ...)         which fills in what the JSON leaves to it

The recipe is the only place where batch sizes, clipping and precision are set; the JSONs say "auto" there, and transformers fills
the value in. A JSON that says something else would win silently, so it is refused.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...files.user_text import user_json
from ...settings.bounds import shown
from ..sections import TrainingConfig

_STAGES = (0, 1, 2, 3)
_OR_NULL = ("offload_param", "offload_optimizer")
_SECTIONS = (
    *("bf16", "fp16", "optimizer", "optimizer.params", "zero_optimization"),
    *(f"zero_optimization.{name}" for name in _OR_NULL),
)
_GATHER = "stage3_gather_16bit_weights_on_model_save"


def shipped() -> list[str]:
    """Names of the JSONs in launch/ds, which is installed as the data folder adapt_launch."""
    folder = files("adapt_launch") / "ds"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def read_ds_config(path_or_name: str) -> dict[str, Any]:
    """The JSON as it is written; `path_or_name` is a file (it ends in .json or holds a "/") or a shipped name.

    Raises ValueError for bad JSON, an unknown ZeRO stage and one whose final model could not be saved, FileNotFoundError for no
    file.
    """
    is_path = path_or_name.endswith(".json") or "/" in path_or_name
    if not is_path and path_or_name not in shipped():
        raise ValueError(
            f"deepspeed={path_or_name}: shipped are {', '.join(shipped())}; or give the path of a JSON file"
        )
    path = Path(path_or_name).expanduser() if is_path else files("adapt_launch") / "ds" / f"{path_or_name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"deepspeed={path_or_name}: no such file; shipped are {', '.join(shipped())}")
    config = user_json(Path(str(path)), "deepspeed", f"DeepSpeed's config; shipped are {', '.join(shipped())}")
    for section in _SECTIONS:
        found: Any = config
        for name in section.split("."):
            found = found.get(name, {})
            if not isinstance(found, dict):
                if name in _OR_NULL and found is None:
                    break
                raise ValueError(f"deepspeed.{section}={shown(json.dumps(found))} in {path.name}: must be an object")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in _STAGES:
        allowed = ", ".join(map(str, _STAGES))
        raise ValueError(f"deepspeed.zero_optimization.stage={json.dumps(stage)} in {path.name}: allowed are {allowed}")
    if stage == 3 and not zero.setdefault(
        _GATHER, True
    ):  # or the final save finds no whole weights, and only a warning tells
        raise ValueError(
            f"deepspeed.zero_optimization.{_GATHER}=false in {path.name}: the final model could not be saved; set it to true"
        )
    return config


def leave_to_the_recipe(config: dict[str, Any]) -> None:
    """Puts "auto" where an owned key is absent: DeepSpeed would take its own default instead of the recipe's value.

    `optimizer` is not invented: a section without a type would be refused.
    """
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        config.setdefault(key, "auto")
    config.setdefault("bf16", {}).setdefault("enabled", "auto")
    if "optimizer" in config:
        params = config["optimizer"].setdefault("params", {})
        for key in ("lr", "weight_decay"):
            params.setdefault(key, "auto")


def check_agrees(config: dict[str, Any], ours: TrainingConfig, world_size: int) -> None:
    """ValueError for the first key that is neither "auto" nor what the recipe says; transformers' own comparison finds it."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig  # brings torch, and the rest here is quick

    held = HfTrainerDeepSpeedConfig(config)
    is_bf16 = ours.precision == "bf16"
    for key, value, setting in (
        ("train_batch_size", ours.global_batch_size, "global_batch_size"),
        ("train_micro_batch_size_per_gpu", ours.micro_batch_size, "micro_batch_size"),
        ("gradient_accumulation_steps", ours.accumulation_steps(world_size), "global_batch_size"),
        ("gradient_clipping", ours.max_grad_norm, "max_grad_norm"),
        ("bf16.enabled", is_bf16, "precision"),
        ("fp16.enabled", False, "precision"),
        ("optimizer.params.lr", ours.learning_rate, "learning_rate"),
        ("optimizer.params.weight_decay", ours.weight_decay, "weight_decay"),
    ):
        held.fill_match(key, value, setting)
        if held.mismatches:
            raise ValueError(
                f"deepspeed.{key}={json.dumps(held.get_value(key))} conflicts with training.{setting}={getattr(ours, setting)}; "
                f'set it to "auto" in {ours.deepspeed}'
            )


def nvme_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The offload sections (parameters, optimizer) that go to NVMe; empty where nothing does."""
    zero = config.get("zero_optimization", {})
    sections = [zero.get("offload_param"), zero.get("offload_optimizer")]
    return [section for section in sections if isinstance(section, dict) and section.get("device") == "nvme"]
