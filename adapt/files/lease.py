"""Keeps a file that is read, or mapped, from changing under the reader: the kernel makes who wants to write to it wait.

A file that is cut short while it is mapped ends the process (SIGBUS), which Python cannot catch. A read lease (Linux, fcntl(2)) makes
an open for writing, or a truncation, wait until the lease is given back, 45 s at most; until then its holder can see that it waits.
"""

from __future__ import annotations

import fcntl
import os
import signal
from typing import IO

_SETSIG = 10  # F_SETSIG of Linux, which Python's fcntl does not name


def take_lease(file: IO[bytes]) -> bool:
    """Whether writers wait from now on: not if one has the file open already, nor on network filesystems and other systems."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(file, _SETSIG, signal.SIGURG)  # what the kernel would send by default ends the process
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


def writer_waits(file: IO[bytes]) -> bool:
    """Whether somebody wants to write to a file on which we have a lease."""
    return fcntl.fcntl(file, fcntl.F_GETLEASE) != fcntl.F_RDLCK


def give_lease_back(file: IO[bytes]) -> None:
    """Lets writers go on."""
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def size_of(file: IO[bytes]) -> int:
    """Bytes, now."""
    return os.fstat(file.fileno()).st_size
