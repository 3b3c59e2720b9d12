"""Faults in the middle of a verb's writing: no success is reported, no half output has a final name, the same command works after.

The fault happens where the verb opens its n-th file for writing, in the middle of all that a whole run opens, so that a case is the
same each time on any machine. A full disk is a limit on the size of files, which the kernel keeps for all languages alike.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import kill_resume
import psutil
import pytest
from attack import contents

pytestmark = [pytest.mark.exhaustive, pytest.mark.distributed]

OUT = "runs"
"""the folder of the yard that a verb writes into; a note of the user's lies in it too"""


class Case(NamedTuple):
    argv: list[str]
    final: str
    """the last that a whole run makes"""


_EVAL = ["--tasks", "pairs", "--include_path", "tasks", "--limit", "2"]
_SAVES = ["--training.save_steps", "1", "--training.num_steps", "4"]
CASES = {
    "train": Case(
        ["train", "--config", "recipe.yaml", "--training.output_dir", f"{OUT}/new", *_SAVES],
        f"{OUT}/new/model",
    ),
    "convert": Case(["convert", "base", f"{OUT}/new", "--attention", "prefix"], f"{OUT}/new"),
    "export": Case(["export", "checkpoint", f"{OUT}/new"], f"{OUT}/new"),
    "compare": Case(
        ["compare", "--base", "base", "--adapted", "checkpoint", *_EVAL, "--out", f"{OUT}/new"],
        f"{OUT}/new/report.json",
    ),
    "lm_eval": Case(
        ["lm_eval", "--model", "adapt", "--model_args", "pretrained=checkpoint", *_EVAL, "--output_path", f"{OUT}/new"],
        f"{OUT}/new",
    ),
    "quickstart": Case(["quickstart", "--fast", "--out", f"{OUT}/new"], f"{OUT}/new/report/report.json"),
}


# --- what happens, in the process of the verb


def _no_room(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _no_permission(folder: Path) -> None:
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        path.chmod(0o555)
    if os.geteuid() == 0:  # whom permissions do not stop, until the two capabilities for that are given up (capset(2))
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


FAULTS: dict[str, Callable[[Path], None]] = {
    "SIGTERM": lambda folder: os.kill(os.getpid(), signal.SIGTERM),
    "SIGKILL": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda folder: os.kill(os.getpid(), signal.SIGSTOP),
    "full disk": _no_room,
    "lost permission": _no_permission,
    "lost folder": shutil.rmtree,
}


def _child(yard: str, argv: list[str], fault: str | None, at: int, answer: Connection) -> None:
    """Runs the verb with the fault at its at-th file; sends how many files it has opened for writing."""
    os.dup2(answer.fileno(), 2)  # no file: its size would be limited too
    os.chdir(yard)
    folder, opened = os.path.abspath(OUT), 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal opened
        if event != "open" or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if not arguments[2] & (os.O_WRONLY | os.O_RDWR) or not os.path.abspath(arguments[0]).startswith(
            folder + os.sep
        ):
            return
        opened += 1
        if opened == at and fault is not None:
            FAULTS[fault](Path(folder))

    if argv[0] == "quickstart":
        _train_in_this_process()
    if argv[0] == "lm_eval":
        _look_for_tasks_of_ours_only()
    sys.addaudithook(watch)
    from adapt.cli import main

    code = main(argv)
    sys.stderr.flush()
    os.write(2, f"\nOPENED {opened}".encode())
    os._exit(code)


def _train_in_this_process() -> None:
    """The quickstart's arms without `deepspeed`, whose processes tests/test_launcher.py is about, at a tenth of the time."""
    from adapt.cli import main
    from adapt_recipes.quickstart import arms, quickstart

    def train(arm: str, init: Path, data: Path, folder: Path, overrides: list[str]) -> Path:
        config = Path(arms.__file__).with_name(f"{arm}.yaml")
        argv = [
            "--config",
            config,
            "--model.base",
            init,
            "--data.train",
            data,
            "--training.output_dir",
            folder,
            *overrides,
        ]
        argv += ["--training.deepspeed", "null", "--training.num_epochs", "0.2"]
        if not (folder / "model").exists() and main(["train", *map(str, argv)]) != 0:
            raise ValueError(f"quickstart: training the {arm} arm failed; its reason stands above")
        return folder / "model"

    quickstart.train = train


def _look_for_tasks_of_ours_only() -> None:
    """Instead of reading lm-eval's 13,000 task files, in 15 s."""
    from lm_eval import tasks

    real = tasks.TaskManager.__init__
    tasks.TaskManager.__init__ = lambda self, *args, **kwargs: real(self, *args, **kwargs | {"include_defaults": False})


# --- the matrix


def run(yard: Path, argv: list[str], fault: str | None = None, at: int = 0) -> tuple[int, str]:
    """(exit code, what was said on stderr)."""
    ours, theirs = kill_resume.SERVER.Pipe(duplex=False)
    process = kill_resume.SERVER.Process(target=_child, args=(str(yard), argv, fault, at, theirs))
    process.start()
    theirs.close()
    if fault == "SIGSTOP":
        child = psutil.Process(process.pid)
        while process.is_alive() and child.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        child.resume()
    said = b""
    while read := os.read(ours.fileno(), 1 << 16):
        said += read
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode, said.decode()


@pytest.fixture(scope="module")
def whole(whole_yard: Path, tmp_path_factory: pytest.TempPathFactory):
    """whole(verb) = (files of a run without a fault, how many it opens for writing)."""
    kill_resume.SERVER.set_forkserver_preload(
        ["adapt.training.train", "deepspeed", "kill_resume", "adapt_eval.compare"]
    )
    found: dict[str, tuple[dict[str, bytes], int]] = {}

    def of(verb: str) -> tuple[dict[str, bytes], int]:
        if verb not in found:
            yard = fresh_yard(whole_yard, tmp_path_factory.mktemp(verb))
            code, said = run(yard, CASES[verb].argv)
            assert code == 0, said
            found[verb] = contents(yard / OUT), int(said.rpartition("OPENED ")[2])
        return found[verb]

    return of


def fresh_yard(whole_yard: Path, folder: Path) -> Path:
    yard = shutil.copytree(whole_yard, folder / "yard")
    (yard / OUT).mkdir()
    (yard / OUT / "notes.txt").write_text("the user's")
    return yard


def assert_whole(found: dict[str, bytes], want: dict[str, bytes]) -> None:
    """What has its final name is whole: weights are those of a run without a fault, JSON can be read."""
    for name, content in found.items():
        if name.endswith(".safetensors") and name in want and "checkpoint-" not in name:
            assert content == want[name], name
        if name.endswith(".json") and "checkpoint-" not in name and "/." not in name:
            json.loads(content)


def outside(yard: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(yard).items() if not name.startswith(OUT + os.sep)}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", CASES)
def test_a_fault_reports_no_success_leaves_no_half_output_and_the_same_command_works(
    verb: str, fault: str, whole, whole_yard: Path, tmp_path: Path
) -> None:
    case, (want, opened) = CASES[verb], whole(verb)
    yard = fresh_yard(whole_yard, tmp_path)
    before = outside(yard)
    code, said = run(yard, case.argv, fault, at=(opened + 1) // 2)
    if (yard / OUT).exists():
        for path in [yard / OUT, *(path for path in (yard / OUT).rglob("*") if path.is_dir())]:
            path.chmod(0o755)
    if fault == "SIGSTOP":
        assert code == 0, said
    else:
        assert code != 0, said
        assert_whole(contents(yard / OUT), want)
        assert "Traceback" not in said, said
    if fault not in ("SIGKILL", "SIGSTOP", "SIGTERM"):
        assert said.count("error: ") == 1, said
    if fault == "lost folder":
        (yard / OUT).mkdir(exist_ok=True)
    else:
        assert (yard / OUT / "notes.txt").read_text() == "the user's"
    if fault != "SIGSTOP":
        code, said = run(yard, case.argv)
        assert code == 0, said
    found = contents(yard / OUT)
    assert (yard / case.final).exists()
    weights = {name for name in want if name.endswith(".safetensors") and "checkpoint-" not in name}
    assert {name: found.get(name) for name in weights} == {name: want[name] for name in weights}
    assert not [name for name in found if "incomplete" in name or ".converting-" in name]
    assert outside(yard) == before
