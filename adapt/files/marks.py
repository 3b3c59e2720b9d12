"""Which files are ours: each folder that we make holds a mark, which lists what we wrote there.

Nothing else removes a file or gives one the name of another (tests/test_marks.py keeps that). So what no mark lists is a user's, and
stays: notes beside a report, a copy of a checkpoint, a config.yaml that was there before.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .provenance import sampled, sampled_files
from .staging import publish, write_whole

MARK = ".adapt.json"
_MAKER = "adapt-dlm"
_MOST_BYTES = 16 << 20  # of a mark; a checkpoint of 4,096 ranks has 1 MB

Identity = Mapping[str, Any]
"""{"bytes", "sha256"} of a file as it was written; {} for one that grows, such as metrics.jsonl, which its name tells"""


class Mark(NamedTuple):
    run: str
    """by which it was made, 32 hex digits"""
    name: str | None
    """of the folder, where a copy under another name is none of ours"""
    files: dict[str, list[Identity]] | None
    """what was written into it; None while it is being written, when all in it is ours"""


def new_run() -> str:
    """A name for one run that no other has."""
    return uuid.uuid4().hex


def begin(folder: Path, run: str, *, name: str | None = None) -> None:
    """Makes a folder that is ours with all in it until `record` lists what is; the ValueError of `check_free` if the path is taken."""
    remove_hardly_begun(folder)
    check_free(folder)
    folder.mkdir(parents=True)
    _write(folder, Mark(run, name, None))


def adopt(folder: Path) -> str:
    """Marks a folder as one that a run writes into, made if need be; returns the run. What is in it already stays a user's."""
    mark = mark_of(folder)
    if mark is not None:
        return mark.run
    check_free(folder / MARK)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, Mark(new_run(), None, {}))
    return adopt(folder)


def mark_of(folder: Path) -> Mark | None:
    """The mark of a folder that we made; None for any other, for a link, and for a copy of a folder whose name tells what it is."""
    try:
        handle = os.open(folder / MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            if folder.is_symlink() or not stat.S_ISREG(os.fstat(handle).st_mode):
                return None
            found = json.loads(file.read(_MOST_BYTES))
        mark = Mark(found["run"], found["name"], found["files"])
    except (OSError, KeyError, RecursionError, TypeError, ValueError):  # none, or one that we did not write
        return None
    is_ours = found.get("maker") == _MAKER and isinstance(mark.run, str) and mark.name in (None, folder.name)
    return mark if is_ours and _is_listing(mark.files) else None


def is_ours(folder: Path, run: str | None = None) -> bool:
    """Whether we made the folder, in that run."""
    mark = mark_of(folder)
    return mark is not None and run in (None, mark.run)


def holds_nothing_else(folder: Path, run: str | None) -> bool:
    """Whether we made the folder in that run, and all that is in it is as we wrote it; or nothing is in it yet."""
    mark = mark_of(folder)
    if mark is None or mark.run != run:
        return is_hardly_begun(folder)
    found = (path for path in folder.rglob("*") if path.name != MARK and (path.is_symlink() or not path.is_dir()))
    inside = {str(path.relative_to(folder)) for path in found}
    return mark.files is None or (inside <= mark.files.keys() and changed_since_written(folder) is None)


def record(folder: Path, files: Mapping[str, Identity]) -> None:
    """Adds files to the list of a folder that is ours, by names relative to it; from then on nothing else in it is."""
    mark = mark_of(folder)
    assert mark is not None, folder
    listed = dict(mark.files or {})
    for name, identity in files.items():
        # The one before stays for a moment: a kill may come between this and the writing.
        listed[name] = [*listed.get(name, [])[-1:], dict(identity)]
    _write(folder, mark._replace(files=listed))


def write(folder: Path, name: str, text: str) -> None:
    """Writes a file into a folder that is ours, over one that `check_ours` has found to be ours."""
    content = text.encode()
    record(folder, {name: sampled(io.BytesIO(content))})
    write_whole(folder / name, content)


def record_all(folder: Path) -> None:
    """`record` of all that is in the folder."""
    record(folder, _identities(folder, _names(folder)))


def publish_marked(staged: Path, out: Path, run: str | None = None) -> None:
    """Gives a folder that was written elsewhere its name, with a mark that lists all that is in it."""
    listed = {name: [found] for name, found in _identities(staged, _names(staged)).items()}
    _write(staged, Mark(run or new_run(), None, listed))  # at once: a kill in between must not leave it as a user's
    publish(staged, out)


def replace_contents(folder: Path, staged: Path) -> None:
    """What is in `staged` takes the place of what we wrote into `folder`, file by file; what is a user's stays where it is.

    ValueError, and nothing is touched, where a user's file has a name that is needed.
    """
    mark = mark_of(folder)
    assert mark is not None, folder
    listed = mark.files or {}
    new = _names(staged)
    check_ours(folder, new, "out")
    record(folder, _identities(staged, new))
    for name in new:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(folder / name)
    for name in listed.keys() - set(new):
        if _is_inside(folder, name) and _is_one_of(folder / name, listed[name]):
            (folder / name).unlink()
            _remove_if_empty((folder / name).parent)
    _write(folder, mark._replace(files={name: [found] for name, found in _identities(folder, new).items()}))


def changed_since_written(folder: Path) -> str | None:
    """The name of a listed file that is not as we wrote it; None if all are, and where there is no mark."""
    mark = mark_of(folder)
    listed = {} if mark is None or mark.files is None else mark.files
    return next((name for name, found in listed.items() if not _is_one_of(folder / name, found)), None)


def is_as_written(folder: Path, name: str) -> bool:
    """Whether that file is one that we wrote, and nobody has changed it since."""
    mark = mark_of(folder)
    return mark is not None and mark.files is not None and _is_one_of(folder / name, mark.files.get(name, []))


def check_ours(folder: Path, names: Iterable[str], setting: str) -> None:
    """ValueError, of `setting`, where one of those paths exists and is not as we wrote it, or a link on the way leads out."""
    for name in names:
        path = folder / name
        is_anothers = os.path.lexists(path) and not (is_as_written(folder, name) or is_ours(path))
        if is_anothers or not _is_inside(folder, name):
            raise ValueError(
                f"{setting}={folder}: {name} there is not of this run, or was changed since; move it, or choose another folder "
                "(nothing was overwritten)"
            )


def check_free(path: Path) -> None:
    """ValueError if something has that name, a link included."""
    if os.path.lexists(path):
        raise ValueError(f"{path}: is there already, and not ours to replace; move it (nothing was overwritten)")


def remove(folder: Path, run: str | None = None) -> None:
    """Removes what is ours in a folder (and made in that run), and the folder if nothing else is in it.

    Folders inside are looked at in the same way. What the mark does not list, or lists otherwise, stays.
    """
    mark = mark_of(folder)
    if mark is None or run not in (None, mark.run):
        return
    if mark.files is None:
        for path in folder.iterdir():
            if path.name != MARK:  # which goes last: another rank may be writing still, and what it leaves is ours too
                discard(path)
        withdraw(folder)
        return
    inner = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    remove_listed(folder)
    for path in sorted(inner, reverse=True):
        remove(path)
        _remove_if_empty(path)
    withdraw(folder)


def remove_listed(folder: Path) -> None:
    """Removes the files that the folder's mark lists and nobody has changed, and the folder if nothing else is in it."""
    mark = mark_of(folder)
    listed = {} if mark is None or mark.files is None else mark.files
    for name, identities in listed.items():  # in their order: what makes a checkpoint whole goes first
        if _is_inside(folder, name) and _is_one_of(folder / name, identities):
            (folder / name).unlink()
    withdraw(folder)


def discard(path: Path) -> None:
    """Removes a file or a folder inside of one that is still being written, which is ours with all in it."""
    assert any((mark := mark_of(folder)) is not None and mark.files is None for folder in path.parents), path
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def withdraw(folder: Path) -> None:
    """Takes back the mark of a folder in which nothing else is, and the folder."""
    if mark_of(folder) is not None and [path.name for path in folder.iterdir()] == [MARK]:
        (folder / MARK).unlink()
        _remove_if_empty(folder)


def withdraw_unused(folder: Path, *, and_folder: bool) -> None:
    """Takes back the mark of a folder of which nothing that it lists is there, because a run was refused; and an empty folder."""
    mark = mark_of(folder)
    if mark is not None and mark.files is not None and not any(os.path.lexists(folder / name) for name in mark.files):
        (folder / MARK).unlink()
    if and_folder:
        _remove_if_empty(folder)


def set_aside(folder: Path, label: str) -> Path:
    """Renames a folder to `label-` and its name, or to that and a number where it is taken; returns where it is."""
    aside = folder.with_name(f"{label}-{folder.name}")
    number = 2
    while os.path.lexists(aside):
        aside, number = folder.with_name(f"{label}-{folder.name}.{number}"), number + 1
    folder.rename(aside)
    return aside


def _write(folder: Path, mark: Mark) -> None:
    write_whole(folder / MARK, json.dumps({"maker": _MAKER, **mark._asdict()}, indent=1) + "\n")


def is_hardly_begun(folder: Path) -> bool:
    """Of a folder that a kill has left between its making and its mark: empty, or with no more in it than the mark's beginning."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return all(path.name.startswith(f".{MARK}.") and path.is_file() for path in folder.iterdir())


def remove_hardly_begun(folder: Path) -> None:
    if is_hardly_begun(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MARK)


def _identities(folder: Path, names: Iterable[str]) -> dict[str, Identity]:
    return {name: sampled_files([folder / name])[str(folder / name)] for name in names}


def _is_listing(files: Any) -> bool:
    return files is None or (
        isinstance(files, dict)
        and all(isinstance(ids, list) and all(isinstance(one, dict) for one in ids) for ids in files.values())
    )


def _is_one_of(path: Path, identities: Iterable[Identity]) -> bool:
    """Whether a file is there as one of them says: its name alone, its bytes too, or its hash."""
    if path.is_symlink() or not path.is_file():
        return False
    for want in identities:
        if want.get("bytes") not in (None, path.stat().st_size):
            continue
        if "sha256" not in want or sampled_files([path])[str(path)]["sha256"] == want["sha256"]:
            return True
    return False


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a listed name is one in the folder itself, reached through no link."""
    return (folder / name).parent.resolve().is_relative_to(folder.resolve())


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # something is in it
        folder.rmdir()
