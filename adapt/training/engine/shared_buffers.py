"""The 69 MB of shared memory that DeepSpeed makes for each rank on CPU, and leaves behind when that ends.

A rank of ours holds a lock on a file beside its buffer for as long as it lives. So the next start knows at once, and across
containers that share the folder, which buffers are of ranks of ours that are gone.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import pwd
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

FOLDER = Path("/dev/shm")
_NAME = "deepspeed_allreduce_buffer"
_LOCK = "adapt-lock-of-"
_BYTES = 69_206_024  # of a rank
_SECONDS = 60  # a younger one without a lock may be of a rank that starts right now where /proc does not show it, in a container

_lock: IO[str] | None = None


class Buffer(NamedTuple):
    path: Path
    uid: int
    pids: list[int]
    """processes of this machine that hold it, as far as this user may look"""
    is_locked: bool
    """a rank of ours holds it, perhaps in another container"""
    seconds: float
    """since it was made"""
    num_bytes: int

    @property
    def is_held(self) -> bool:
        return bool(self.pids) or self.is_locked

    @property
    def user(self) -> str:
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:  # of another container
            return str(self.uid)


def buffers() -> list[Buffer]:
    """Each buffer on this machine."""
    paths = sorted(FOLDER.glob(f"{_NAME}_*"))
    pids: dict[Path, list[int]] = {path: [] for path in paths}
    for maps in Path("/proc").glob("[0-9]*/maps") if paths else ():
        try:
            text = maps.read_text()
        except OSError:  # gone, or another user's
            continue
        for path in paths:
            if str(path) in text:
                pids[path].append(int(maps.parent.name))
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # it has gone meanwhile
            stat, is_locked = path.stat(), _is_taken(path.with_name(_LOCK + path.name))
            found.append(Buffer(path, stat.st_uid, pids[path], is_locked, time.time() - stat.st_mtime, stat.st_size))
    return found


def make_room() -> None:
    """Before DeepSpeed starts on CPU: removes buffers of this user that nobody holds; and at exit the one of this rank.

    Raises ValueError where the buffers of the ranks here do not fit: DeepSpeed would end by SIGBUS.
    """
    if _lock is not None:  # by an earlier run of this process
        return
    for lock in _abandoned_locks():
        lock.with_name(lock.name.removeprefix(_LOCK)).unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    for buffer in buffers():
        if not buffer.is_held and buffer.uid == os.getuid() and buffer.seconds > _SECONDS:
            buffer.path.unlink(missing_ok=True)
    _check_space()
    _take_own_lock()
    atexit.register(remove_own)


def remove_own() -> None:
    """At this rank's end."""
    global _lock
    if _lock is None:
        return
    for path in (_own(), Path(_lock.name)):
        path.unlink(missing_ok=True)
    _lock.close()
    _lock = None


def _own() -> Path:
    """As DeepSpeed calls it."""
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    return FOLDER / f"{_NAME}_{os.getuid()}_{host}_{port}_{os.environ.get('RANK', '0')}"


def _take_own_lock() -> None:
    """Makes and takes it, unless a run on the same port, in another container, has it for longer than a look takes."""
    global _lock
    path = _own().with_name(_LOCK + _own().name)
    for _ in range(20):
        try:
            lock = path.open("w")
        except OSError:  # no such folder
            return
        with suppress(
            BlockingIOError, FileNotFoundError
        ):  # another rank looks whether it is abandoned, and may remove it
            _take(lock)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                _lock = lock
                return
        lock.close()
        time.sleep(0.05)


def _abandoned_locks() -> Iterator[Path]:
    """This user's, of ranks that are gone; each is held while it is looked at."""
    for path in FOLDER.glob(f"{_LOCK}{_NAME}_*"):
        with suppress(OSError), path.open("r+") as lock:  # gone meanwhile, another user's, or held
            _take(lock)
            if os.fstat(lock.fileno()).st_uid == os.getuid():
                yield path


def _is_taken(path: Path) -> bool:
    try:
        with path.open("r+") as lock:
            _take(lock)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is another user's
        return False
    return False


def _take(lock: IO[str]) -> None:
    """BlockingIOError if another process holds it. POSIX's kind of lock: a loader process that is forked does not inherit it."""
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_space() -> None:
    if not FOLDER.is_dir():
        return
    ranks = int(os.environ.get("LOCAL_SIZE", "1"))
    made = len(list(FOLDER.glob(f"{_own().name.rpartition('_')[0]}_*")))
    needed, free = max(ranks - made, 1) * _BYTES, shutil.disk_usage(FOLDER).free
    if free < needed:
        raise ValueError(
            f"{FOLDER}: {free / 1e6:.0f} MB are free, and {ranks} ranks on CPU need {needed / 1e6:.0f} MB; `adapt doctor` says whose "
            "memory it is, and a container gets more with --shm-size=16g"
        )
