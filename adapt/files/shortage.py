"""Errors that mean that the machine has too little of something: memory, shared memory, open files, processes.

Libraries raise them as they like, many as a RuntimeError whose words are all that tells. `shortage_line` says in one line what is
short and what to do; torch is not imported for it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple


class Shortage(NamedTuple):
    """One kind."""

    what: str
    do: str
    words: tuple[str, ...]
    """of messages that mean it"""
    errnos: tuple[int, ...] = ()
    as_cause: bool = True
    """also where it is what the error came of; a lock that is held has the number of too few processes, and its own words"""


# In this order: words of the first are rarer than those of the last.
_SHORTAGES = (
    Shortage(
        "too little shared memory",
        "make room in /dev/shm (`adapt doctor` says whose memory it is), start the container with --shm-size=16g, or set "
        "data.num_workers=0",
        (
            "out of shared memory",
            "unable to write to file </torch_",
            "unable to allocate shared memory",
            "unable to resize file <filename not specified>",
            "shm_open",
        ),
    ),
    Shortage(
        "too little GPU memory",
        "take a smaller batch (training.micro_batch_size, --batch_size) or shorter rows (data.seq_len), or end what else runs on "
        "that GPU; `adapt plan` says what fits",
        ("CUDA out of memory", "HIP out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"),
    ),
    Shortage(
        "too few open files are allowed",
        "raise the limit in this shell (ulimit -n 65536), or set data.num_workers=0",
        ("Too many open files", "received 0 items of ancdata"),
        (errno.EMFILE, errno.ENFILE),
    ),
    Shortage(
        "too few processes and threads are allowed",
        "raise the limit in this shell (ulimit -u), end other processes, or set data.num_workers=0 and OMP_NUM_THREADS=1",
        ("can't start new thread", "pthread_create failed", "Resource temporarily unavailable", "thread constructor failed"),
        (errno.EAGAIN,),
        as_cause=False,
    ),
    Shortage(
        "too little memory",
        "take a smaller batch (training.micro_batch_size, --batch_size), shorter rows (data.seq_len) or a smaller model, end what "
        "else runs here, or raise the limit (ulimit -v, the container's)",
        (
            "DefaultCPUAllocator",
            "not enough memory",
            "Cannot allocate memory",
            "can't allocate memory",
            "bad_alloc",
            "Unable to allocate",  # numpy
            "DataLoader worker (pid",  # ... is killed by signal: Killed
        ),
        (errno.ENOMEM,),
    ),
)  # fmt: skip


def shortage_line(error: BaseException) -> str | None:
    """What is short, in whose words, and what to do; None if the error, and what it came of, mean something else."""
    for cause in _with_causes(error):
        text = str(cause)
        for shortage in _SHORTAGES if cause is error else [kind for kind in _SHORTAGES if kind.as_cause]:
            is_memory_error = isinstance(cause, MemoryError) and errno.ENOMEM in shortage.errnos
            is_named = isinstance(cause, OSError) and cause.errno in shortage.errnos
            if is_memory_error or is_named or any(words in text for words in shortage.words):
                return f"{shortage.what} ({_gist(cause, shortage)}); {shortage.do}"
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, or during; MemoryError says nothing of itself, so types count."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _gist(error: BaseException, shortage: Shortage) -> str:
    """The line of the message that tells; of an error in a loader process the message is a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if any(words in line for words in shortage.words)]
    return (telling or lines)[-1][:200]
