"""Writing beside other work, without filling the page cache.

Pages that are free again are used for what is written next. Without that the copy of a large model pushes everything else out of
memory, and finding room for it can take longer than the copying.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_IN_FLIGHT = 2  # pieces that wait for the disk


class Written(NamedTuple):
    """A piece of a file: where it begins, and its bytes."""

    path: Path
    start: int
    size: int


@contextmanager
def beside(pieces: Iterator[Written]) -> Iterator[Future[None]]:
    """Inside, another thread takes the pieces, and a third brings them to disk and out of the page cache.

    What is yielded is done when both are, and raises what went wrong there. Left before that, the work ends after the piece at
    hand.
    """
    stopped = threading.Event()

    def work() -> None:
        flushing: deque[Future[None]] = deque()
        for piece in pieces:
            if stopped.is_set():
                return
            flushing.append(flusher.submit(_flush, piece))
            if len(flushing) > _IN_FLIGHT:
                flushing.popleft().result()
        for future in flushing:
            future.result()

    with ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(1) as writer:
        try:
            yield writer.submit(work)
        finally:
            stopped.set()


def _flush(piece: Written) -> None:
    with piece.path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a hint
                os.posix_fadvise(file.fileno(), piece.start, piece.size, os.POSIX_FADV_DONTNEED)
