"""Under the `deepspeed` launcher: whichever process of a run ends, by whatever signal, the others end too.

    end_with_the_launcher()        the first thing that a script of ours does on a rank

DeepSpeed 0.19.8 starts rank <- launcher (deepspeed.launcher.launch) <- runner (`deepspeed`) and ends the ranks only when the
launcher itself can: a runner that is signalled, or a launcher that is killed, leaves ranks that train to the end, and a runner
whose launcher was killed exits with 0. So each rank watches those above it from a thread. When one is gone the rank sends itself
a SIGTERM, on which it saves and ends as always, and ends the runner before that can report success.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

import psutil

from .shared_buffers import remove_own

OWNER = "ADAPT_LAUNCHED_BY"
"""The environment's name for the process id of who started `deepspeed`, where the run is to end with it: the quickstart's."""

_LOOK = 0.1  # seconds between two looks at processes, where the system has no file descriptors for them


class Above(NamedTuple):
    """Who started this rank."""

    launcher: psutil.Process
    runner: psutil.Process | None
    """None on the nodes that are reached over ssh: pdsh ends what it started"""
    owner: psutil.Process | None
    is_cut_off: bool
    """one of them had ended before this rank could look"""


def end_with_the_launcher() -> None:
    """From here on this process ends with its launcher, its runner and its owner; nothing happens without the launcher.

    A SIGTERM that comes before the training loop heeds it, or after, ends the process at once, with exit code 143.
    """
    above = who_started_us()
    if above is None:
        return
    signal.signal(signal.SIGTERM, _heard_by_the_thread)
    heard, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_at_a_signal, args=(heard, wakes), name="signals", daemon=True).start()
    threading.Thread(target=_end_with, args=(above,), name="launcher", daemon=True).start()


def who_started_us() -> Above | None:
    """The processes above this one; None if the nearest is no launcher of DeepSpeed."""
    parents = psutil.Process().parents()
    words = _words(parents[0]) if parents else []
    if "deepspeed.launcher.launch" not in words:
        return None
    launcher, above = parents[0], parents[1:]
    runner = above[0] if above and not _is_reaper(above[0], launcher) else None
    is_local = "--master_addr=127.0.0.1" in words  # without a hostfile; else ssh or Slurm may stand above the launcher
    if not is_local and (runner is None or not _is_runner(runner)):
        runner = None
    asked = os.environ.get(OWNER)
    owner = next((process for process in above if str(process.pid) == asked), None)
    is_cut_off = (is_local and runner is None) or (asked is not None and owner is None)
    return Above(launcher, runner, owner, is_cut_off)


def _is_runner(process: psutil.Process) -> bool:
    words = _words(process)
    return "deepspeed.launcher.runner" in words or any(os.path.basename(word) == "deepspeed" for word in words[:2])


def _is_reaper(process: psutil.Process, launcher: psutil.Process) -> bool:
    """Whether a launcher's parent is not who started it, but who takes in orphans: init, a systemd of the user, a container's."""
    try:
        if os.getsid(process.pid) != os.getsid(launcher.pid):
            return True
    except PermissionError:  # of another session, on systems that tell of one's own only
        return True
    except ProcessLookupError:
        return True
    return process.pid == 1 and "python" not in "".join(_words(process)[:1])  # the runner may be a container's first


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _end_with(above: Above) -> None:
    """Waits for one of those above to end, which in a run that ends by itself they do after this process."""
    if not above.is_cut_off:
        _wait_for_any([process for process in above[:3] if process is not None])
    if above.runner is not None and not _is_alive(above.launcher):
        with suppress(psutil.Error):
            above.runner.terminate()  # while it unloads its libraries, for half a second; then it would have exited with 0
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_any(processes: list[psutil.Process]) -> None:
    """Returns when one of them has ended."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # an older Linux
            descriptors = [os.pidfd_open(process.pid) for process in processes if _is_alive(process)]
            if len(descriptors) == len(processes):
                select.select(descriptors, [], [])
            return
    while all(_is_alive(process) for process in processes):
        time.sleep(_LOOK)


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _heard_by_the_thread(signum: int, frame: Any) -> None:
    """Python tells a file descriptor of the signals that have a handler; this one could not run while C++ waits for another rank."""


def _end_at_a_signal(heard: socket.socket, wakes: socket.socket) -> None:
    while True:
        signum = heard.recv(1)[0]
        if signum == signal.SIGTERM and signal.getsignal(signum) is _heard_by_the_thread:
            remove_own()
            os._exit(128 + signum)
