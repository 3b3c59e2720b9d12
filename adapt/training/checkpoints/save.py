"""What a run leaves: checkpoints that are sealed when whole, and the folder of the final model, written beside and renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from ...files.loading import tokenizer_of
from ...files.model_folder import copy_extras, copy_json
from ...files.staging import publish
from .. import lora
from ..engine.arguments import compute_dtype, whole_weights
from ..recipe import Recipe
from .resume import whole_checkpoints
from .seal import COMPLETE, data_files, seal, versions


def provenance_of(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What goes into every COMPLETE besides the files: versions, number of ranks, and what the training files were."""
    return {"versions": versions(), "world_size": world_size, "data": data_files(recipe.data.train)}


def save_provenance(recipe: Recipe, provenance: dict[str, Any], output_dir: Path) -> None:
    """The resolved recipe (config.yaml) and what ran it on what (versions.json), beside the run's checkpoints."""
    output_dir.mkdir(parents=True, exist_ok=True)
    recipe.save(output_dir / "config.yaml")
    (output_dir / "versions.json").write_text(json.dumps(provenance, indent=1, sort_keys=True) + "\n")


@contextmanager
def sealed_checkpoint(trainer: Trainer, recipe: Recipe, folder: Path, provenance: dict[str, Any]) -> Iterator[None]:
    """Inside, all ranks write into the folder; then it is sealed and older ones are removed.

    A write that fails costs this checkpoint alone: older ones go only when a newer one is whole.
    """
    try:
        yield
        if trainer.args.should_save:
            recipe.save(folder / "recipe.yaml")
        trainer.accelerator.wait_for_everyone()  # every rank has written its shard of the optimizer
        seal(folder, provenance | {"step": trainer.state.global_step})
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if trainer.args.should_save:
        for old in whole_checkpoints(folder.parents[1])[: -recipe.training.keep_checkpoints]:
            (old / COMPLETE).unlink()  # first: half a checkpoint must not pass for a damaged one
            shutil.rmtree(old)


def without_ties(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state with each shared weight once, under its first name: DeepSpeed's clones would store a tied head beside the embedding."""
    once = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    return {name: tensor for name, tensor in state.items() if name not in tied}


def save_final(trainer: Trainer, recipe: Recipe, base_folder: Path, final: Path) -> None:
    """Writes the Hugging Face folder beside and renames it; adapters are kept in adapter/ and merged into the model."""
    ours = recipe
    dtype = compute_dtype(ours)
    what = f"model.base={recipe.model.base}"
    staged, adapter = final.with_name(f".{final.name}.incomplete"), final.with_name("adapter")
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    unwrapped.config.use_cache = True
    if ours.model.lora is None and ours.training.deepspeed is None:
        unwrapped.to(dtype)  # autocast has kept it in float32; DeepSpeed has cast it already
    trainer.save_model(str(adapter if ours.model.lora else staged))  # on every rank: ZeRO-3 gathers here
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        if ours.model.lora:
            with whole_weights(trainer.args):
                lora.merge(base_folder, adapter, staged, dtype, lora.nf4(dtype) if ours.model.quantization else None)
            tokenizer_of(base_folder, what).save_pretrained(staged)
        if (base_folder / "generation_config.json").is_file():
            copy_json(base_folder / "generation_config.json", staged, what)
        copy_extras(base_folder, staged, trust_remote_code=False)
        (staged / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle of this machine's settings; config.yaml says more
        publish(staged, final)
    trainer.accelerator.wait_for_everyone()
