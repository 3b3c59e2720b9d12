"""One process of a launched run ends, by whatever signal: all end, the run is saved, nothing reports success, no memory is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from training_fixtures import recipe_argv, two_ranks, write_base, write_pairs

from adapt.training.engine import launcher, ports

SECONDS = 60  # generous: a busy machine must not fail what the claim is not about


def wait_until(holds: Callable[[], object], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- real launches


def part(name: str, runner: psutil.Process) -> psutil.Process | None:
    """That process of a launch, if it is there yet."""
    if name == "runner":
        return runner
    launchers = runner.children()
    ranks = [rank for started in launchers for rank in started.children()]
    found = launchers if name == "launcher" else ranks[1:]
    return found[0] if found else None


@pytest.fixture
def launched(tmp_path: Path, free_port: int):
    """launched(): two ranks that would train for an hour, and their folder."""
    write_base(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl")
    settings = {"training__num_steps": 100_000, "training__micro_batch_size": 4, "training__deepspeed": "zero0"}
    started: list[psutil.Process] = []

    def launch() -> tuple[subprocess.Popen[str], Path]:
        argv = recipe_argv(
            tmp_path / "base", tmp_path / "pairs.jsonl", tmp_path / "out", **settings, data__num_workers=1
        )
        process = two_ranks(argv, free_port)
        started.append(psutil.Process(process.pid))
        return process, tmp_path / "out"

    yield launch
    for runner in started:
        for process in [*(runner.children(recursive=True) if is_alive(runner) else []), runner]:
            if is_alive(process):
                process.kill()


def ends_with(target: str, signum: signal.Signals, process: subprocess.Popen[str], folder: Path, port: int) -> str:
    """What the launch said, once the signal to that part has ended all of it; AssertionError if it did not, or with 0."""
    runner = psutil.Process(process.pid)
    victim = part(target, runner)
    assert victim is not None
    everyone = [runner, *runner.children(recursive=True)]
    victim.send_signal(signum)
    wait_until(lambda: not any(map(is_alive, everyone)), f"{target} {signum.name}: all have ended", SECONDS)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0, said
    left = list(Path("/dev/shm").glob(f"*deepspeed_allreduce_buffer_*_{port}_*"))
    assert len(left) <= (2 if signum == signal.SIGKILL and target == "rank" else 0), left  # the buffer and its lock
    return said


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
REPRESENTATIVE = ("launcher", signal.SIGKILL)  # the only one that DeepSpeed calls a success


@pytest.mark.distributed
@pytest.mark.parametrize(
    "target, signum",
    [
        pytest.param(target, signum, marks=() if (target, signum) == REPRESENTATIVE else pytest.mark.exhaustive)
        for target in ("runner", "launcher", "rank")
        for signum in SIGNALS
    ],
)
def test_a_signal_to_any_process_of_a_launch_ends_all_and_is_no_success(
    launched, free_port: int, target, signum
) -> None:
    process, folder = launched()
    metrics = folder / "metrics.jsonl"
    wait_until(
        lambda: (metrics.exists() and metrics.read_text().count("\n") >= 2) or process.poll() is not None, "two steps"
    )
    said = ends_with(target, signum, process, folder, free_port)
    if target != "rank" or signum != signal.SIGKILL:
        assert "; the same command goes on" in said
        assert list(folder.glob("checkpoints/checkpoint-*/COMPLETE"))
    else:
        assert "another rank has died" in said


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "target, seconds", [("launcher", 1.0), ("launcher", 4.0), ("rank", 0.5), ("rank", 4.0), ("runner", 2.0)]
)
def test_a_signal_while_a_launch_starts_ends_all_of_it_too(launched, free_port: int, target, seconds, signum) -> None:
    process, folder = launched()
    runner = psutil.Process(process.pid)
    wait_until(lambda: part("rank", runner), "ranks were started")
    time.sleep(seconds)
    ends_with(target, signum, process, folder, free_port)
    assert not (folder / "model").exists()


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_to_the_quickstart_ends_what_it_launched(tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "-m", "adapt.cli", "quickstart", "--fast", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    quickstart = psutil.Process(process.pid)
    metrics = tmp_path / "out" / "control" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() or process.poll() is not None, "a rank trains")
    launched = quickstart.children(recursive=True)
    assert len(launched) >= 3
    quickstart.send_signal(signum)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode in (-signum, 128 + signum), said
    if signum != signal.SIGKILL:  # it has waited for them, so that the same command can be typed at once
        assert not any(map(is_alive, launched))
        assert "; the same command goes on" in said
    wait_until(lambda: not any(map(is_alive, launched)), "all that it launched has ended", SECONDS)
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "control" / "model").exists()


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_a_taken_port_under_the_launcher_is_one_line(tmp_path: Path) -> None:
    argv = recipe_argv(write_base(tmp_path / "base"), write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out")
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = two_ranks(
            [*argv, "--training.micro_batch_size", "4", "--training.deepspeed", "zero0"], other.getsockname()[1]
        )
        said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert said.count("another process, perhaps another run, has it; choose another: deepspeed --master_port ") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


# --- who is above a rank


def stand_in(tmp_path: Path) -> Path:
    """A script that starts a launcher of that name, which starts a rank, which says its process id; no torch, no DeepSpeed."""
    path = tmp_path / "stand_in.py"
    path.write_text(
        """
import os, signal, subprocess, sys, time
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and hand that on
*above, said = sys.argv[1:]
if above and above[0] == "runner":
    command = ["deepspeed.launcher.launch", "--master_addr=127.0.0.1", said]
elif above:
    command = [said]
else:
    from adapt.training.engine.launcher import end_with_the_launcher

    end_with_the_launcher()
    Path(said).write_text(str(os.getpid()))
    time.sleep(600)
started = subprocess.Popen([sys.executable, __file__, *command])
started.wait()
if len(above) and above[0] == "runner":
    time.sleep(30)  # as a runner unloads its libraries, which takes half a second
sys.exit(max(0, started.returncode))
"""
    )
    return path


@pytest.fixture
def stood_in(tmp_path: Path):
    """(runner, launcher, rank) of three processes that only wait."""
    said = tmp_path / "pid"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(launcher.__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    }
    script = stand_in(tmp_path)
    process = subprocess.Popen([sys.executable, str(script), "runner", str(said)], env=env, start_new_session=True)
    wait_until(lambda: said.exists() and said.read_text(), "the rank has started")
    rank = psutil.Process(int(said.read_text()))
    above = rank.parent()
    assert above is not None
    yield process, above, rank
    for left in (psutil.Process(process.pid) if process.poll() is None else None, above, rank):
        if left is not None and is_alive(left):
            left.kill()
    process.wait()


def test_a_killed_launcher_takes_rank_and_runner_along_and_the_runner_does_not_exit_with_0(stood_in) -> None:
    runner, above, rank = stood_in
    above.kill()
    assert runner.wait(SECONDS) == -signal.SIGTERM
    wait_until(lambda: not is_alive(rank), "the rank has ended")


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_runner_that_a_signal_ends_takes_launcher_and_rank_along(stood_in, signum: signal.Signals) -> None:
    runner, above, rank = stood_in
    runner.send_signal(signum)
    assert runner.wait(SECONDS) != 0
    wait_until(lambda: not is_alive(rank) and not is_alive(above), "the rank and its launcher have ended")


def test_without_deepspeeds_launcher_nothing_is_watched() -> None:
    before = signal.getsignal(signal.SIGTERM)
    launcher.end_with_the_launcher()
    assert launcher.who_started_us() is None
    assert signal.getsignal(signal.SIGTERM) is before


class Fake:
    """A process by its pid and command line."""

    def __init__(self, pid: int, *words: str) -> None:
        self.pid, self.words = pid, list(words)

    def cmdline(self) -> list[str]:
        return self.words


LOCAL = Fake(30, "python", "-u", "-m", "deepspeed.launcher.launch", "--master_addr=127.0.0.1", "recipes/train.py")
REMOTE = Fake(31, "python", "-u", "-m", "deepspeed.launcher.launch", "--master_addr=10.0.0.1", "recipes/train.py")
RUNNER = Fake(20, "/venv/bin/python", "/venv/bin/deepspeed", "recipes/train.py")
MODULE = Fake(21, "python", "-m", "deepspeed.launcher.runner", "recipes/train.py")
SHELL, SSHD, INIT, OWN = (
    Fake(10, "bash"),
    Fake(9, "sshd: me"),
    Fake(1, "/sbin/init"),
    Fake(12, "python", "my_launch.py"),
)
SESSIONS = {1: 1, 9: 9, 5: 5}  # all others share one
REAPER = Fake(5, "systemd", "--user")


@pytest.mark.parametrize(
    "parents, runner, is_cut_off",
    [
        ([LOCAL, RUNNER, SHELL], RUNNER, False),
        ([LOCAL, MODULE, INIT], MODULE, False),
        ([LOCAL, OWN, SHELL], OWN, False),  # somebody's script that calls DeepSpeed's main
        ([LOCAL, Fake(1, "/usr/bin/python", "/usr/bin/deepspeed")], Fake(1), False),  # a container's first process
        ([LOCAL, INIT], None, True),
        ([LOCAL, REAPER, INIT], None, True),
        ([REMOTE, SHELL, SSHD, INIT], None, False),  # pdsh
        ([REMOTE, RUNNER, SHELL], RUNNER, False),  # deepspeed --no_ssh on each node
    ],
)
def test_the_runner_is_told_from_a_shell_and_from_who_takes_in_orphans(
    parents, runner, is_cut_off, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.psutil.Process, "parents", lambda self: parents)
    first = parents[1].pid
    monkeypatch.setattr(
        launcher.os, "getsid", lambda pid: 7 if parents[1].words[0].endswith("python") else SESSIONS.get(pid, 7)
    )
    above = launcher.who_started_us()
    assert above is not None
    assert (above.runner and above.runner.pid) == (runner and first)
    assert above.is_cut_off == is_cut_off


@pytest.mark.parametrize("asked, is_cut_off", [("10", False), ("999999", True)])
def test_a_run_whose_owner_has_gone_before_it_could_look_ends(
    asked, is_cut_off, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.psutil.Process, "parents", lambda self: [LOCAL, RUNNER, SHELL])
    monkeypatch.setattr(launcher.os, "getsid", lambda pid: 7)
    monkeypatch.setenv(launcher.OWNER, asked)
    above = launcher.who_started_us()
    assert above is not None
    assert above.is_cut_off == is_cut_off


@pytest.mark.parametrize("has_descriptors", [True, False])
def test_the_wait_ends_with_any_of_them(has_descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_descriptors:
        monkeypatch.delattr(launcher.os, "pidfd_open", raising=False)
    commands = [["sleep", "600"], ["sleep", "0.2"]]
    started = [subprocess.Popen(command) for command in commands]
    launcher._wait_for_any([psutil.Process(process.pid) for process in started])
    assert started[0].poll() is None
    started[0].kill()
    for process in started:
        process.wait()


# --- ports and shared memory


def test_a_taken_port_is_told_in_one_line_by_rank_zero_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "1")
        ports.check_master_port()
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(
            ValueError, match=f"MASTER_PORT={port}: another process, perhaps another run, has it; choose another: "
        ):
            ports.check_master_port()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        ports.check_master_port()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    ports.check_master_port()


@pytest.mark.parametrize("port", ["", "0", "65536", "many", "-1", "29500;id"])
def test_a_port_that_is_none_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=f"MASTER_PORT={port}: must be a port, 1 to 65535"):
        ports.check_master_port()
