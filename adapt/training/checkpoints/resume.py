"""What a run may go on from: the newest whole checkpoint, by the same recipe, of the same data."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files import marks
from ...files.provenance import Files, first_change, model_files, sampled_files
from ...settings.bounds import shown
from ..model_section import ModelConfig
from ..recipe import Recipe
from ..sections import DataConfig, TrainingConfig
from .damage import damage
from .run_folder import (
    CONFIG,
    VERSIONS,
    flat,
    last_step,
    numbered_checkpoints,
    read_settings,
    run_of,
    step_of,
    whole_checkpoints,
)
from .seal import data_files, gathered, read_manifest, versions

# What a run that goes on may have changed: where and how it computes, not what.
_FREE = {
    *("data.num_workers", "model.attn_implementation", "model.gradient_checkpointing", "model.torch_compile"),
    *("training." + name for name in ("keep_checkpoints", "logging_steps", "max_loss_ratio", "on_bad_loss")),
    *("training." + name for name in ("max_grad_norm", "max_minutes", "micro_batch_size", "num_epochs", "num_steps")),
    *("training." + name for name in ("output_dir", "report_to", "resume", "save_minutes", "save_steps")),
    *("training." + name for name in ("eval_steps", "sample_prompt", "sample_steps")),
}


def newest_checkpoint(recipe: Recipe) -> Path | None:
    """The folder to resume from; None if there is none. Called by all ranks, which check a share of its files each.

    Damaged checkpoints are named on rank 0's stderr, and the one before is taken. ValueError if all are damaged, if it is
    another run's, if the data has changed, or if not all ranks see the same checkpoints.
    """
    output_dir = Path(recipe.training.output_dir)
    candidates = sorted(whole_checkpoints(output_dir), key=step_of, reverse=True)
    seen = gathered([path.name for path in candidates])
    if any(names != seen[0] for names in seen):
        raise ValueError(
            f"training.output_dir={output_dir}: the ranks see different checkpoints in it; give a folder on a filesystem that "
            "all nodes share"
        )
    if not candidates:
        return None
    if not recipe.training.resume:
        raise ValueError(
            f"training.resume=false: {output_dir} holds checkpoints of an earlier run; remove them, choose another "
            "training.output_dir, or set training.resume=true to go on"
        )
    if (output_dir / CONFIG).is_file():
        _check_same_run(recipe, output_dir / CONFIG)
    newest = _undamaged(candidates)
    for later in candidates[: candidates.index(newest)]:  # which are set aside: they are in the way of this run's own
        if not marks.is_ours(later, run_of(output_dir)):
            raise ValueError(
                f"training.output_dir={output_dir}: checkpoints/{later.name} is not of this run, or a copy of another step; "
                "move it, or choose another folder (nothing was removed)"
            )
    _check_same_run(recipe, newest / "recipe.yaml")
    _check_same_data(recipe, newest)
    _say_changed_length(recipe, newest / "recipe.yaml")
    return newest


def check_not_past(checkpoint: Path | None, num_steps: int) -> None:
    """ValueError for a checkpoint of a later step than the run's last: its weights are not those of so short a run."""
    if checkpoint is not None and step_of(checkpoint) > num_steps:
        raise ValueError(
            f"training.num_steps={num_steps}: the run is at step {step_of(checkpoint)} already ({checkpoint}); give at least "
            "that many, or choose another training.output_dir"
        )


def check_same_model(recipe: Recipe, checkpoint: Path | None, folder: Path, files: Files) -> None:
    """ValueError where the checkpoint was trained from other weights, or with another tokenizer, than are in `folder` now."""
    before = {} if checkpoint is None else read_manifest(checkpoint).get("model", {})
    if before and (changed := first_change(before, files)):
        raise ValueError(
            f"model.base={recipe.model.base}: {changed} of {folder} has changed since the run in {recipe.training.output_dir} began; "
            "put it back to go on, or choose another training.output_dir"
        )


def finished_run(recipe: Recipe) -> Path | None:
    """The model that this recipe has been trained to already, which is said; None if output_dir holds no model.

    ValueError if it holds the model of another run, or of one of another length, base or data, or one that is not whole.
    """
    output_dir = Path(recipe.training.output_dir)
    final, saved = output_dir / "model", output_dir / CONFIG
    if not os.path.lexists(final):
        return None
    way_out = f"choose another training.output_dir, with model.base={final} to go on from it, or remove it"
    if not saved.is_file():
        raise ValueError(
            f"training.output_dir={output_dir}: holds a model that no run of ours wrote (model/); {way_out}"
        )
    _check_same_run(recipe, saved)
    was, now = _length(read_settings(saved)), _length(flat(asdict(recipe)))
    if was != now:
        raise ValueError(
            f"training.{now[0]}={now[1]}: the run in {output_dir} is finished (model/) and had {was[0]}={was[1]}; {way_out}"
        )
    _check_nothing_changed(recipe, output_dir, way_out)
    steps = last_step(output_dir) or recipe.training.num_steps
    _say(f"{output_dir}: is finished (model/, {steps} steps); choose another training.output_dir to train anew")
    return final


def _check_nothing_changed(recipe: Recipe, output_dir: Path, way_out: str) -> None:
    final, mark = output_dir / "model", marks.mark_of(output_dir / "model")
    needed = ["config.json"] if mark is None else list(mark.files or {})
    if missing := next((name for name in needed if not (final / name).is_file()), None):
        raise ValueError(
            f"training.output_dir={output_dir}: model/ there is not the whole model of a run, it has no {missing[:100]}; {way_out}"
        )
    before = _json_object(output_dir / VERSIONS)
    _check_data(recipe, before.get("data"))
    note = output_dir / "converted_from.json"
    files = _json_object(note).get("files") if note.is_file() else before.get("model")
    now = model_files(recipe.model.base)
    if isinstance(files, dict) and files and now and (changed := first_change(files, now)):
        raise ValueError(
            f"model.base={recipe.model.base}: {changed[:100]} has changed since the run in {output_dir} was finished (model/); "
            f"{way_out}"
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def begun_precision(recipe: Recipe) -> str | None:
    """training.precision of the run that is in the recipe's output_dir; None where there is none."""
    saved = Path(recipe.training.output_dir) / CONFIG
    if not saved.is_file() or not (whole_checkpoints(saved.parent) or (saved.parent / "model").exists()):
        return None
    precision = read_settings(saved).get("training.precision")
    return precision if precision in ("bf16", "fp32") else None


def _undamaged(candidates: list[Path]) -> Path:
    """The first that agrees with its COMPLETE; the damaged ones before it are named."""
    damaged: list[str] = []
    for path in candidates:
        problem = damage(path)
        if problem is None:
            for line in damaged:
                _say(f"{line}; goes on from {path.name} instead")
            return path
        damaged.append(f"{path} is damaged: {problem}")
    raise ValueError(
        f"training.output_dir: no checkpoint is left that is whole: {'; '.join(damaged)}; put a copy in its place, or remove "
        f"{candidates[0].parent} to start from the beginning"
    )


def remove_unfinished(output_dir: Path, resumed_from: Path | None) -> None:
    """Removes what a killed run left half-written: checkpoints that it began and did not seal, and the folder of the final model.

    Damaged checkpoints, which are whole ones newer than the one that the run goes on from, are only renamed.
    """
    run, whole = run_of(output_dir), whole_checkpoints(output_dir)
    for path in numbered_checkpoints(output_dir):
        if path not in whole:
            marks.remove(path, run)
            marks.remove_hardly_begun(path)
        elif resumed_from is not None and step_of(path) > step_of(resumed_from):
            marks.set_aside(path, "damaged")
    marks.remove(output_dir / ".model.incomplete", run)


def _check_same_run(recipe: Recipe, saved: Path) -> None:
    before, now, defaults = read_settings(saved), flat(asdict(recipe)), _defaults()
    for key in sorted(before.keys() | now.keys()):
        if key in _FREE or _resolved(key, before.get(key)) == _resolved(key, now.get(key)):
            continue
        if key == "data.eval" and not isinstance(before.get(key), float) and not isinstance(now[key], float):
            continue  # other files, or none: what is trained on stays
        if key in before or now[key] != defaults.get(key):  # a setting that is newer than the run counts as its default
            was = "no such setting" if before.get(key) is None else shown(before[key])
            raise ValueError(
                f"{' '.join(key.split())[:80]}={now.get(key)}: the run in {saved.parent} was started with {was}; "
                "set that to go on with it, or choose another training.output_dir"
            )


def _resolved(key: str, value: object) -> object:
    """A path that is there in its one spelling; any other value as it is."""
    if key not in ("model.base", "data.train"):
        return value
    names = value if isinstance(value, list | tuple) else [value]
    return [_real(name) if isinstance(name, str) else name for name in names]


def _real(name: str) -> str:
    return name if "\0" in name or not os.path.exists(name) else os.path.realpath(name)


def _length(settings: dict[str, object]) -> tuple[str, object]:
    """("num_steps" or "num_epochs", its value)."""
    names = ("num_steps", "num_epochs")
    return next(
        ((name, value) for name in names if (value := settings.get(f"training.{name}")) is not None),
        ("num_steps", None),
    )


def _say_changed_length(recipe: Recipe, saved: Path) -> None:
    (name, was), (now, value) = _length(read_settings(saved)), _length(flat(asdict(recipe)))
    if (name, was) != (now, value):
        effect = "" if recipe.training.lr_scheduler == "constant" else ": the schedule changes from here"
        _say(f"{name} {was} -> {value if now == name else f'{now} {value}'}{effect}")


def _check_same_data(recipe: Recipe, checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    _check_data(recipe, manifest.get("data"))
    were, are = manifest.get("versions", {}), versions()
    changed = [
        f"{name} {were[name]}, now {are[name]}" for name in sorted(were.keys() & are.keys()) if were[name] != are[name]
    ]
    if changed:
        _say(f"{checkpoint.name} was written with {'; '.join(changed)}: the curve may differ in its last digits")


def _check_data(recipe: Recipe, recorded: Any) -> None:
    """ValueError where a file of data.train is another one than was recorded of it, under whatever spelling of its path."""
    then = {_real(name): found for name, found in recorded.items()} if isinstance(recorded, dict) else {}
    for name, now in data_files(recipe.data.train).items():
        before = then.get(_real(name))
        # Earlier versions have sampled what they recorded.
        if not isinstance(before, dict) or before in (now, sampled_files([Path(name)])[name]):
            continue
        raise ValueError(
            f"data.train={name}: has changed since the run in {recipe.training.output_dir} began ({before.get('bytes')} bytes "
            f"then, {now['bytes']} now); put it back to go on, or choose another training.output_dir"
        )


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"adapt train: {line}", file=sys.stderr)


def _defaults() -> dict[str, object]:
    """Every setting that has a default, by its dotted name."""
    training = TrainingConfig(output_dir="-", num_steps=1)
    return flat(asdict(Recipe(ModelConfig(base="-"), DataConfig(train="-"), training)))
