"""What libraries say when the machine has too little of something becomes one line that says what to do."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_fixtures import recipe_argv, write_base, write_pairs

from adapt import cli
from adapt.files.shortage import shortage_line
from adapt.training import trainer

LOADER = """Caught OSError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "fetch.py", line 54, in fetch
    data = [self.dataset[idx] for idx in possibly_batched_index]
OSError: [Errno 24] Too many open files: 'x'
"""
MEMORY, SHARED, GPU = "too little memory", "too little shared memory", "too little GPU memory"
FILES, PROCESSES = "too few open files are allowed", "too few processes and threads are allowed"


@pytest.mark.parametrize(
    "error, what",
    [
        (MemoryError(), MEMORY),
        (MemoryError("Unable to allocate 8.00 TiB for an array with shape (1099511627776,)"), MEMORY),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
            MEMORY,
        ),
        (RuntimeError("std::bad_alloc"), MEMORY),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), MEMORY),
        (ImportError("libx.so: failed to map segment from shared object: Cannot allocate memory"), MEMORY),
        (RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed."), MEMORY),
        (
            RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. ... may be out of shared memory."),
            SHARED,
        ),
        (RuntimeError("unable to write to file </torch_123_456_7>: No space left on device (28)"), SHARED),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), GPU),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "data.jsonl"), FILES),
        (RuntimeError("received 0 items of ancdata"), FILES),
        (OSError(LOADER), FILES),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), PROCESSES),
        (RuntimeError("can't start new thread"), PROCESSES),
    ],
)
def test_every_shortage_is_told_in_one_line_with_what_to_do(error: Exception, what: str) -> None:
    line = shortage_line(error)
    assert line is not None
    assert re.fullmatch(rf"{what} \([^\n]{{1,200}}\); [^\n]+", line)
    wrapped = ValueError("cannot be read")
    wrapped.__cause__ = error
    assert shortage_line(wrapped) == (None if what == PROCESSES else line)  # a held lock has the same number


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.ENOSPC, "No space left on device"), KeyError("memory")]
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert shortage_line(error) is None


LIMITED = """
import resource, sys
from adapt.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.exhaustive
def test_a_run_with_too_few_open_files_says_one_line(tmp_path: Path) -> None:
    argv = recipe_argv(
        write_base(tmp_path / "base"), write_pairs(tmp_path / "p.jsonl"), tmp_path / "out", data__num_workers=8
    )
    done = subprocess.run([sys.executable, "-c", LIMITED, "train", *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"adapt train: error: {FILES}" in done.stderr


def test_a_step_that_memory_does_not_suffice_for_says_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = recipe_argv(write_base(tmp_path / "base"), write_pairs(tmp_path / "p.jsonl"), tmp_path / "out")
    monkeypatch.setattr(trainer.DiffusionTrainer, "compute_loss", lambda *args, **kwargs: torch.empty(1 << 60))
    assert cli.main(["train", *argv]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"adapt train: error: {MEMORY} (")
