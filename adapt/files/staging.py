"""A folder or a file appears under its name whole, or not at all: it is made beside it and renamed.

What a killed run left is recognised (it has a lock that nobody holds) and removed by the next run for the same name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import progress

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's share of it, or what a file may hold
_LOCK = "lock"
_SECONDS_TO_LOCK = 60  # between a scratch folder's birth and its lock, generously


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """An empty folder on the disk of `out`, which goes with all that is in it; ValueError where the disk is full."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.converting-"
    for old in sorted(out.parent.iterdir()):
        if old.name.startswith(prefix):
            _remove_if_stale(old)
    with _no_traceback_when_full(out):
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        try:
            with (scratch / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                lock.write(socket.gethostname())
                lock.flush()
                yield scratch
        finally:  # not TemporaryDirectory: where the permission is lost it calls itself without end (Python 3.11)
            shutil.rmtree(scratch, ignore_errors=True)


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
    try:
        staged.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ValueError(f"out={out}: appeared meanwhile; choose a new folder (nothing was overwritten)") from error
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


def _remove_if_stale(scratch: Path) -> None:
    try:
        with (scratch / _LOCK).open("r+") as lock:
            # Another machine's lock cannot be seen on every filesystem that two machines share.
            if lock.read() not in ("", socket.gethostname()):
                return
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratch, ignore_errors=True)
    except FileNotFoundError:
        if time.time() - scratch.lstat().st_mtime > _SECONDS_TO_LOCK and scratch.is_dir() and not scratch.is_symlink():
            shutil.rmtree(scratch, ignore_errors=True)
    except (BlockingIOError, NotADirectoryError, PermissionError):
        return


@contextmanager
def _no_traceback_when_full(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the tokenizer's Rust raises a bare Exception for the same thing
        if not is_full_disk(error):
            raise
        raise ValueError(
            f"out={out}: the disk is full, nothing was left on it; free some space or write elsewhere"
        ) from error
