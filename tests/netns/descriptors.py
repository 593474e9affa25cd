"""What another process has open: its descriptors by name, and its sockets themselves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_PIDFD_GETFD = 438


def targets(pid: int) -> dict[int, str]:
    """What a process has open, by descriptor, as /proc calls it."""
    found = {}
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found[int(each.name)] = str(each.readlink())
    return found


def sockets(pid: int) -> Iterator[socket.socket]:
    """The process's own sockets, one after the other: what is done to one is done to the process's."""
    library = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        for number, target in targets(pid).items():
            if target.startswith("socket:"):
                descriptor = library.syscall(_PIDFD_GETFD, pidfd, number, 0)
                assert descriptor >= 0, os.strerror(ctypes.get_errno())
                with socket.socket(fileno=descriptor) as each:
                    yield each
    finally:
        os.close(pidfd)
