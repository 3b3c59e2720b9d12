"""Ours and theirs: what we wrote is removed and replaced, and nothing else is."""

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapt.files import marks, outputs
from adapt.training.checkpoints.run_folder import check_adoptable

ROOT = Path(__file__).resolve().parents[1]
# What may remove a file or give one another's name, and why.
ALLOWED = {
    "adapt/files/marks.py",  # knows which files are ours
    "adapt/files/staging.py",  # a file or a folder appears under its name whole
    "adapt/files/outputs.py",  # locks, and what was made to try a place out
    "adapt/progress.py",  # a sign between a process and the one that it started, in the disk's temporary folder
    "adapt/training/engine/shared_buffers.py",  # DeepSpeed's in /dev/shm, of this user, that no process holds
}
REMOVES = {"rmtree", "unlink", "rename", "renames", "removedirs", "move", "remove", "rmdir"}


def _removals(path: Path) -> list[str]:
    """Calls of the os, of shutil and of a path that remove, or write over what has a name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of = node.func.attr, node.func.value
        module = of.id if isinstance(of, ast.Name) else ""
        on_path = name in {"unlink", "rename", "rmdir"} or (
            name == "replace" and len(node.args) == 1 and not node.keywords  # of a string it takes two
        )
        if (module in {"os", "shutil"} and name in REMOVES | {"replace"}) or (module != "dataclasses" and on_path):
            found.append(f"{path.name}:{node.lineno} {ast.unparse(node.func)}")
    return found


def test_nobody_else_removes_or_renames() -> None:
    files = [path for room in ("adapt", "eval", "recipes", "launch") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    found = [line for path in files if str(path.relative_to(ROOT)) not in ALLOWED for line in _removals(path)]
    assert found == []
    assert _removals(ROOT / "adapt" / "files" / "marks.py")  # so the search finds what it looks for


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder: the bytes of files, where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder that is ours: a file in it, one that grows, and a checkpoint in a folder of its own."""
    folder = tmp_path / "made"
    run = marks.adopt(folder)
    marks.write(folder, "config.yaml", "seed: 1\n")
    marks.record(folder, {"metrics.jsonl": {}})
    (folder / "metrics.jsonl").write_text("{}\n")
    marks.begin(folder / "checkpoints" / "checkpoint-4", run, name="checkpoint-4")
    (folder / "checkpoints" / "checkpoint-4" / "weights").write_text("1")
    marks.record(folder / "checkpoints" / "checkpoint-4", {"weights": {}})
    return folder


def test_what_is_ours_goes_whole(made: Path) -> None:
    marks.remove(made)
    assert not made.exists()


def note_beside(folder: Path) -> None:
    (folder / "notes.md").write_text("mine")


def note_in_a_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "checkpoint-4" / "notes.md").write_text("mine")


def edited(folder: Path) -> None:
    (folder / "config.yaml").write_text("seed: 1  # mine\n")


def copy_of_a_checkpoint(folder: Path) -> None:
    shutil.copytree(folder / "checkpoints" / "checkpoint-4", folder / "checkpoints" / "checkpoint-4-best")


def foreign_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "checkpoint-1000").mkdir()
    (folder / "checkpoints" / "checkpoint-1000" / "pytorch_model.bin").write_text("weights")


def link_to_elsewhere(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(folder.parent / "elsewhere")


def linked_folder(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    (folder / "checkpoints" / "checkpoint-4").symlink_to(folder.parent / "else")


def foreign_mark(folder: Path) -> None:
    (folder / "own").mkdir()
    (folder / "own" / marks.MARK).write_text(json.dumps({"files": None}))
    (folder / "own" / "thesis.txt").write_text("mine")


THEIRS: dict[Callable[[Path], None], str] = {
    note_beside: "notes.md",
    note_in_a_checkpoint: "checkpoints/checkpoint-4/notes.md",
    edited: "config.yaml",
    copy_of_a_checkpoint: "checkpoints/checkpoint-4-best/weights",
    foreign_checkpoint: "checkpoints/checkpoint-1000/pytorch_model.bin",
    link_to_elsewhere: "config.yaml",
    linked_folder: "checkpoints/checkpoint-4",
    foreign_mark: "own/thesis.txt",
}


@pytest.mark.parametrize("put", THEIRS, ids=lambda put: put.__name__)
def test_what_is_a_users_stays(made: Path, put: Callable[[Path], None]) -> None:
    (made.parent / "elsewhere").write_text("theirs")
    (made.parent / "else").mkdir()
    (made.parent / "else" / "weights").write_text("theirs")
    put(made)
    before = tree(made)[THEIRS[put]]
    marks.remove(made)
    assert tree(made)[THEIRS[put]] == before
    assert (made.parent / "elsewhere").read_text() == (made.parent / "else" / "weights").read_text() == "theirs"
    if put is not edited and put is not link_to_elsewhere:
        assert not (made / "config.yaml").exists()


MARKS = [
    b"", b"{}", b"[]", b"null", b"\xff", b'{"maker": 1}', b"[" * 100_000, b'{"maker": "adapt-dlm"}',
    b'{"maker": "adapt-dlm", "run": 5, "name": null, "files": null}',
    b'{"maker": "adapt-dlm", "run": "a", "name": "other", "files": null}',
    b'{"maker": "adapt-dlm", "run": "a", "name": null, "files": [1]}',
    b'{"maker": "adapt-dlm", "run": "a", "name": null, "files": {"thesis.txt": 1}}',
    b'{"maker": "adapt-dlm", "run": "a", "name": null, "files": {"thesis.txt": [{"bytes": 1}]}}',
    b'{"maker": "adapt-dlm", "run": "a", "name": null, "files": {"../beside.txt": [{}], "/etc/hostname": [{}]}}',
]  # fmt: skip


@pytest.mark.parametrize("content", MARKS)
def test_a_mark_that_we_did_not_write_opens_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "beside.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "folder" / marks.MARK).write_bytes(content)
    marks.remove(tmp_path / "folder")
    assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "beside.txt").read_text() == "mine"


def test_a_write_that_a_kill_cuts_off_leaves_a_file_that_is_ours(made: Path) -> None:
    before = (made / "config.yaml").read_bytes()
    marks.write(made, "config.yaml", "seed: 2\n")
    assert marks.is_as_written(made, "config.yaml")
    (made / "config.yaml").write_bytes(before)  # listed, not yet written
    assert marks.is_as_written(made, "config.yaml")


def test_contents_are_replaced_and_notes_stay(tmp_path: Path) -> None:
    report = tmp_path / "report"
    for number in ("1", "2"):
        staged = tmp_path / f"staged-{number}"
        (staged / "samples").mkdir(parents=True)
        (staged / "report.json").write_text(number)
        (staged / "samples" / f"{number}.jsonl").write_text(number)
        if number == "1":
            marks.publish_marked(staged, report)
            (report / "notes.md").write_text("mine")
            (report / "samples" / "mine.txt").write_text("mine")
        else:
            marks.replace_contents(report, staged)
    found = {name: content for name, content in tree(report).items() if name != marks.MARK}
    assert found == {
        "notes.md": b"mine", "report.json": b"2", "samples/2.jsonl": b"2", "samples/mine.txt": b"mine"
    }  # fmt: skip


# -- where a verb writes


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_link(path: Path) -> None:
    path.symlink_to(path.parent)


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


OCCUPIED: dict[str, tuple[Callable[[Path], None], str]] = {
    "file": (a_file, "is a file"),
    "folder": (Path.mkdir, "exists already"),
    "pipe": (lambda path: os.mkfifo(path), "is a pipe"),
    "link": (a_link, "is a link to"),
    "dangling link": (a_dangling_link, "is a link to"),
}


@pytest.mark.parametrize("kind", OCCUPIED)
def test_a_new_folder_takes_no_place_that_is_taken(tmp_path: Path, kind: str) -> None:
    make, message = OCCUPIED[kind]
    make(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        outputs.check_new_folder(tmp_path / "out")


@pytest.mark.parametrize("check", [outputs.check_new_folder, outputs.check_folder, outputs.check_file])
@pytest.mark.parametrize(
    "out",
    [
        "",
        " ",
        "a\0b",
        "FILE/x",
        "FILE/x/y",
        "FILE/../FILE/x",
        "/proc/out",
        "/sys/x/y",
        "/dev/null/x",
        "x" * 300,
        "x" * 230,
        "\ud800",
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_first(tmp_path, monkeypatch, check, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    with pytest.raises(ValueError, match=r"^out="):
        check(out, "out")
    assert tree(tmp_path) == {"FILE": b"mine"}


def test_looking_at_a_place_leaves_nothing_there(tmp_path: Path) -> None:
    outputs.check_new_folder(tmp_path / "a" / "b")
    outputs.check_folder(tmp_path / "a" / "b", "out")
    assert list(tmp_path.iterdir()) == []


def test_a_link_for_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with pytest.raises(ValueError, match=r"training\.output_dir=.*run: is a link to disk; give that folder itself"):
        check_adoptable(tmp_path / "run", "training.output_dir")
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_users_link_to_a_folder_is_something_else(tmp_path: Path) -> None:
    marks.begin(tmp_path / "adapter", "a")
    marks.record_all(tmp_path / "adapter")
    assert marks.holds_nothing_else(tmp_path / "adapter", "a")
    (tmp_path / "adapter" / "mine").symlink_to(tmp_path)
    assert not marks.holds_nothing_else(tmp_path / "adapter", "a")


def test_a_second_process_is_refused_and_a_dead_ones_rest_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    marks.begin(tmp_path / ".out.converting", marks.new_run())
    (tmp_path / ".out.converting" / "work").mkdir()
    (tmp_path / ".out.converting" / "work" / "half").write_text("half")
    with outputs.scratch_beside(out) as scratch:
        assert list(scratch.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_users_folder_with_the_scratch_folders_name_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.converting").mkdir()
    (tmp_path / ".out.converting" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not ours to replace"), outputs.scratch_beside(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.converting" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["my notes", "{}"])
def test_a_users_lock_file_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(ValueError, match="no lock of ours"), outputs.locked(tmp_path / ".lock", "out=x"):
        pass
    assert (tmp_path / ".lock").read_text() == content


def test_a_lock_is_not_followed_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="cannot be written"), outputs.locked(tmp_path / ".lock", "out=x"):
        pass
    assert (tmp_path / "precious").read_text() == ""


def test_what_is_replaced_is_not_written_through_a_link(tmp_path: Path) -> None:
    report, staged, elsewhere = tmp_path / "report", tmp_path / "staged", tmp_path / "elsewhere"
    (elsewhere / "base").mkdir(parents=True)
    marks.adopt(report)
    (report / "samples").symlink_to(elsewhere)
    (staged / "samples" / "base").mkdir(parents=True)
    (staged / "samples" / "base" / "task.jsonl").write_text("new")
    with pytest.raises(ValueError, match="nothing was overwritten"):
        marks.replace_contents(report, staged)
    assert tree(elsewhere) == {}
