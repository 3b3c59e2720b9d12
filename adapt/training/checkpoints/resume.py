"""What a run may go on from: the newest whole checkpoint, by the same recipe, of the same data."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from ..model_section import ModelConfig
from ..recipe import Recipe
from ..sections import DataConfig, TrainingConfig
from .seal import COMPLETE, damage, data_files, gathered, read_manifest, versions

# What a run that goes on may have changed: where and how it computes, not what.
_FREE = {
    *("data.num_workers", "model.attn_implementation", "model.gradient_checkpointing", "model.torch_compile"),
    *("training." + name for name in ("keep_checkpoints", "logging_steps", "max_loss_ratio", "on_bad_loss")),
    *("training." + name for name in ("max_grad_norm", "max_minutes", "micro_batch_size", "num_epochs", "num_steps")),
    *("training." + name for name in ("output_dir", "report_to", "resume", "save_minutes", "save_steps")),
    *("training." + name for name in ("eval_steps", "sample_prompt", "sample_steps")),
}


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Inside, no other process may train in this folder, which is made if need be; ValueError while another one does.

    The lock ends with the process, however that ends, and is not handed on to loader workers.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / ".lock"
    with path.open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_nlink == 0:  # its holder ended between our opening it and our locking it
                raise BlockingIOError
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            raise ValueError(
                f"training.output_dir={output_dir}: another run writes to it ({lock.read().strip() or 'unknown process'}); "
                "wait for it, stop it, or choose another folder"
            ) from error
        except OSError as error:  # a filesystem without locks
            print(
                f"training.output_dir={output_dir}: cannot be locked ({error.strerror}), so a second run in it would not be noticed",
                file=sys.stderr,
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                output_dir.rmdir()  # where nothing was written


def newest_checkpoint(recipe: Recipe) -> Path | None:
    """The folder to resume from; None if there is none. Called by all ranks, which check a share of its files each.

    Damaged checkpoints are named on rank 0's stderr, and the one before is taken. ValueError if all are damaged, if it is
    another run's, if the data has changed, or if not all ranks see the same checkpoints.
    """
    output_dir = Path(recipe.training.output_dir)
    candidates = sorted(whole_checkpoints(output_dir), key=_step, reverse=True)
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
    _check_same_run(recipe, output_dir / "config.yaml")
    newest = _undamaged(candidates)
    _check_same_data(recipe, newest)
    _say_changed_length(recipe, newest / "recipe.yaml")
    return newest


def check_not_past(checkpoint: Path | None, num_steps: int) -> None:
    """ValueError for a checkpoint of a later step than the run's last: its weights are not those of so short a run."""
    if checkpoint is not None and _step(checkpoint) > num_steps:
        raise ValueError(
            f"training.num_steps={num_steps}: the run is at step {_step(checkpoint)} already ({checkpoint}); give at least that many, "
            "or choose another training.output_dir"
        )


def finished_run(recipe: Recipe) -> Path | None:
    """The model that this recipe has been trained to already, which is said; None if output_dir holds no model.

    ValueError if it holds the model of another run, or of one of another length.
    """
    output_dir = Path(recipe.training.output_dir)
    final, saved = output_dir / "model", output_dir / "config.yaml"
    if not final.exists():
        return None
    way_out = f"choose another training.output_dir, with model.base={final} to go on from it, or remove it"
    if not saved.is_file():
        raise ValueError(
            f"training.output_dir={output_dir}: holds a model that no run of ours wrote (model/); {way_out}"
        )
    _check_same_run(recipe, saved)
    was, now = _length(yaml.safe_load(saved.read_text())["training"]), _length(asdict(recipe.training))
    if was != now:
        raise ValueError(
            f"training.{now[0]}={now[1]}: the run in {output_dir} is finished (model/) and had {was[0]}={was[1]}; {way_out}"
        )
    metrics = output_dir / "metrics.jsonl"
    steps = json.loads(metrics.read_text().splitlines()[-1])["step"] if metrics.is_file() else recipe.training.num_steps
    _say(f"{output_dir}: is finished (model/, {steps} steps); choose another training.output_dir to train anew")
    return final


def begun_precision(recipe: Recipe) -> str | None:
    """training.precision of the run that is in the recipe's output_dir; None where there is none."""
    saved = Path(recipe.training.output_dir) / "config.yaml"
    if not saved.is_file() or not (whole_checkpoints(saved.parent) or (saved.parent / "model").exists()):
        return None
    return _flat(yaml.safe_load(saved.read_text())).get("training.precision")  # pyright: ignore[reportReturnType]


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
    """Removes what a killed run left half-written: checkpoints without COMPLETE, and the folder of the final model.

    Damaged checkpoints, which are whole ones newer than the one that the run goes on from, are only renamed.
    """
    whole = whole_checkpoints(output_dir)
    for path in output_dir.glob("checkpoints/checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)
        elif resumed_from is not None and _step(path) > _step(resumed_from):
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    shutil.rmtree(output_dir / ".model.incomplete", ignore_errors=True)


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that were saved to their end, oldest first."""
    found = [path for path in output_dir.glob("checkpoints/checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _check_same_run(recipe: Recipe, saved: Path) -> None:
    if not saved.is_file():
        return
    before, now, defaults = _flat(yaml.safe_load(saved.read_text())), _flat(asdict(recipe)), _defaults()
    for key in sorted(before.keys() | now.keys()):
        if key in _FREE or before.get(key) == now.get(key):
            continue
        if key == "data.eval" and not isinstance(before.get(key), float) and not isinstance(now[key], float):
            continue  # other files, or none: what is trained on stays
        if key in before or now[key] != defaults.get(key):  # a setting that is newer than the run counts as its default
            was = "no such setting" if before.get(key) is None else before[key]
            raise ValueError(
                f"{key}={now.get(key)}: the run in {saved.parent} was started with {was}; set that to go on with it, or choose "
                "another training.output_dir"
            )


def _length(training: dict[str, object]) -> tuple[str, object]:
    """("num_steps" or "num_epochs", its value)."""
    return next((name, training[name]) for name in ("num_steps", "num_epochs") if training.get(name) is not None)


def _say_changed_length(recipe: Recipe, saved: Path) -> None:
    (name, was), (now, value) = _length(yaml.safe_load(saved.read_text())["training"]), _length(asdict(recipe.training))
    if (name, was) != (now, value):
        effect = "" if recipe.training.lr_scheduler == "constant" else ": the schedule changes from here"
        _say(f"{name} {was} -> {value if now == name else f'{now} {value}'}{effect}")


def _check_same_data(recipe: Recipe, checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    now = data_files(recipe.data.train)
    for name, before in manifest.get("data", {}).items():
        if name in now and now[name] != before:
            raise ValueError(
                f"data.train={name}: has changed since the run in {recipe.training.output_dir} began ({before['bytes']:,} bytes "
                f"then, {now[name]['bytes']:,} now); put it back to go on, or choose another training.output_dir"
            )
    were, are = manifest.get("versions", {}), versions()
    changed = [
        f"{name} {were[name]}, now {are[name]}" for name in sorted(were.keys() & are.keys()) if were[name] != are[name]
    ]
    if changed:
        _say(f"{checkpoint.name} was written with {'; '.join(changed)}: the curve may differ in its last digits")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"adapt train: {line}", file=sys.stderr)


def _defaults() -> dict[str, object]:
    """Every setting that has a default, by its dotted name."""
    training = TrainingConfig(output_dir="", num_steps=1)
    return _flat(asdict(Recipe(ModelConfig(base=""), DataConfig(train="-"), training)))


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
