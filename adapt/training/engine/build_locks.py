"""Locks that a killed build of a DeepSpeed operator leaves: every later launch waits for them, and says nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LONGEST_BUILD = 600  # seconds; DeepSpeed's largest operator takes two or three minutes


def folder() -> Path:
    """Where torch builds operators."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def abandoned() -> Iterator[tuple[Path, float]]:
    """(lock, its age in seconds) of those that no process of this machine holds: torch keeps the file open while it builds."""
    for lock in sorted([*folder().glob("*/lock"), *folder().glob("*/*/lock")]):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # the build has just ended
            continue
        if not _is_held_here(lock):
            yield lock, age


def check_build_locks() -> None:
    """Before DeepSpeed compiles an operator: a lock that a killed build left makes it, and every launch after, wait for ever.

    An abandoned one is told of, because a build on another machine may share the folder; once it is older than any build
    takes, ValueError.
    """
    for lock, age in abandoned():
        line = f"{lock} was left {age / 60:.0f} minutes ago by a build of a DeepSpeed operator that is gone, and launches wait for it"
        if age > LONGEST_BUILD:
            raise ValueError(f"training.deepspeed: {line}; remove that file")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"adapt train: {line}; remove that file unless another machine is building", file=sys.stderr)


def _is_held_here(lock: Path) -> bool:
    """Whether a process of this machine has the file open; yes where the system does not tell."""
    if not Path("/proc/self/fd").is_dir():
        return True
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == str(lock.resolve()):
                return True
        except OSError:  # gone, or another user's
            continue
    return False
