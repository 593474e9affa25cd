"""When a trace ends: after its time, or by ^C; what waits by then is still told."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Protocol, Self


class Waits(Protocol):
    """Something that can be waited for."""

    def fileno(self) -> int: ...


class Ending:
    """While it is entered, ^C does not interrupt what is at work, but ends `wait`.  For the main thread."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._stopped = False

    def __enter__(self) -> Self:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # By that and not by the handler, which the interpreter calls when `select` is over: a signal that comes right
        # before it would be noticed at the deadline.
        self._woken = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        signal.set_wakeup_fd(self._woken)
        os.close(self._reading)
        os.close(self._writing)

    def wait(self, sources: Iterable[Waits], seconds: float | None = None) -> bool:
        """Wait until there is something to read, or `seconds` are over; whether it was for the last time."""
        left = max(self._deadline - time.monotonic(), 0)
        waiting: list[int | Waits] = [self._reading, *sources]
        select.select(waiting, [], [], left if seconds is None else min(left, seconds))
        return self._stopped or time.monotonic() >= self._deadline

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True
