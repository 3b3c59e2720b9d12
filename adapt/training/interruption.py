"""What ends a run from outside: SIGTERM, a full disk, another rank's death."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..files.staging import is_full_disk
from .checkpoints.resume import whole_checkpoints


class Terminated(Exception):
    """SIGTERM came and a checkpoint was saved; the command exits with 143."""


def start_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """A loader process outlives a SIGTERM to the whole group: the step in progress needs its rows."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker)


@contextmanager
def failures_name_the_checkpoint(output_dir: Path) -> Iterator[None]:
    """A write that fails, or the loss of another rank, becomes one line that says where a restart goes on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if _is_failed_write(error, text):
            what = f"training.output_dir={output_dir}: cannot be written, the disk or a quota is full ({text[:200]}); make room"
        elif _is_lost_rank(error, text):
            what = f"another rank has died, look for what it said ({text[:200]}); mend that"
        else:
            raise
        whole = [path.name for path in whole_checkpoints(output_dir)]
        where = f"go on from {whole[-1]}, which is whole" if whole else "begin again: there is no checkpoint yet"
        raise OSError(f"{what}, and start the same command again to {where}") from error


def _is_failed_write(error: Exception, text: str) -> bool:
    if is_full_disk(error):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.EROFS, errno.EIO)
    # torch tells of it in words only.
    return "PytorchStreamWriter" in text or "inline_container" in text or "unexpected pos" in text


def _is_lost_rank(error: Exception, text: str) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in text
    )
