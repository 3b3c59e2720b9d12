"""What a verb is doing, on rank 0's standard error: a bar on a terminal, else a line at least every ten seconds.

    with progress.doing("proving the attention pattern"):            # speaks after a second, then every ten
    with progress.doing("scoring", total=len(items)) as task:        # with its share and the time left, from the first update on
        task.update(len(batch))
    progress.say("a line for itself, above the bars")

A thread speaks for work that cannot call back: an import, a compilation, a probe. It speaks of what began last. Nothing heavy is
imported: a verb speaks before torch is there.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

_MARK = "ADAPT_PROGRESS_MARK"  # the environment of a started process: the file that is not there while it speaks
FIRST = 1.0  # seconds before work is spoken of: what is done sooner needs no word
_TICK = 0.5  # seconds between two looks at the clock
_SCALES = {"": 1, "MB": 10**6}
_REDRAW = 0.2  # seconds between two drawings of a bar

debug = False
"""Whether --debug was given: what libraries say is not hidden."""

_running: list[Task] = []  # the last began last
_lock = threading.RLock()
_speaker: threading.Thread | None = None
_last_line = float("-inf")


class Task:
    """Work that is running. Made by `doing` or `begin`."""

    def __init__(self, what: str, total: int | None, unit: str, done: int, has_bar: bool, shown: bool) -> None:
        self.what, self.total, self.unit, self.done, self.first = what, total, unit, done, done
        self.figures: Sequence[str] = ()
        """key=value, the most important first; a narrow terminal shows fewer"""
        self.began = time.perf_counter()
        self.thread = threading.get_ident()
        self._updates: list[tuple[float, int]] = []  # (when, how much was done) of the first and the last
        self._file = sys.stderr
        # Several ranks would tear a bar.
        self._is_on_terminal = columns(self._file) > 0 and os.environ.get("WORLD_SIZE", "1") == "1"
        self._is_silent = not shown or not is_main() or (self._is_on_terminal and not has_bar)
        self._bar: Any = None
        self.mark: str | None = None
        """file; while it is not there, another process speaks"""
        self.was_spoken_of, self._done_when_spoken_of = False, done

    def update(self, amount: int = 1, *, speak: bool = True) -> None:
        """So much more of the total is done. speak: False if `speak` follows, with fresher figures."""
        self.done += amount
        self._updates = [*self._updates[:1], (time.perf_counter(), self.done)]
        if speak and self.was_spoken_of and self.is_due():
            self.speak()

    def is_due(self, early: float = 0.0) -> bool:
        """Whether it is time for another line, or to draw the bar anew. early: seconds."""
        now = time.perf_counter()
        if not self.was_spoken_of and self.began > _last_line:
            return now - self.began >= FIRST
        return now - _last_line >= (_REDRAW if self._is_on_terminal else seconds_between_lines() - early)

    def speak(self) -> None:
        """The bar as it is now, or a line."""
        global _last_line
        if self._is_silent:
            return
        with _lock:
            if self.mark is not None and not os.path.exists(self.mark):
                self._erase()
            elif self._is_on_terminal:
                self._draw()
            else:
                print(self.text(), file=self._file, flush=True)
            _last_line = time.perf_counter()
            self.was_spoken_of, self._done_when_spoken_of = True, self.done

    def close(self, last_line: bool = False) -> None:
        """The end. last_line: of how it ended, also if it was not spoken of before."""
        with _lock:
            if self._bar is not None or ((self.was_spoken_of or last_line) and self._done_when_spoken_of != self.done):
                self.speak()
            # What this thread began inside, and did not end because it failed, has ended too.
            since = _running.index(self) if self in _running else len(_running)
            for task in [task for task in _running[since:] if task.thread == self.thread]:
                _running.remove(task)
                if task._bar is not None:
                    task._bar.close()
                    task._bar = None
            _hand_word(back=True)

    def _erase(self) -> None:
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()
            self._bar = None

    def text(self) -> str:
        """One line: how much is done, how long it will take or has taken, figures."""
        if self.total is None:
            passed = time.perf_counter() - self.began
            return " ".join([self.what, *([_clock(passed)] if passed >= 2 * FIRST else []), *self.figures])
        share = f"{self.done / max(self.total, 1):4.0%}"
        return " ".join([f"{self.what}: {share} {self._amount()} {self._time()}", *self.figures])

    def _amount(self) -> str:
        scale = _SCALES[self.unit]
        return f"{self.done // scale}/{(self.total or 0) // scale}{self.unit}"

    def _time(self) -> str:
        """The time left. The first update takes longer than those that follow (kernels are compiled): it gives a bound."""
        now, left = time.perf_counter(), (self.total or 0) - self.done
        if not self._updates:
            return _clock(now - self.began)
        (first, done_first), (last, done) = self._updates[0], self._updates[-1]
        if done == done_first:
            return f"eta {'<' if left else ''}{_clock((first - self.began) / max(done - self.first, 1) * left)}"
        return f"eta {_clock(max(0.0, (last - first) / (done - done_first) * left - (now - last)))}"

    def _draw(self) -> None:
        from tqdm import tqdm

        if self._bar is None:
            for task in _running:  # one bar at a time, of what began last
                task._erase()
            # `disable` is said, because `cli` changes its default.
            options = {"file": self._file, "dynamic_ncols": True, "disable": False, "leave": self.total is not None}
            self._bar = tqdm(total=self.total, initial=self.done, bar_format="{desc}", **options)
        if self.total is None:
            self._bar.bar_format = _literal(self.text())
        else:
            before, after = f"{self.what}: {self.done / max(self.total, 1):4.0%}|", f"| {self._amount()} {self._time()}"
            room = columns(self._file) - 2 - len(f"{before}{'#' * 10}{after}")
            after = " ".join([after, *fitting(self.figures, room)])
            self._bar.n = self.done
            self._bar.bar_format = _literal(before) + "{bar:10}" + _literal(after)
        self._bar.refresh()


def begin(what: str, total: int | None = None, *, unit: str = "", done: int = 0, bar: bool = True) -> Task:
    """A task that `close` ends: for callbacks, which have no `with`. Its settings are those of `doing`; done: so far."""
    task = Task(what, total, unit, done, bar, shown=True)
    with _lock:
        _hand_word(back=False)
        _start_speaker()
        _running.append(task)
    return task


@contextmanager
def doing(
    what: str, total: int | None = None, *, unit: str = "", bar: bool = True, shown: bool = True
) -> Iterator[Task]:
    """Inside, `what` is being done, and the task is told how much of it. Other ranks than 0 say nothing.

    total: of what `update` counts; None = not known, the time that has passed is shown. unit: "MB" of bytes. bar: on a terminal;
    False for work that draws there itself. shown: False says nothing.
    """
    task = begin(what, total, unit=unit, bar=bar) if shown else Task(what, total, unit, 0, bar, shown)
    try:
        yield task
    finally:
        task.close()


def say(line: str, file: TextIO | None = None) -> None:
    """A line on rank 0's standard error (or that file), above the bars."""
    global _last_line
    if not is_main():
        return
    with _lock:
        if any(task._bar is not None for task in _running):
            from tqdm import tqdm

            tqdm.write(line, file=file or sys.stderr)
        else:
            print(line, file=file or sys.stderr, flush=True)
        _last_line = time.perf_counter()


@contextmanager
def starting_process(what: str) -> Iterator[dict[str, str]]:
    """Inside, `what` is being done while the process that is started there, in the environment that is given, does not speak."""
    with tempfile.TemporaryDirectory(prefix="adapt-progress-") as folder, doing(what) as task:
        mark = Path(folder) / "mark"
        mark.touch()
        task.mark = str(mark)
        yield {**os.environ, _MARK: task.mark}


@contextmanager
def handed_over() -> Iterator[None]:
    """Inside, nothing is said from here, because what runs there draws on the terminal."""
    with _lock:
        before = list(_running)
        _running.clear()
        for task in before:
            task._erase()
    try:
        yield
    finally:
        with _lock:
            _running[:] = before
        _start_speaker()


def _hand_word(back: bool) -> None:
    """Before the first task and after the last: tells the process that started this one who speaks (`starting_process`)."""
    if _running or not is_main() or _MARK not in os.environ:
        return
    with suppress(OSError):  # it may be gone
        if back:
            Path(os.environ[_MARK]).touch()
        else:
            Path(os.environ[_MARK]).unlink()


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def seconds_between_lines() -> float:
    """$ADAPT_PROGRESS_SECONDS, by default 10; 0 = none but those that end something."""
    given = os.environ.get("ADAPT_PROGRESS_SECONDS", "10")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"ADAPT_PROGRESS_SECONDS={given}: must be a number of seconds, such as 60; 0 = no such lines")
    return seconds or float("inf")


def columns(file: TextIO) -> int:
    """Width of the terminal that the file is; 0 where it is none."""
    try:
        return os.get_terminal_size(file.fileno()).columns if file.isatty() else 0
    except (OSError, ValueError):  # closed, or no file of the system
        return 0


def fitting(figures: Sequence[str], width: int) -> list[str]:
    """As many of the figures, from the first on, as fit into so many columns of one line."""
    shown = list(figures)
    while shown and len(" ".join(shown)) > width:
        shown.pop()
    return shown


def _start_speaker() -> None:
    global _speaker
    with _lock:
        if seconds_between_lines() < float("inf") and _speaker is None and is_main():
            _speaker = threading.Thread(target=_speak_when_due, name="progress", daemon=True)
            _speaker.start()


def _speak_when_due() -> None:
    """Until nothing is running any more."""
    global _speaker
    pause = threading.Event()
    while True:
        pause.wait(_TICK)
        with _lock:
            if not _running:
                _speaker = None
                return
            task = _running[-1]
            if task.is_due(early=2 * _TICK):
                task.speak()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
