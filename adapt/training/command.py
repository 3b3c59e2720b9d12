"""Trains a diffusion checkpoint (or its AR control) with transformers' Trainer, alone or under DeepSpeed.

    adapt train --config recipes/smollm2-135m/prefix.yaml
    deepspeed --num_gpus 8 recipes/train.py --config recipes/smollm2-135m/prefix.yaml --training.learning_rate 2e-4

The run is one list of packed rows (`data/packing.py`); a step reads the next global_batch_size of them. Its loss is divided once,
by the tokens of that whole global batch, so the curve is the same for any split over ranks and accumulation steps.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from ..arguments import wait_for_rank_zero
from ..files.model_folder import check_model_folder
from ..files.user_text import check_user_file
from ..settings.bounds import one_of
from .data.file_names import LOADERS, check_names, named_files, suffix_of
from .engine.ds_config import read_ds_config
from .recipe import Recipe, parse_recipe


def main(argv: list[str]) -> int:
    """The `adapt train` command, and what `recipes/train.py` runs on every rank; after a signal 128 + its number."""
    try:
        recipe = parse_recipe(argv, __doc__)
        if not os.path.exists(f"{recipe.training.output_dir}/model"):  # a run that is finished reads nothing more
            check_named(recipe)
    except ValueError:
        wait_for_rank_zero()
        raise
    from .train import run  # here, because torch takes seconds, and what is refused above needs none

    return run(recipe)


def check_named(recipe: Recipe) -> None:
    """ValueError for what a recipe names and what is not there."""
    if recipe.model.base.endswith(".gguf"):
        check_user_file(Path(recipe.model.base), "model.base", "a GGUF file, a model's folder or a Hub id")
    else:
        check_model_folder(recipe.model.base, "model.base")
    for setting, name, file, enum in (
        ("lr_scheduler", recipe.training.lr_scheduler, "trainer_utils.py", "SchedulerType"),
        ("optimizer", recipe.training.optimizer, "training_args.py", "OptimizerNames"),
    ):
        if known := _names_of(file, enum):
            one_of(f"training.{setting}", name, known)
    for setting, named in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if isinstance(named, str | list):  # what looks like a dataset of the Hub is not looked for yet
            check_names([name for name in named_files(named) if suffix_of(name) in LOADERS], setting)
    if recipe.training.deepspeed is not None:
        read_ds_config(recipe.training.deepspeed)


def _names_of(file: str, enum: str) -> list[str]:
    """What an enumeration of transformers holds, read from its source: importing it brings torch. Empty where it has moved."""
    package = importlib.util.find_spec("transformers")
    source = Path(package.origin).with_name(file) if package and package.origin else None
    if source is None or not source.is_file():
        return []  # the run itself asks transformers again
    body = re.search(rf"^class {enum}\(.*?(?=^\S)", source.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return sorted(set(re.findall(r"^    [A-Z]\w* = \"(\w+)\"", body[0], re.MULTILINE))) if body else []
