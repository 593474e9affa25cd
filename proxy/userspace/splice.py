"""Moving bytes between sockets inside the kernel.

Theory of operation
-------------------
`splice` moves pages from a socket into a pipe and from the pipe into another socket; the bytes never come up to the
process.  A pipe is borrowed only while bytes are in it: it goes back when a direction has run dry, so that pipes are as
many as directions that are stuck or being served, not as many as connections.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import NamedTuple

PIPE_BYTES = 1 << 20
"""How much a pipe holds, if the kernel grants it."""
SPLICE_BYTES = 1 << 20
FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

_KEPT = 64
"""Empty pipes that are kept."""


class Pipe(NamedTuple):
    """Its two descriptors."""

    reading: int
    writing: int


class Pipes:
    """Empty pipes, ready to be borrowed."""

    def __init__(self, last: int) -> None:
        """Descriptors from `last` on are for others."""
        self._last = last
        self._idle: list[Pipe] = []

    def borrow(self) -> Pipe | None:
        """An empty pipe; None: no descriptor is left for one."""
        if self._idle:
            return self._idle.pop()
        try:
            pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None
        if max(pipe) >= self._last:
            _close(pipe)
            return None
        with contextlib.suppress(OSError):  # above what a user may have: the kernel's default serves too
            fcntl.fcntl(pipe.writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return pipe

    def give_back(self, pipe: Pipe, *, empty: bool) -> None:
        """Return a pipe; one that is not empty is of no more use."""
        if empty and len(self._idle) < _KEPT:
            self._idle.append(pipe)
            return
        _close(pipe)

    def close(self) -> None:
        while self._idle:
            _close(self._idle.pop())


def _close(pipe: Pipe) -> None:
    os.close(pipe.reading)
    os.close(pipe.writing)
