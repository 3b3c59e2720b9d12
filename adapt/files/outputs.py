"""Where a verb writes: looked at, tried out and locked before its work begins, so that no work is lost at its end.

A new folder is made beside its place and renamed (`scratch_beside`); a run and a report that is replaced have their folder themselves.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import marks
from .staging import is_full_disk

_PROBE = b"\0" * (16 << 10)  # written and removed again: a disk without room for that has none for a result
_LOCKED_BY = "process "


class Busy(ValueError):
    """Another process writes there."""


def check_new_folder(out: str | Path, setting: str = "out") -> Path:
    """The path of a folder that does not exist and can be made; ValueError if it does, or if nothing can be written there."""
    path = _path(out, setting)
    if os.path.lexists(path):
        what = _kind(path)
        raise ValueError(
            f"{setting}={out}: exists already{f' ({what})' if what else ''}; choose a new folder or remove it (nothing was overwritten)"
        )
    _try_out(path, out, setting)
    return path


def check_folder(out: str | Path, setting: str) -> Path:
    """The path of a folder that is there or can be made, with room in it for more; ValueError if it is something else."""
    path = _path(out, setting)
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{setting}={out}: {_kind(path)}; give a folder")
    _try_out(path, out, setting)
    return path


def check_adoptable(folder: Path, setting: str) -> None:
    """ValueError, of `setting`, for a link, and for a folder with something of another's where our mark belongs."""
    if folder.is_symlink():
        raise ValueError(f"{setting}={folder}: is a link to {os.readlink(folder)}; give that folder itself")
    if os.path.lexists(folder / marks.MARK) and marks.mark_of(folder) is None:
        raise ValueError(
            f"{setting}={folder}: {marks.MARK} there is not of this run; move it, or choose another folder"
        )


def check_file(out: str | Path, setting: str) -> Path:
    """The path of a file that can be written, in a folder that exists; ValueError for what is there and no ordinary file."""
    path = _path(out, setting)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise ValueError(f"{setting}={out}: {_kind(path) or 'is a folder'}; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{setting}={out}: no such folder {path.parent}; make it first")
    _try_out(path, out, setting)
    return path


@contextmanager
def claimed(out: Path, setting: str = "out") -> Iterator[None]:
    """Inside, the folder above `out` is there and no other process that asks writes to `out`; ValueError where one does."""
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out.with_name(f".{out.name}.lock"), f"{setting}={out}"):
            yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()  # where nothing was written


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """An empty folder on the disk of the new folder `out`, which goes with all that is in it; nobody else makes `out` meanwhile.

    It lies in `.NAME.converting`, which a killed process may have left: then it is ours by its mark. ValueError where another
    process is at it, where `out` cannot be made, and where the disk is full.
    """
    check_new_folder(out)
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    place = out.with_name(f".{out.name}.converting")
    is_mine = not marks.is_ours(place)
    try:
        if is_mine:
            marks.begin(place, marks.new_run())
        with locked(place / "lock", f"out={out}"), _no_traceback_when_full(out):
            is_mine, scratch = True, place / "work"
            marks.discard(scratch)
            scratch.mkdir()
            try:
                yield scratch
            finally:
                marks.remove(place)  # while it is locked: later it may be another process that works there
                is_mine = False
    except Busy:
        is_mine = False
        raise
    finally:
        if is_mine:
            marks.remove(place)
            marks.remove_hardly_begun(place)  # where a signal came between the folder and its mark
        marks.withdraw(place)  # over a network an open lock file stays as another until it is closed
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()  # where nothing was written


@contextmanager
def locked(path: Path, setting: str) -> Iterator[None]:
    """Inside, no other process has this lock file; ValueError, of `setting` (`out=folder`), while another one has.

    The lock ends with the process, however that ends, and is not handed on to processes that it starts.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise ValueError(f"{setting}: {path} cannot be written ({error.strerror}); choose another folder") from error
    not_ours = ValueError(f"{setting}: {path} is no lock of ours; move it, or choose another folder")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise not_ours
    with os.fdopen(handle, "r+", errors="replace") as lock:
        holder = lock.read(200)
        if holder and not holder.startswith(_LOCKED_BY):
            raise not_ours
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink == 0:  # its holder ended between our opening it and our locking it
                raise BlockingIOError
        except (BlockingIOError, PermissionError) as error:
            raise Busy(
                f"{setting}: another run writes to it ({holder.strip() or 'unknown process'}); "
                "wait for it, stop it, or choose another folder"
            ) from error
        except OSError as error:  # a filesystem without locks
            print(
                f"{setting}: cannot be locked ({error.strerror}), so a second run in it would not be noticed",
                file=sys.stderr,
            )
        lock.seek(0)
        lock.truncate(0)
        lock.write(f"{_LOCKED_BY}{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class KeptElsewhere(OSError):
    """A result could not be written to its place; the message names where it is instead."""


@contextmanager
def kept_if_it_fails(name: str, what: str) -> Iterator[Path]:
    """A folder on the disk for temporary files, removed if the body ends well; else it stays, and `KeptElsewhere` says where it is."""
    place = kept_elsewhere(name)
    folder = place / "results"
    marks.begin(folder, marks.new_run())
    try:
        yield folder
    except BaseException as error:
        is_empty = [path.name for path in folder.iterdir()] == [marks.MARK]
        if not is_empty and isinstance(error, (OSError, ValueError)):
            reason = " ".join(str(error).split())[:200]
            raise KeptElsewhere(
                f"{what}: could not be written ({reason}); the results are in {folder} instead"
            ) from error
        if is_empty:
            marks.remove(folder)
            place.rmdir()
        raise
    marks.remove(folder)
    place.rmdir()


def kept_elsewhere(name: str) -> Path:
    """A new folder on the disk for temporary files, for a result that could not be written to its place."""
    return Path(tempfile.mkdtemp(prefix=f"adapt-{name}-"))


def _path(out: str | Path, setting: str) -> Path:
    """The path that was typed; ValueError for none, and for one that no file can have."""
    if not str(out).strip() or "\0" in str(out):
        raise ValueError(f"{setting}={str(out)!r}: is no path; give a folder's or a file's name")
    path = Path(out)
    try:
        os.fsencode(path)
        path.parent.stat()
        os.path.lexists(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long, a circle of links, a lone surrogate
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{setting}={str(out)[:200]!a}: is no path ({reason}); give another one") from error
    return path


def _try_out(path: Path, out: str | Path, setting: str) -> None:
    """ValueError unless a file can be written in the folder, or in the nearest one above that exists; it is removed again."""
    place = path.absolute()
    while not os.path.lexists(place) or (place == path.absolute() and not place.is_dir()):
        place = place.parent
    if not place.is_dir():
        raise ValueError(
            f"{setting}={out}: {place} {_kind(place)}, so nothing can be written in it; choose another folder"
        )
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(_PROBE)
            probe.flush()
        os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError as error:
        reason = "its disk is full" if is_full_disk(error) else error.strerror
        raise ValueError(f"{setting}={out}: {place} cannot be written ({reason}); choose another folder") from error
    if len(os.fsencode(path.name)) + 40 > os.pathconf(place, "PC_NAME_MAX"):  # room for what is made beside it
        raise ValueError(f"{setting}={str(out)[:200]}...: its name is too long; give a shorter one")


def _kind(path: Path) -> str:
    """What is there, if no folder, in words; empty for a folder."""
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}"
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISREG, "is a file"), (stat.S_ISFIFO, "is a pipe"), (stat.S_ISDIR, ""))
    return next((words for test, words in kinds if test(mode)), "is a device or a socket")


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
