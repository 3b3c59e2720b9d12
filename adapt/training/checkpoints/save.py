"""What a run leaves: checkpoints that are sealed when whole, and the folder of the final model, written beside and renamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from ... import progress
from ...files import marks
from ...files.adapters import TRAINED_ON
from ...files.finite import check_folder_finite, first_not_finite_parameter
from ...files.loading import tokenizer_of
from ...files.model_folder import copy_extras, copy_json
from ...files.outputs import KeptElsewhere, kept_elsewhere
from ...files.provenance import Files, first_change, model_files
from .. import lora
from ..engine.arguments import compute_dtype, whole_weights
from ..recipe import Recipe
from .run_folder import run_of, whole_checkpoints
from .seal import data_files, gathered, seal, together, versions

_PICKLE = "training_args.bin"  # of this machine's settings; config.yaml says more


class OtherModel(ValueError):
    """The weights that an adapter was trained on are not there any more."""


def provenance_of(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What goes into every COMPLETE besides the files: versions, number of ranks, and what the files of data were.

    The model's files join it when there is one to train (`start_model.diffusion_checkpoint` may have to convert it first).
    """
    held_out = data_files(recipe.data.eval) if isinstance(recipe.data.eval, str | list) else {}
    return {
        "versions": versions(), "world_size": world_size, "data": data_files(recipe.data.train), "eval": held_out
    }  # fmt: skip


@contextmanager
def sealed_checkpoint(trainer: Trainer, recipe: Recipe, folder: Path, provenance: dict[str, Any]) -> Iterator[None]:
    """Inside, all ranks write into the folder; then it is sealed and older ones are removed.

    A write that fails costs this checkpoint alone: older ones go only when a newer one is whole. ValueError on all ranks, and
    nothing is written, where weights are not finite.
    """
    output_dir = folder.parents[1]
    check_finite(trainer, "no checkpoint was saved of it")
    together(lambda: _begin(trainer, output_dir, folder, name=folder.name))  # before others write into it
    try:
        yield
        if trainer.args.should_save:
            recipe.save(folder / "recipe.yaml")
        trainer.accelerator.wait_for_everyone()  # every rank has written its shard of the optimizer
        seal(folder, provenance | {"step": trainer.state.global_step})
    except Exception:
        if trainer.args.should_save:
            marks.remove(folder)
        raise
    if trainer.args.should_save:
        for old in whole_checkpoints(output_dir)[: -recipe.training.keep_checkpoints]:
            marks.remove(old, run_of(output_dir))


def check_finite(trainer: Trainer, outcome: str) -> None:
    """ValueError on all ranks where one of them has a weight that is NaN or infinite: the step guard sees losses and gradients alone.

    So it may be the optimizer that made it so, as of a learning rate without bounds; `outcome` says what was not done.
    """
    assert trainer.model is not None
    if bad := next(filter(None, gathered(first_not_finite_parameter(trainer.model.named_parameters()))), None):
        raise ValueError(
            f"training.learning_rate={trainer.args.learning_rate:g}: the weights of step {trainer.state.global_step} are not finite "
            f"({bad}), {outcome}; lower it, or look at training.weight_decay and the other settings of the optimizer"
        )


def without_ties(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state with each shared weight once, under its first name: DeepSpeed's clones would store a tied head beside the embedding."""
    once = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    return {name: tensor for name, tensor in state.items() if name not in tied}


def save_final(trainer: Trainer, recipe: Recipe, base_folder: Path, final: Path, base_files: Files) -> Path:
    """Writes the Hugging Face folder beside and renames it, and returns it; adapters are kept in adapter/ and merged into the model.

    base_files: of base_folder, when the run began. ValueError where weights are not finite, or where an adapter would be merged
    into others than it was trained on. Where it cannot be written, the disk for temporary files gets it, which `KeptElsewhere` says.
    """
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    unwrapped.config.use_cache = True
    if recipe.model.lora is None and recipe.training.deepspeed is None:
        unwrapped.to(compute_dtype(recipe))  # autocast has kept it in float32; DeepSpeed has cast it already
    check_finite(trainer, "no model was written")  # as they will be stored
    staged, adapter = final.with_name(f".{final.name}.incomplete"), final.with_name("adapter")
    try:
        _write_final(trainer, recipe, base_folder, staged, adapter, base_files)
        together(lambda: _publish(trainer, staged, final))
    except OtherModel:
        raise
    except Exception as error:  # on all ranks alike
        kept = Path(gathered(str(kept_elsewhere("model")) if trainer.args.should_save else "")[0])
        _write_final(trainer, recipe, base_folder, kept / "model", kept / "adapter", base_files)
        reason = " ".join(str(error).split())
        raise KeptElsewhere(
            f"training.output_dir={final.parent}: model/ could not be written ({reason[:200]}); it is in {kept} instead, move it"
        ) from error
    return final


def _write_final(
    trainer: Trainer, recipe: Recipe, base_folder: Path, staged: Path, adapter: Path, base_files: Files
) -> None:
    """All files of the model in `staged`; what fails on one rank is raised on all of them."""
    with_adapter, output_dir = recipe.model.lora is not None, Path(recipe.training.output_dir)
    what = f"model.base={recipe.model.base}"

    def begin() -> None:
        for folder in (staged, adapter) if with_adapter else (staged,):
            _begin(trainer, output_dir, folder)

    def finish() -> None:
        if not trainer.args.should_save:
            return
        if with_adapter:
            marks.discard(adapter / _PICKLE)
            (adapter / TRAINED_ON).write_text(json.dumps(base_files, indent=1) + "\n")
            marks.record_all(adapter)
            if changed := first_change(base_files, model_files(base_folder)):
                raise OtherModel(
                    f"model.base={recipe.model.base}: {changed} of {base_folder} has changed since the run began, so the adapter was "
                    f"not merged; it is in {adapter}: put the base back, and `adapt export` merges both"
                )
            dtype = compute_dtype(recipe)
            with whole_weights(trainer.args):
                lora.merge(base_folder, adapter, staged, dtype, lora.nf4(dtype) if recipe.model.quantization else None)
            check_folder_finite(staged, f"training.output_dir={staged.parent}: merged")
            tokenizer_of(base_folder, what).save_pretrained(staged)
        marks.discard(staged / _PICKLE)
        if (base_folder / "generation_config.json").is_file():
            try:
                copy_json(base_folder / "generation_config.json", staged, what)
            except ValueError as problem:  # not worth a model
                progress.say(f"{problem}; left out")
        copy_extras(base_folder, staged, trust_remote_code=False)

    together(begin)
    together(lambda: trainer.save_model(str(adapter if with_adapter else staged)))  # on every rank: ZeRO-3 gathers here
    together(finish)


def _begin(trainer: Trainer, output_dir: Path, folder: Path, name: str | None = None) -> None:
    """On the rank that writes: the folder, empty and marked; what this run has left of it earlier goes."""
    if trainer.args.should_save:
        run = run_of(output_dir)
        assert run is not None, output_dir
        marks.remove(folder, run)
        marks.begin(folder, run, name=name)


def _publish(trainer: Trainer, staged: Path, final: Path) -> None:
    if trainer.args.should_save:
        marks.publish_marked(staged, final, run_of(final.parent))
