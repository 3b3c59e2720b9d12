"""The TCP port on which rank 0 listens and the others find it."""

from __future__ import annotations

import errno
import os
import socket

import torch.distributed as dist


def free_port() -> int:
    """One on which nobody listens on this machine now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def check_master_port() -> None:
    """On rank 0, before the ranks meet: ValueError if another process listens on $MASTER_PORT, which torch tells in a traceback."""
    if (
        os.environ.get("RANK") != "0"
        or dist.is_initialized()
        or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        return  # the others only connect; this process, or torchrun, listens there itself
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"MASTER_PORT={port}: must be a port, 1 to 65535")
    try:
        with socket.socket(socket.AF_INET) as listener:
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
