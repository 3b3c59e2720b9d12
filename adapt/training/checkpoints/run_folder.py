"""The folder of a run: what the run writes there is listed in its mark, and nothing else there is touched.

config.yaml, versions.json            the recipe as resolved, and what ran it on what
metrics.jsonl, samples.jsonl, bad_steps.jsonl
converted/, converted_from.json       the base as a diffusion checkpoint, and what it was made of
checkpoints/checkpoint-N/             sealed with COMPLETE (`seal.py`)
adapter/, model/                      what came of it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...files import marks
from ...files.outputs import check_adoptable, check_folder, locked
from ...files.user_text import MOST_YAML, plain_yaml
from ..recipe import Recipe
from .seal import COMPLETE

CONFIG, VERSIONS, METRICS = "config.yaml", "versions.json", "metrics.jsonl"
_GROWING = (METRICS, "samples.jsonl", "bad_steps.jsonl")
_DEEPEST, _MOST_SETTINGS = 4, 1000  # sections, settings, and what a setting like lr_scheduler_options holds


def check_run_folder(output_dir: str) -> Path:
    """The folder, in which this run can write and will replace nothing that is not its own; ValueError otherwise."""
    setting = "training.output_dir"
    folder = check_folder(output_dir, setting)
    check_adoptable(folder, setting)
    marks.check_ours(folder, (CONFIG, VERSIONS, *_GROWING), setting)
    return folder


def check_nothing_in_the_way(output_dir: Path) -> None:
    """ValueError where something that is not this run's has the name of what it will write: a checkpoint, the adapter, the model."""
    setting, run = "training.output_dir", run_of(output_dir)
    for name in ("adapter", ".model.incomplete"):
        if os.path.lexists(output_dir / name) and not marks.holds_nothing_else(output_dir / name, run):
            raise ValueError(
                f"{setting}={output_dir}: {name}/ there holds what this run did not write; move it, or choose another folder "
                "(nothing was overwritten)"
            )
    if os.path.lexists(output_dir / "checkpoints") and not (output_dir / "checkpoints").is_dir():
        raise ValueError(f"{setting}={output_dir}: checkpoints there is no folder; move it, or choose another folder")
    for path in numbered_checkpoints(output_dir):
        is_ours = marks.is_hardly_begun(path) or (run is not None and marks.is_ours(path, run))
        if not (path / COMPLETE).is_file() and not is_ours:
            raise ValueError(
                f"{setting}={output_dir}: checkpoints/{path.name} was not written by this run; move it, or choose another folder "
                "(nothing was removed)"
            )


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Inside, no other process may train in this folder, which is made if need be and marked; ValueError while another one does."""
    made = not output_dir.is_dir()
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output_dir / ".lock", f"training.output_dir={output_dir}"):
            yield
    finally:
        marks.withdraw_unused(output_dir, and_folder=made)


def begin_run(output_dir: Path) -> str:
    """Marks the folder; returns the run that this is, or goes on with. What grows in it is listed when it is first written."""
    run = marks.adopt(output_dir)
    marks.record(output_dir, {".lock": {}})
    return run


def grow(path: Path) -> None:
    """Called before a file that grows is written to: lists it where it is not there yet; ValueError for a user's."""
    if marks.mark_of(path.parent) is None:  # not a run's folder
        return
    marks.check_ours(path.parent, [path.name], "training.output_dir")
    if not os.path.lexists(path):
        marks.record(path.parent, {path.name: {}})


def run_of(output_dir: Path) -> str | None:
    """The run whose folder this is; None for a folder that no run has written into."""
    mark = marks.mark_of(output_dir)
    return None if mark is None else mark.run


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """What is called as we call a checkpoint, oldest first; not a user's `checkpoint-4-best`."""
    found = [
        path for path in output_dir.glob("checkpoints/checkpoint-*") if _is_number(path.name[len("checkpoint-") :])
    ]
    return sorted(found, key=step_of)


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that were saved to their end, oldest first."""
    return [path for path in numbered_checkpoints(output_dir) if (path / COMPLETE).is_file()]


def results_in(output_dir: Path) -> list[str]:
    """Names of what runs have finished there: whole checkpoints, the final model."""
    model = output_dir / "model"
    return [path.name for path in whole_checkpoints(output_dir)] + ([model.name] if os.path.lexists(model) else [])


def check_no_others_results(output_dir: Path, before: list[str]) -> None:
    """ValueError where another run has finished something since `results_in` said `before`: this one would go on from too early."""
    if results_in(output_dir) != before:
        raise ValueError(
            f"training.output_dir={output_dir}: another run has written to it while this one was starting; start the same command again"
        )


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and text == str(int(text)) and len(text) < 16


def read_settings(path: Path) -> dict[str, object]:
    """Every setting of a recipe that a run has written, by its dotted name; ValueError for a file that is none."""
    try:
        if path.stat().st_size > MOST_YAML:
            raise ValueError("too large")
        sections = plain_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
            raise ValueError("it has no sections of settings")
        settings = flat(sections)
    except (OSError, ValueError) as error:
        raise _not_ours(path, error) from error
    if not {"model.base", "data.train", "training.output_dir"} <= settings.keys():
        raise _not_ours(path, "it lacks settings that every recipe has")
    return settings


def _not_ours(path: Path, why: object) -> ValueError:
    reason = " ".join(str(why).split())[:120]
    return ValueError(
        f"training.output_dir={path.parent}: {path.name} is not the recipe that a run wrote there ({reason}); move it"
    )


def flat(tree: dict[Any, Any], prefix: str = "", depth: int = 1) -> dict[str, object]:
    """{"section.setting": value} of a recipe as a dict of dicts; ValueError where they are more than a recipe's."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found.update(
            flat(value, f"{prefix}{key}.", depth + 1) if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
        if depth > _DEEPEST or len(found) > _MOST_SETTINGS:
            raise ValueError("it has too many settings")
    return found


def last_step(output_dir: Path) -> int | None:
    """The step of the last line of metrics.jsonl; None where it has none."""
    try:
        line = json.loads((output_dir / METRICS).read_text(encoding="utf-8").splitlines()[-1])
        return line["step"] if isinstance(line["step"], int) else None
    except (IndexError, KeyError, OSError, RecursionError, TypeError, ValueError):
        return None


def save_provenance(recipe: Recipe, provenance: dict[str, Any], output_dir: Path) -> None:
    """The resolved recipe (config.yaml) and what ran it on what (versions.json), beside the run's checkpoints."""
    marks.write(output_dir, CONFIG, recipe.as_yaml())
    marks.write(output_dir, VERSIONS, json.dumps(provenance, indent=1, sort_keys=True) + "\n")
