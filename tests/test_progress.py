"""Nothing is silent: what works long says so, once, on a terminal and in a file; what libraries say does not drown it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from training_fixtures import recipe_argv, write_base, write_pairs

from adapt import cli, progress
from adapt.training import train

# Of tqdm, DeepSpeed's logger, its launcher and operators, bitsandbytes, transformers, datasets.
CHATTER = (
    *("it/s]", "examples/s]", "[WARNING]", "[INFO]", "built successfully", "hostfile", "gemm"),
    *("Loading weights", "Writing model shards", "Generating train split"),
)


class Lines(list):
    """A file that keeps whole lines, and tells when there are as many as somebody waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.grown = threading.Condition()

    def write(self, text: str) -> None:
        with self.grown:
            self.extend(line for line in text.split("\n") if line)
            self.grown.notify_all()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def wait_for(self, count: int) -> None:
        """Returns when there are that many; fails if they do not come in a minute, which is for ever here."""
        with self.grown:
            assert self.grown.wait_for(lambda: len(self) >= count, timeout=60), self


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """A standard error, where work is spoken of after a moment and every other moment."""
    monkeypatch.setenv("ADAPT_PROGRESS_SECONDS", "0.05")
    monkeypatch.setattr(progress, "FIRST", 0.01)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    return Lines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return clock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl")
    return folder


# --- a thread speaks


def test_work_that_cannot_call_back_is_spoken_of_again_and_again(lines: Lines) -> None:
    with redirect_stderr(lines), progress.doing("proving"):
        lines.wait_for(4)
    assert all(line.startswith("proving") for line in lines)


def test_a_verb_that_says_nothing_is_spoken_of_from_its_import_on(lines, tmp_path, monkeypatch) -> None:
    slow = "import sys\nsys.stderr.wait_for(2)\ndef run(argv):\n    sys.stderr.wait_for(len(sys.stderr) + 3)\n"
    (tmp_path / "slow_verb.py").write_text(slow)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "VERBS", {"slow": cli.Verb("slow_verb:run", "is slow")})
    with redirect_stderr(lines):
        assert cli.main(["slow"]) == 0
    assert lines[0] == "adapt slow: starting"
    assert re.fullmatch(r"adapt slow \d\d:\d\d", lines[-1])


def test_the_work_that_began_last_is_spoken_of_and_the_one_around_it_afterwards(lines: Lines) -> None:
    with redirect_stderr(lines), progress.doing("outer"):
        with progress.doing("inner"):
            lines.wait_for(2)
        assert all(line.startswith("inner") for line in lines)
        lines.wait_for(len(lines) + 2)
    assert lines[-1].startswith("outer")


def test_work_that_failed_is_not_spoken_of_any_more() -> None:
    def fail() -> None:
        with progress.doing("outer"):
            progress.begin("of a callback")  # which has no end where an error passes
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert progress._running == []


def test_other_ranks_and_silenced_work_say_nothing(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    with redirect_stderr(lines), progress.doing("heard"):
        with progress.doing("not heard", total=2, shown=False) as task:
            task.update(2)
            task.speak()
        lines.wait_for(2)
        monkeypatch.setenv("RANK", "1")
        progress.say("of another rank")
        with progress.doing("of another rank", total=1) as other:
            other.update()
            other.speak()
    assert all(line.startswith("heard") for line in lines)


def test_a_process_that_was_started_takes_the_word_and_gives_it_back(lines: Lines) -> None:
    code = (
        "import os; from adapt import progress; mark = os.environ[progress._MARK]; assert os.path.exists(mark)\n"
        "with progress.doing('child'): assert not os.path.exists(mark)\n"
        "assert os.path.exists(mark)\n"
    )
    with redirect_stderr(lines), progress.starting_process("parent") as environment:
        lines.wait_for(2)
        mark = Path(environment[progress._MARK])
        mark.unlink()  # as a child does that speaks
        (task,) = progress._running
        task.speak()
        said = len(lines)
        task.speak()
        assert len(lines) == said
        mark.touch()
        lines.wait_for(said + 1)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_number_of_seconds_that_is_none_is_refused_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setenv("ADAPT_PROGRESS_SECONDS", "often")
    assert cli.main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adapt doctor: error: ADAPT_PROGRESS_SECONDS=often: must be a number of seconds")
    assert error.count("\n") == 1


# --- the time that is left


def test_the_first_update_bounds_the_time_left_and_does_not_count_afterwards(clock) -> None:
    with progress.doing("train", total=11) as task:
        clock[0] = 100  # it compiles
        assert task.text() == "train:   0% 0/11 01:40"
        task.update()
        assert task.text() == "train:   9% 1/11 eta <16:40"
        for clock[0] in (102, 104):
            task.update()
        assert task.text() == "train:  27% 3/11 eta 00:16"
        clock[0] = 105  # it goes down while a step is under way, and not below nothing
        assert task.text() == "train:  27% 3/11 eta 00:15"
        clock[0] = 1000
        assert task.text() == "train:  27% 3/11 eta 00:00"


def test_bytes_are_told_in_megabytes(clock) -> None:
    with progress.doing("writing", total=3 * 10**9, unit="MB") as task:
        task.update(1_500_000_000)
        assert task.text().startswith("writing:  50% 1500/3000MB eta ")


# --- what libraries say


@pytest.fixture
def talkative():
    """Libraries as they are before a verb has quietened them; afterwards as they were."""
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()
    transformers.logging.set_verbosity_warning()
    yield
    transformers.logging.set_verbosity(level)
    if not bars:
        transformers.logging.disable_progress_bar()


def test_train_says_what_it_does_and_nothing_of_libraries(folder: Path, talkative, capfd) -> None:
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "quiet", training__num_steps=2)
    assert cli.main(["train", *argv]) == 0
    said = capfd.readouterr()
    assert said.out == ""
    assert [line for line in said.err.splitlines() if any(words in line for words in CHATTER)] == []
    summary, legend, first, last, out = said.err.splitlines()
    assert "steps of 8 rows on 1 rank" in summary
    assert legend.startswith("train: nelbo = ")
    assert first.startswith("train:  50% 1/2 ")
    assert last.startswith("train: 100% 2/2 ")
    assert out == str(folder / "quiet" / "model")


def test_debug_lets_libraries_speak(folder: Path, talkative, capfd) -> None:
    argv = recipe_argv(folder / "base", folder / "pairs.jsonl", folder / "debug", training__num_steps=2)
    assert cli.main(["train", *argv, "--debug"]) == 0
    assert "Loading weights: 100%" in capfd.readouterr().err


def test_bars_of_other_libraries_are_off_and_ours_are_not() -> None:
    code = (
        "from adapt import cli; cli._quiet_libraries()\n"
        "import logging; logging.getLogger('DeepSpeed').setLevel('INFO')\n"  # as it does when it is imported
        "logging.getLogger('DeepSpeed').warning('Setting accelerator to CPU'); logging.getLogger('DeepSpeed').error('x')\n"
        "from tqdm import tqdm; list(tqdm(range(3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "x\n")


# --- ranks on CPU


@pytest.mark.parametrize("given, want", [({"LOCAL_SIZE": "2"}, 2), ({"LOCAL_SIZE": "9"}, 1), ({}, 3)])
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell which cores are ours")
def test_ranks_on_cpu_share_the_cores(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], want: int) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    try:
        torch.set_num_threads(3)
        train._share_cores()
        assert torch.get_num_threads() == want
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        train._share_cores()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
