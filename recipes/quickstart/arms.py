"""Trains an arm of the quickstart with the `deepspeed` launcher, as a user would, and reads what came of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from adapt import progress
from adapt.training.engine.launcher import OWNER
from adapt.training.engine.ports import free_port

_FOLDER = Path(__file__).resolve().parent


class Outcome(NamedTuple):
    """What a finished run's metrics.jsonl says."""

    passes: float
    """over the examples"""
    training_seconds: float
    positions_per_s: float
    """of its second half: the first step compiles, and others may have come to share the machine"""


def train(arm: str, init: Path, data: Path, folder: Path, overrides: Sequence[str]) -> Path:
    """The trained model's folder. A finished one is reused, an unfinished one goes on from its last checkpoint."""
    final = folder / "model"
    if final.exists():
        progress.say(f"{final} is there already: reused")
        return final
    import torch

    scripts = str(Path(sys.executable).parent)
    environment = {OWNER: str(os.getpid()), "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    if torch.cuda.device_count() == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(
            usable_cores()
        )  # one rank has them all
    arguments = [
        *("--num_gpus", "1", "--master_port", str(free_port())),
        *(str(_FOLDER.parent / "train.py"), "--config", str(_FOLDER / f"{arm}.yaml")),
        *("--model.base", str(init), "--data.train", str(data), "--training.output_dir", str(folder), *overrides),
        *(["--debug"] if progress.debug else []),
    ]
    progress.say(f"$ deepspeed {shlex.join(arguments)}")
    quiet = [] if progress.debug else ["--log_level", "critical"]  # of the launcher; what its ranks say stays
    with progress.starting_process("waiting for deepspeed") as inherited:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *quiet, *arguments]
        with _ended_with_us(subprocess.Popen(command, env=inherited | environment, start_new_session=True)) as launched:
            code = launched.wait()
    if code != 0 or not final.exists():  # 0 comes also of a launcher that was killed before it had started a rank
        raise ValueError(f"quickstart: training the {arm} arm failed; its reason stands above")
    return final


@contextmanager
def _ended_with_us(launched: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Inside, Ctrl-C and SIGTERM end what was launched too: its rank saves, and all of it is waited for.

    The signal goes to the rank, with which the others end. One to the launcher would be followed by a SIGKILL after 30 s, which may
    fall into a save; one to the runner would end it before its rank.
    """

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield launched
    except BaseException:
        _end(launched)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(launched: subprocess.Popen) -> None:
    with suppress(psutil.NoSuchProcess):
        launchers = psutil.Process(launched.pid).children()
        ranks = [rank for launcher in launchers for rank in launcher.children()]
        for process in ranks or [psutil.Process(launched.pid), *launchers]:
            process.terminate()
    launched.wait()


def outcome(folder: Path) -> Outcome:
    """Of the run in `folder`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last, middle = lines[-1], lines[(len(lines) - 1) // 2]
    if middle is last:
        return Outcome(last["epoch"], last["elapsed_s"], last["tokens_per_s"])
    seconds = last["elapsed_s"] - middle["elapsed_s"]
    return Outcome(last["epoch"], last["elapsed_s"], (last["tokens_seen"] - middle["tokens_seen"]) / seconds)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
