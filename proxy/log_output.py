"""Where finished lines of the log go: a terminal, a file, a pipe, a socket of the journal.

Whoever reads them may have stopped to, and a write that waits for him would hold up the event loop: no change would be
applied, no probe answered.  So a line is written as far as there is room for it.  When there is none for `PATIENCE`, it
is lost, and those after it are without a wait, until there is room again: then one line says how many they were.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import TextIO

PATIENCE = 0.1
"""Seconds to wait for room, once for all lines until there is some: a reader may be behind for a moment."""

_PIECE = select.PIPE_BUF
"""Bytes for which there is room where there is any, in a pipe (its page) as in a socket (a quarter of its buffer)."""


class Output:
    """A stream, written to line by line; from any thread."""

    def __init__(self, stream: TextIO, lost: Callable[[int], None]) -> None:
        """Of a stream; `lost` is told how many lines could not be written, when there is room again."""
        self._stream = stream
        self._tell_lost = lost
        self._lost = 0
        self._cut = False
        """Whether the last line lacks its end."""
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._room = select.poll()
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not one of the system's
            self._descriptor = stream.fileno()
            self._room.register(self._descriptor, select.POLLOUT)

    def write(self, line: str) -> None:
        """Write a line, if somebody takes it; never an error."""
        lost = 0
        # A log that cannot be written (a full disk, a reader that left) is no reason to stop what it reports on.
        with contextlib.suppress(OSError, ValueError):
            if self._descriptor is None:
                self._stream.write(f"{line}\n")
                self._stream.flush()
                return
            with self._lock:
                if self._stream.closed:  # its descriptor may be another file's by now
                    return
                data = f"{line}\n".encode(errors="backslashreplace")
                if self._put(self._descriptor, b"\n" + data if self._cut else data):
                    lost, self._lost = self._lost, 0
                else:
                    self._lost += 1
        if lost:
            self._tell_lost(lost)

    def _put(self, descriptor: int, data: bytes) -> bool:
        """Whether all of it could be written."""
        rest = memoryview(data)
        while rest:
            if not self._room.poll(0 if self._lost else PATIENCE * 1000):
                break
            rest = rest[os.write(descriptor, rest[:_PIECE]) :]
        if len(rest) < len(data):
            self._cut = bool(rest)
        return not rest
