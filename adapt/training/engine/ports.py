"""The TCP port on which rank 0 listens and the others find it."""

from __future__ import annotations

import errno
import os
import socket

_free_here: set[str] = set()
"""ports that were free when this process looked: a second run in it finds its own listener there"""


def free_port() -> int:
    """One on which nobody listens on this machine now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    _free_here.add(str(port))
    return port


def check_master_port() -> None:
    """On rank 0, before the ranks meet: ValueError if another process listens on $MASTER_PORT, which torch tells in a traceback."""
    port = os.environ.get("MASTER_PORT", "")
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # which listens there itself
    if os.environ.get("RANK") != "0" or is_torchruns or port in _free_here:
        return
    if not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ValueError(f"MASTER_PORT={port}: must be a port, 1 to 65535")
    try:
        with socket.socket() as listener:
            # As torch does, or the connections of a run that has just ended would look like a listener.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", int(port)))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "another process, perhaps another run, has it" if error.errno == errno.EADDRINUSE else "it takes root"
        raise ValueError(
            f"MASTER_PORT={port}: {why}; choose another: deepspeed --master_port {free_port()} ..., or export MASTER_PORT"
        ) from None
    _free_here.add(port)
