"""The order of a run: which examples stand in packed row k, a pure function of (seed, k).

So a run is one long list of rows. Resuming at row k, splitting the global batch over ranks or accumulation steps, and loading
with any number of workers all read the same list.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BUFFER = 2048  # examples packed at a time: enough to fill rows to 99 %, few enough to keep the order shuffled


class Place(NamedTuple):
    """Where an example stands: its index in the data, its epoch, and its ordinal in the order of the run."""

    example: int
    epoch: int
    ordinal: int


class Packing:
    """Rows of at most `seq_len` tokens, filled with whole examples best-fit first, epoch after epoch.

    sizes: epoch -> tokens of each example in a row, [E], none of them over seq_len.
    """

    def __init__(self, sizes: Callable[[int], np.ndarray], seq_len: int, seed: int) -> None:
        self.sizes, self.seq_len, self.seed = sizes, seq_len, seed
        self.num_examples = len(sizes(0))
        self._rows: list[list[Place]] = []
        self._num_epochs = 0

    def row(self, k: int) -> list[Place]:
        """The places of row k."""
        while k >= len(self._rows):
            self._append_epoch()
        return self._rows[k]

    def num_rows(self, num_epochs: float) -> int:
        """Rows in that many passes over the data."""
        while self._num_epochs < num_epochs:
            self._append_epoch()
        rows = np.bincount([row[0].epoch for row in self._rows])
        whole = int(num_epochs)
        return int(rows[:whole].sum() + (num_epochs - whole) * rows[whole : whole + 1].sum())

    def _append_epoch(self) -> None:
        epoch, num_examples = self._num_epochs, self.num_examples
        sizes = self.sizes(epoch)
        assert sizes.max(initial=0) <= self.seq_len, "an example is larger than a row"
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(num_examples)
        # Counted in the order of the rows, so that a batch holds consecutive ordinals, whose times are stratified.
        ordinals = itertools.count(epoch * num_examples)
        for start in range(0, num_examples, BUFFER):
            buffer = order[start : start + BUFFER]
            for row in _best_fit(buffer, sizes[buffer], self.seq_len):
                self._rows.append([Place(example, epoch, next(ordinals)) for example in row])
        self._num_epochs += 1


def _best_fit(examples: np.ndarray, sizes: np.ndarray, seq_len: int) -> list[list[int]]:
    """Rows of example indices: each example, largest first, into the fullest row that still has room for it.

    The rows come back in the order of their first-drawn example, so that a packed epoch is as shuffled as its order.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in np.argsort(-sizes, kind="stable"):
        size = int(sizes[i])
        at = bisect.bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(int(i))
        bisect.insort(rooms, (room - size, row))
    rows.sort(key=min)
    return [[int(examples[i]) for i in sorted(row)] for row in rows]
