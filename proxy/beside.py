"""Work in a copy of this process, while this one does something else: for verbs that have two large things to decode.

The interpreter runs one thread at a time, so a second processor helps a second process alone.  A copy starts with all
that is loaded; only what it returns crosses over, as MessagePack: for ten thousand Services that takes a tenth of what
pickle does, which calls a function for every named tuple.

The copy gives way where this process and its children want all processors, as its result is asked for last: large YAML
is converted by two children at once, and while what they made is decoded here, a processor is free for the copy.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")

_GIVES_WAY = 5
"""By how much a copy is nicer: it gets a quarter of a processor for which another process competes."""
_PACKED, _PICKLED = b"\0", b"\1"
"""How an answer begins: before what was returned, or before that and what was raised."""


class DiedError(OSError):
    """The copy ended without a result; the message says how."""


class _Copy(Generic[T]):
    """A forked copy at work."""

    def __init__(self, work: Callable[[], T], returns: type[T]) -> None:
        self._returns = returns
        self._from, into = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _work(work, into)
        os.close(into)

    def result(self) -> T:
        """What the work returned; it raises what the work raised, or DiedError."""
        with open(self._from, "rb") as results:  # noqa: PTH123  # it has no path
            self._from = -1
            data = results.read()
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        if not data or status:
            raise DiedError(
                f"the process that reads them ended with status {os.waitstatus_to_exitcode(status)}: is memory short?"
            )
        if data[:1] == _PACKED:
            return msgspec.msgpack.decode(memoryview(data)[1:], type=self._returns)
        returned: T
        returned, error = pickle.loads(data[1:])  # noqa: S301  # of our own copy
        if error is not None:
            raise error
        return returned

    def end(self) -> None:
        """Have it end, whether it is done or not."""
        if self._from >= 0:
            os.close(self._from)
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


@contextlib.contextmanager
def beside(work: Callable[[], T], returns: type[T], *, worth_it: bool) -> Iterator[Callable[[], T]]:
    """Start some work in a copy of this process; what is given waits for it and returns its result.

    It is done here and when asked for unless it is `worth_it`, there is a second processor, and no other thread runs.

    Args:
        work: what is to be done.
        returns: the type of its result, which msgspec encodes.
        worth_it: whether it takes much longer than starting a process.
    """
    if not worth_it or len(os.sched_getaffinity(0)) < 2 or threading.active_count() > 1:
        yield work
        return
    copy = _Copy(work, returns)
    try:
        yield copy.result
    finally:
        copy.end()


def _work(work: Callable[[], T], into: int) -> None:
    """The copy's life: it ends here."""
    status = 1
    try:
        os.nice(_GIVES_WAY)
        try:
            found = _encoded(work())
        except Exception as error:  # noqa: BLE001  # it is raised again where it is waited for
            found = _PICKLED + pickle.dumps((None, error))
        with open(into, "wb") as results:  # it has no path
            results.write(found)
        status = 0
    finally:
        os._exit(status)


def _encoded(result: object) -> bytes:
    try:
        return _PACKED + msgspec.msgpack.encode(result)
    except UnicodeEncodeError:  # the name of a file need not be text
        return _PICKLED + pickle.dumps((result, None))
