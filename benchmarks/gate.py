"""The callback that times an arm's steps: each waits until the parent asks for it.

All that stands in the loop is this callback of transformers' own. A step is timed from the word to the next `on_step_end`:
fetching and collating the batch, forward, backward, clipping, optimizer, schedule, zeroing, and the logging of the step before.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import regions
import torch
from transformers import TrainerCallback


class Stop(Exception):
    """Ends a run that has no more steps to do."""


class Gate(TrainerCallback):
    """Lets one step through for each message of the parent, and answers with its figures."""

    def __init__(self, parent: Connection) -> None:
        self.parent, self.profiler = parent, None
        self.seen: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        self.rows, self.batch = train_dataloader.dataset, args.per_device_train_batch_size
        self.model = model
        model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        model.get_input_embeddings().register_forward_pre_hook(self._note_positions)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.parent.send({"ready": True})
        self._wait()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        _synchronize()
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        profile = None
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            profile, self.profiler = regions.shares(self.profiler, seconds), None
        clean, useful = self._tokens(state.global_step - 1)
        self.parent.send(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "clean_tokens": clean,
                "useful_tokens": useful,
                "positions": self.seen["positions"],
                "head_rows": self.seen["head_rows"],
                "peak_memory_bytes": peak_memory_bytes(),
                "load": os.getloadavg()[0],
                "profile": profile,
            }
        )
        self._wait()

    def _wait(self) -> None:
        word = self.parent.recv()
        if word == "stop":
            raise Stop
        self.seen = {"positions": 0, "head_rows": 0}
        if word == "profile":
            self.profiler = regions.profiler(self.model)
            self.profiler.__enter__()
        _synchronize()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def _note_inputs(self, model, args, kwargs) -> None:
        self.seen["attention_mask"] = kwargs.get("attention_mask")
        terms = kwargs.get("terms")
        self.seen["head_rows"] += kwargs["input_ids"].numel() if terms is None else sum(len(t.rows) for t in terms)

    def _note_positions(self, embedding, args) -> None:
        self.seen["positions"] += args[0].numel()

    def _tokens(self, step: int) -> tuple[int, int]:
        """(tokens of the step's documents, each counted once; non-padding positions, noisy copies included)."""
        if not hasattr(self.rows, "packing"):
            real = int(self.seen["attention_mask"].sum())
            return real, real
        from adapt.training.data.examples import lengths

        packing, examples = self.rows.packing, self.rows.examples
        documents = lengths(examples, "context") + lengths(examples, "target")
        places = [place for k in range(step * self.batch, (step + 1) * self.batch) for place in packing.row(k)]
        which = np.array([place.example for place in places])
        useful = sum(int(packing.sizes(place.epoch)[place.example]) for place in places)
        return int(documents[which].sum()), useful


def peak_memory_bytes() -> int:
    """The most that this process ever held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which starts at what the parent held when it launched this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
