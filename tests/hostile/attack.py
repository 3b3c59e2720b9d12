"""An attack: a verb, run in this process on input that is bad or hostile, and what has to be true of every answer.

    attack(yard, ["generate", "checkpoint", "--prompt", ""], says="prompt=")

One line, exit code 1 or 2, no traceback, an end, no code of a stranger run, and every file as it was.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from adapt import cli
from adapt.doctor.bug_report import OURS

SECONDS = 60
"""after which a verb counts as hanging: no answer to bad input needs a tenth of it"""
RAN = "RAN"
"""the file that planted code makes in the current folder; it may never be there"""


class Answer(NamedTuple):
    """Of a verb."""

    code: int
    line: str
    """the last that it said on stderr"""
    changed: set[str]
    """files of the yard that are new, gone or different"""


class Hangs(BaseException):
    """No Exception, so that nothing on the way takes it for one."""


def attack(
    folder: Path, argv: Sequence[object], says: str = "", *, may_write: Iterable[str] = (), stdin: str = ""
) -> Answer:
    """Runs `adapt ARGV` in the folder, and holds its answer to the rules above. says: a part of the line.

    may_write: names at the top of the folder under which files may change, such as the lock of a run that is refused.
    """
    answer = run(folder, argv, stdin=stdin)
    assert answer.code in (1, 2), answer
    assert answer.line.startswith((f"adapt {argv[0]}: error: ", "lm-eval: error: ")), (
        answer
    )  # lm-eval has its own parser
    assert OURS not in answer.line, answer
    assert says in answer.line, answer
    touched = {path for path in answer.changed if path.split(os.sep)[0] not in set(may_write)}
    assert not touched, answer
    return answer


def run(folder: Path, argv: Sequence[object], *, stdin: str = "") -> Answer:
    """What `adapt ARGV` does in the folder, whatever it is; AssertionError for a traceback, a hang, or code that ran."""
    before, said = contents(folder), io.StringIO()
    with _in(folder), _alarm(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        ours, sys.stdin = sys.stdin, io.StringIO(stdin)
        logging.raiseExceptions = False  # lm-eval's handler writes to the stderr of the call before
        try:
            code = cli.main([str(argument) for argument in argv])
        except SystemExit as exited:  # usage errors
            code = int(exited.code or 0)
        finally:
            sys.stdin, logging.raiseExceptions = ours, True
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    assert not any("Traceback" in line for line in lines), said.getvalue()
    assert sum("error:" in line for line in lines) <= 1, lines
    assert not (folder / RAN).exists(), "code of a stranger was run"
    after = contents(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return Answer(code, lines[-1] if lines else "", changed)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and link below the folder, by its name in it; a folder that holds nothing counts as well."""
    found: dict[str, bytes] = {}
    for root, folders, files in os.walk(folder):
        for name in [*files, *(name for name in folders if not any(Path(root, name).iterdir()))]:
            path = Path(root, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = os.fsencode(os.readlink(path))
            else:
                found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else b""
    return found


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(signum: int, frame: object) -> None:
        raise Hangs(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
