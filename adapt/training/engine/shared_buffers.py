"""The 69 MB of shared memory that DeepSpeed makes for each rank on CPU, and leaves behind when that ends."""

from __future__ import annotations

import atexit
import os
import time
from pathlib import Path

FOLDER = Path("/dev/shm")
_NAME = "deepspeed_allreduce_buffer"
_SECONDS = 60  # a younger one may be of a rank that starts right now where /proc does not show it, in another container


def buffers() -> dict[Path, list[int]]:
    """Each buffer on this machine, and the process ids that hold it; none: it was left behind."""
    found: dict[Path, list[int]] = {path: [] for path in sorted(FOLDER.glob(f"{_NAME}_*"))}
    if not found:
        return found
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:  # gone, or another user's
            continue
        for path in found:
            if str(path) in text:
                found[path].append(int(maps.parent.name))
    return found


def remove_left_behind() -> None:
    """Before DeepSpeed starts on CPU: removes buffers of this user that nobody holds; and at exit the one of this rank."""
    for path, holders in buffers().items():
        try:
            stat = path.stat()
            if not holders and stat.st_uid == os.getuid() and time.time() - stat.st_mtime > _SECONDS:
                path.unlink()
        except FileNotFoundError:  # another rank was faster
            continue
    atexit.register(_remove_own)


def _remove_own() -> None:
    for path in FOLDER.glob(f"{_NAME}_*_{os.environ.get('MASTER_PORT')}_{os.environ.get('RANK', '0')}"):
        path.unlink(missing_ok=True)
