"""What is wrong with a sealed checkpoint: a file that is not as it was, another step than it says, weights that are no numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...files.finite import first_not_finite
from ...files.safetensors_folder import read_shard
from .run_folder import step_of
from .seal import gathered, hashed, read_manifest, share

_STATE = "trainer_state.json"
_MOST_BYTES = 1 << 30  # of that file, which holds the log of all steps
_TYPES: dict[str, tuple[type, ...]] = {
    "epoch": (int, float, type(None)),
    "global_step": (int,),
    "log_history": (list,),
    "max_steps": (int,),
    "num_train_epochs": (int, float),
    "stateful_callbacks": (dict,),
    "total_flos": (int, float),
    "train_batch_size": (int, type(None)),
}
"""What transformers reads of it when a run goes on; a file edited by hand ends a run in the middle of its own code"""


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint, in a few words, or None; called by all ranks, which read a share each."""
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        found = _wrong_step(folder, manifest) or _unlike_sealed(folder, {n: files[n] for n in share(sorted(files))})
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())
    return next((problem for problem in gathered(found) if problem), None)


def _wrong_step(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The step stands in the folder's name, in COMPLETE and in the trainer's state, and has to be the same in all of them."""
    if manifest["step"] != step_of(folder):
        return f"its COMPLETE is of step {manifest['step']}"
    if not (folder / _STATE).is_file():
        return f"{_STATE} is missing"
    if (folder / _STATE).stat().st_size > _MOST_BYTES:
        return f"{_STATE} is too large"
    try:
        state = json.loads((folder / _STATE).read_bytes())
        wrong = next((key for key, types in _TYPES.items() if type(state.get(key)) not in types), None)
        wrong = wrong or next(
            (f"log_history ({line!s:.40})" for line in state["log_history"] if not _is_log_line(line)), None
        )
    except (AttributeError, RecursionError, ValueError):
        return f"{_STATE} is not the trainer's state"
    if wrong:
        return f"{_STATE}: {wrong} is not what was saved"
    if state["global_step"] != step_of(folder):
        return f"{_STATE} is of step {state['global_step']}"
    return None


def _is_log_line(line: Any) -> bool:
    """Whether it is a dict of numbers with the step, as `metrics.py` logs them."""
    return isinstance(line, dict) and "step" in line and all(type(value) in (int, float) for value in line.values())


def _unlike_sealed(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, want in files.items():  # sizes first: they cost nothing
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != want["bytes"]:
            return f"{name} has {size:,} bytes of {want['bytes']:,}"
    found = hashed(folder, files)
    for name in files:
        if found[name] != files[name]:
            return f"{name} has another checksum than when it was saved"
    for name in files:
        if name.endswith(".safetensors") and (tensor := first_not_finite(read_shard(folder / name, str(folder)))):
            return f"{tensor} in {name} has NaN or infinity in it"
    return None
