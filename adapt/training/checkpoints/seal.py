"""COMPLETE, written last into a checkpoint: its files by size and sha256, and what wrote them.

A checkpoint without it was cut short by a kill; one that does not agree with it has been damaged since.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...files import provenance, staging
from ...files.provenance import sampled_files, sha256

COMPLETE = "COMPLETE"
_DISTRIBUTIONS = ("accelerate", "adapt-dlm", "deepspeed", "peft", "torch", "transformers")
_THREADS = 4  # hashlib frees the GIL; one thread hashes 1.4 GB/s with SHA instructions, so a disk sets the pace, not we
_SECONDS_FOR_LISTINGS = 60  # a network filesystem may show a new file to other nodes that much later


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes COMPLETE once every file of the checkpoint is on disk; called by all ranks after all have written.

    Each rank hashes its share of the files, so the cost is bytes / ranks. ValueError on all ranks if one of them does not see
    what the others wrote: shards on a disk of its own could not be checked, nor found again by a restart elsewhere.
    """
    names = _same_listing(folder)
    files = {
        name: size_and_hash
        for share in gathered(_hashed(folder, share(names), sync=True))
        for name, size_and_hash in share.items()
    }
    if _rank() == 0:
        content = json.dumps({**facts, "files": files}, indent=1, sort_keys=True)
        staging.write_whole(folder / COMPLETE, content, to_disk=True)
        staging.sync(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What COMPLETE holds; ValueError if it is damaged itself."""
    try:
        manifest = json.loads((folder / COMPLETE).read_text())
        assert isinstance(manifest["files"], dict)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{COMPLETE} is not the list of its files") from error
    return manifest


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint, in a few words, or None; called by all ranks, which read a share each."""
    try:
        files = read_manifest(folder)["files"]
        found = _damage(folder, {name: files[name] for name in share(sorted(files))})
    except ValueError as error:
        found = str(error)
    return next((problem for problem in gathered(found) if problem), None)


def _damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, want in files.items():  # sizes first: they cost nothing
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != want["bytes"]:
            return f"{name} has {size:,} bytes of {want['bytes']:,}"
    found = _hashed(folder, files)
    return next(
        (f"{name} has another checksum than when it was saved" for name in files if found[name] != files[name]), None
    )


def _hashed(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, dict[str, Any]]:
    names = list(names)

    def one(name: str) -> dict[str, Any]:
        if sync:
            staging.sync(folder / name)
        with (folder / name).open("rb") as file:
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256(file)}

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _same_listing(folder: Path) -> list[str]:
    """The checkpoint's files, once all ranks see the same ones."""
    deadline = time.monotonic() + _SECONDS_FOR_LISTINGS
    while True:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        listings = gathered(names)
        unlike = [rank for rank, listing in enumerate(listings) if listing != listings[0]]
        if not unlike:
            return names
        if max(gathered(time.monotonic() > deadline)):
            absent = sorted(set(listings[0]) ^ set(listings[unlike[0]]))[0]
            raise ValueError(
                f"training.output_dir: ranks 0 and {unlike[0]} do not both see {folder.name}/{absent}; give a folder on a "
                "filesystem that all nodes share"
            )
        time.sleep(1)


def share(names: list[str]) -> list[str]:
    return names[_rank() :: _world_size()]


def gathered(value: Any) -> list[Any]:
    """The value of every rank, on every rank; a list of one where there is no process group."""
    if _world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * _world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def data_files(train: str | list[str]) -> dict[str, dict[str, Any]]:
    """Local training files by name, as they are now (`sampled_files`). A Hub dataset has none."""
    return sampled_files(Path(name) for name in ([train] if isinstance(train, str) else train))


def versions() -> dict[str, str]:
    """Distribution -> version of what a curve depends on, Python and the git revision of this code."""
    return provenance.versions({name: name for name in _DISTRIBUTIONS}) | {
        "git": provenance.git_revision() or "not in a checkout"
    }
