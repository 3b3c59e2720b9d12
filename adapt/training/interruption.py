"""When a run saves, and what ends it from outside: SIGTERM, Ctrl-C, a full disk, another rank's death."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from ..files.outputs import KeptElsewhere
from ..files.staging import is_full_disk
from .checkpoints.run_folder import whole_checkpoints
from .engine.nvme import has_optimizer_on_nvme


class Interrupted(Exception):
    """A signal came, and a checkpoint or the final model was saved; exit code 128 + it: 143 after SIGTERM, 130 after Ctrl-C."""

    def __init__(self, signum: int, step: int, is_saved: bool = True, final: Path | None = None) -> None:
        why = "" if signum == signal.SIGINT else f"{signal.Signals(signum).name}: "
        done = f"came after the last step; {final} is whole"
        saved = f"saved step {step}; the same command goes on"
        lost = f"ended at step {step}; nothing is saved, as DeepSpeed cannot go on with an optimizer on NVMe"
        super().__init__(f"{why}{done if final is not None else saved if is_saved else lost}")
        self.exit_code = 128 + signum


class Requests(TrainerCallback):
    """What all ranks do after the same step: save, where the clock of rank 0 says so; save and stop, after a signal to any of them.

    The ranks learn of it by the sum that a step begins with anyway, so it costs no further synchronisation.
    """

    def __init__(self, args: TrainingArguments, save_minutes: float | None) -> None:
        self.device, self.world_size = args.device, args.world_size
        self.can_save = not has_optimizer_on_nvme(args)
        self.seconds = 60 * save_minutes if save_minutes and self.can_save and args.should_save else math.inf
        self.signum: int | None = None
        """the first signal that came to this rank"""
        self.stopped = False
        self._saved_at = 0.0
        self._shared: Tensor | None = None
        self._copied: Any = None

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Inside, a signal is noted; a second Ctrl-C ends at once. Torch's launchers and Slurm send SIGTERM more than once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum == signal.SIGINT and self.signum is None and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nadapt train: ends after this step; Ctrl-C again ends at once\n")  # print is not reentrant
        self.signum = self.signum or signum

    def of_this_rank(self) -> Tensor:
        """[2] for the sum over ranks that a step begins with: 1 if this rank asks to stop, and 1 if it asks to save."""
        is_due = time.monotonic() - self._saved_at > self.seconds
        stop = torch.full(
            (1,), int(self.signum is not None), device=self.device
        )  # filled there: a copy would be waited for
        return torch.cat([stop, torch.full((1,), int(is_due), device=self.device)])

    def share(self, requests: Tensor) -> None:
        """What came of that sum, [2]; copied to the host behind the device's back, and read at the end of the step."""
        self._shared = requests.to("cpu", non_blocking=True)
        if self.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._saved_at = time.monotonic()

    def on_save(self, args, state, control, **kwargs) -> None:
        self._saved_at = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        assert self._shared is not None
        if self._copied is not None:
            self._copied.synchronize()  # recorded before the step's forward pass: the device is long past it
        stop, save = self._shared.tolist()
        if self.signum is not None if self.world_size == 1 else stop:
            self.stopped = control.should_training_stop = control.should_log = True
        if (self.stopped or save) and self.can_save:
            control.should_save = True

    def raise_if_stopped(self, step: int) -> None:
        if self.stopped:
            raise Interrupted(self.signum or signal.SIGTERM, step, self.can_save)

    def raise_if_asked_too_late(self, step: int, final: Path) -> None:
        """On rank 0, once the final model is written: another rank's exit code would let the launcher kill rank 0 meanwhile."""
        if self.signum is not None and os.environ.get("RANK", "0") == "0":
            raise Interrupted(self.signum, step, final=final)


def start_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """A loader process outlives a signal to the whole group: the step in progress needs its rows."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    if init is not None:
        init(worker)


@contextmanager
def failures_name_the_checkpoint(output_dir: Path) -> Iterator[None]:
    """A write that fails, or the loss of another rank, becomes one line that says where a restart goes on."""
    try:
        yield
    except KeptElsewhere:
        raise
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
