"""A folder or a file appears under its name whole, or not at all: it is made beside it and renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .. import progress

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's share of it, or what a file may hold


def check_space(out: Path, num_bytes: int) -> None:
    """ValueError if the disk of the (not yet existing) folder `out` has less room than that."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise ValueError(
            f"out={out}: needs {num_bytes / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free; nothing was written, "
            "free some space or write elsewhere"
        )


def is_full_disk(error: Exception) -> bool:
    """Whether an error means that nothing more can be written here; safetensors and tokenizers say it in words only."""
    said = ("No space left", "File too large", "quota exceeded")
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in said)


def publish(staged: Path, out: Path) -> None:
    """Gives the folder its name, once what is in it is on disk."""
    with progress.doing(f"bringing {out.name} to disk"):
        for path in staged.rglob("*"):
            sync(path)
        sync(staged)
    appeared = ValueError(f"out={out}: appeared meanwhile; choose a new folder (nothing was overwritten)")
    if os.path.lexists(out):  # a rename would take the place of an empty folder
        raise appeared
    try:
        staged.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise appeared from error
    sync(out.parent)


def write_whole(path: Path, content: str | bytes | Callable[[Path], None], *, to_disk: bool = False) -> None:
    """Writes a file beside and renames it, so that a kill leaves what stood there before, or nothing.

    content: text (UTF-8), bytes, or a function that writes to a path. to_disk: it is there on return.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.incomplete")  # two processes may write the same file
    try:
        if callable(content):
            content(beside)
        else:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
        if to_disk:
            sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if to_disk:
        sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
