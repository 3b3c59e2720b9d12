"""COMPLETE, written last into a checkpoint: its files by size and sha256, and what wrote them.

A checkpoint without it was cut short by a kill; one that does not agree with it has been damaged since.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...files import marks, provenance, staging
from ...files.provenance import sha256, whole_files

COMPLETE = "COMPLETE"
_DISTRIBUTIONS = ("accelerate", "adapt-dlm", "deepspeed", "peft", "torch", "transformers")
_THREADS = 4  # hashlib frees the GIL; one thread hashes 1.4 GB/s with SHA instructions, so a disk sets the pace, not we
_MOST_BYTES = 64 << 20  # of COMPLETE
_SECONDS_FOR_LISTINGS = 60  # a network filesystem may show a new file to other nodes that much later


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes COMPLETE once every file of the checkpoint is on disk; called by all ranks after all have written.

    Each rank hashes its share of the files, so the cost is bytes / ranks. ValueError on all ranks if one of them does not see
    what the others wrote: shards on a disk of its own could not be checked, nor found again by a restart elsewhere.
    """
    names = _same_listing(folder)
    files = {
        name: size_and_hash
        for share_of_one in gathered(hashed(folder, share(names), sync=True))
        for name, size_and_hash in share_of_one.items()
    }
    if _rank() == 0:
        content = json.dumps({**facts, "files": files}, indent=1, sort_keys=True)
        staging.write_whole(folder / COMPLETE, content, to_disk=True)
        staging.sync(folder.parent)
        # Removed later are these alone, and the seal before what it seals: half a checkpoint must not pass for a damaged one.
        marks.record(folder, {name: {} for name in (COMPLETE, *names)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What COMPLETE holds; ValueError if it is damaged itself, or was edited to what no run of ours has written."""
    try:
        if (folder / COMPLETE).stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        manifest = json.loads((folder / COMPLETE).read_bytes())
        if not _is_manifest(manifest):
            raise ValueError("of other types")
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{COMPLETE} is not the list of its files") from error
    return manifest


def _is_manifest(found: Any) -> bool:
    if not isinstance(found, dict) or type(found.get("step")) is not int or not isinstance(found.get("files"), dict):
        return False
    listings = [found["files"], *(found.get(name, {}) for name in ("data", "eval", "model"))]
    known = all(isinstance(listing, dict) and all(map(_is_identity, listing.values())) for listing in listings)
    versions = found.get("versions", {})
    named = isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values())
    return known and named and not any(Path(name).is_absolute() or ".." in Path(name).parts for name in found["files"])


def _is_identity(found: Any) -> bool:
    return isinstance(found, dict) and type(found.get("bytes")) is int and isinstance(found.get("sha256"), str)


def hashed(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of those files of the checkpoint, brought to disk first if `sync`."""
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
        found = (path for path in folder.rglob("*") if path.is_file() and path.name != marks.MARK)
        names = sorted(str(path.relative_to(folder)) for path in found)
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
    """The part of them that this rank reads."""
    return names[_rank() :: _world_size()]


def gathered(value: Any) -> list[Any]:
    """The value of every rank, on every rank; a list of one where there is no process group."""
    if _world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * _world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def together(step: Callable[[], object]) -> None:
    """Runs a step on every rank; what it raises on one is raised on all, which wait for each other here."""
    failed: Exception | None = None
    try:
        step()
    except Exception as error:
        failed = error
    said = next(
        filter(None, gathered(None if failed is None else " ".join(str(failed).split()) or type(failed).__name__)), None
    )
    if failed is not None:
        raise failed
    if said is not None:
        raise OSError(said)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def data_files(train: str | list[str]) -> dict[str, dict[str, Any]]:
    """Local training files by name, as they are now (`whole_files`). A Hub dataset has none."""
    return whole_files(Path(name) for name in ([train] if isinstance(train, str) else train))


def versions() -> dict[str, str]:
    """Distribution -> version of what a curve depends on, Python and the git revision of this code."""
    return provenance.versions({name: name for name in _DISTRIBUTIONS}) | {
        "git": provenance.git_revision() or "not in a checkout"
    }
