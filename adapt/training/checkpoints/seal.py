"""COMPLETE, written last into a checkpoint: its files by size and sha256, and what wrote them.

A checkpoint without it was cut short by a kill; one that does not agree with it has been damaged since.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...files import staging

COMPLETE = "COMPLETE"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
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
        for share in gathered(_hashed(folder, _share(names), sync=True))
        for name, size_and_hash in share.items()
    }
    if _rank() == 0:
        beside = folder / f".{COMPLETE}.incomplete"
        with beside.open("w") as file:
            json.dump({**facts, "files": files}, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(folder / COMPLETE)
        for directory in (folder, folder.parent):
            staging.sync(directory)


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
        found = _damage(folder, {name: files[name] for name in _share(sorted(files))})
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
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": _sha256(file)}

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _sha256(file) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    while size := file.readinto(buffer):
        digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


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


def _share(names: list[str]) -> list[str]:
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
    """Local training files by name: size, and the sha256 of at most 4 MiB spread over the file, so that it costs no time.

    Not the time of modification: a copy or a checkout changes that and no example. A Hub dataset has none.
    """
    paths = [Path(name) for name in ([train] if isinstance(train, str) else train)]
    return {str(path): {"bytes": path.stat().st_size, "sha256": _sampled(path)} for path in paths if path.is_file()}


def _sampled(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return _sha256(file)
        for i in range(_SAMPLES):  # the first and the last bytes among them
            file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Distribution -> version of what a curve depends on, Python and the git revision of this code."""
    found = {"python": platform.python_version(), "git": _git_revision() or "not in a checkout"}
    for name in ("accelerate", "adapt-dlm", "deepspeed", "peft", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_revision() -> str | None:
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # installed, inside of somebody else's checkout
        return None
    revision = git("rev-parse", "HEAD")
    return revision and revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
