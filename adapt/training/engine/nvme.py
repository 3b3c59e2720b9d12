"""ZeRO-3 offload to disk: where its files go, and what it needs."""

from __future__ import annotations

import atexit
import hashlib
import os
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ...files import marks
from ...files.outputs import locked
from ..sections import TrainingConfig


def prepare_nvme(ours: TrainingConfig, sections: list[dict[str, Any]]) -> None:
    """Fills in where each offload section's files go; ValueError where there is no place, or no libaio to write with."""
    setting = f"training.deepspeed={ours.deepspeed}"
    if not sections:
        if ours.nvme_path is not None:
            raise ValueError(
                f"training.nvme_path={ours.nvme_path}: {setting} puts nothing there; set training.deepspeed=zero3_nvme, or "
                "leave nvme_path out"
            )
        return
    for section in sections:
        given = section.get("nvme_path", ours.nvme_path)
        if given is None:
            raise ValueError(
                f"{setting}: needs training.nvme_path, a folder on a fast local disk (not a network disk), the same on every node"
            )
        if ours.nvme_path not in (None, given):
            raise ValueError(
                f"training.nvme_path={ours.nvme_path}: the JSON of {setting} says nvme_path={given}; leave it out of one"
            )
        section["nvme_path"] = given
    if missing := missing_for_nvme():
        raise ValueError(f"{setting}: {missing}, or use training.deepspeed=zero3_offload")
    run = hashlib.sha256(os.path.abspath(ours.output_dir).encode()).hexdigest()[:12]
    name = f"adapt-{run}-rank{os.environ.get('RANK', '0')}"
    swap = {place: _swap_folder(Path(place), name) for place in {section["nvme_path"] for section in sections}}
    for section in sections:
        section["nvme_path"] = str(swap[section["nvme_path"]])


def _swap_folder(place: Path, name: str) -> Path:
    """A folder of this run and rank alone until this process ends; ValueError where a process that lives has it.

    DeepSpeed empties what it finds, which may be what another run computes with, and cleans up nothing.
    """
    setting, held = f"training.nvme_path={place}", ExitStack()
    try:
        place.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(place / f".{name}.lock", setting))
        marks.remove(place / name)  # of a run that was killed
        marks.begin(place / name, marks.new_run())
        (place / name / "swap").mkdir()
    except OSError as error:
        raise ValueError(f"{setting}: cannot write there ({error.strerror}); give a folder on a local disk") from error
    atexit.register(held.close)
    atexit.register(marks.remove, place / name)
    return place / name / "swap"


def has_optimizer_on_nvme(args: TrainingArguments) -> bool:
    """Whether the optimizer lives on disk, where a checkpoint does not bring it back (`arguments._deepspeed`)."""
    if args.deepspeed is None:
        return False
    section = args.hf_deepspeed_config.config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device") == "nvme"


def missing_for_nvme() -> str | None:
    """What DeepSpeed's NVMe offload lacks on this machine, and the command that brings it; None if nothing."""
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        compatible = AsyncIOBuilder().is_compatible(verbose=False)
    if compatible:
        return None
    return "DeepSpeed's async_io needs libaio, which is not here; apt-get install libaio-dev (yum install libaio-devel)"
