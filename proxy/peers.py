"""Who is at the other end of a Unix socket: in an abstract name anybody of the network namespace may listen."""

from __future__ import annotations

import os
import socket
import struct

_UCRED = struct.Struct("=iII")


def peer(connection: socket.socket) -> tuple[int, int]:
    """The process at the other end, 0 if it is of another process namespace, and its user; raises OSError."""
    pid, user, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, user


def is_ours(user: int) -> bool:
    """Whether a user is this process's own, or root."""
    return user in (0, os.geteuid())
