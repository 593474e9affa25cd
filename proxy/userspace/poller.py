"""Which of many sockets are ready, inside an event loop but past its machinery.

Theory of operation
-------------------
An event loop makes an object and enters a context for every event and goes round for every few, which costs a proxy
more than the events themselves.  So the sockets of the data path are in an epoll set of their own, whose events go
straight to their handlers.

How the set and the loop wait for both of them depends on the loop.  asyncio's takes a selector: `LoopSelector` waits
for the data path with the loop's own descriptors in the same wait (an epoll set is itself readable while something in
it is ready), and gives the loop its turn when one of these is ready, a timer is due or a handler has asked for it;
while there is only data to move, the loop doesn't go round at all.  Any other loop, as uvloop, watches the set as one
descriptor.

A wake-up handles at most BATCH events, and a handler does bounded work: control and timers always have their turn.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
import time
from collections.abc import Callable

BATCH = 64
"""Events handled before it is asked again who is ready."""

Handler = Callable[[int], None]
Work = Callable[[], None]


class Poller:
    """Calls handlers with the events of their descriptors."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.loop_wanted = False
        """Whether a handler has given the event loop something to do."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nested = False
        self._handlers: dict[int, Handler] = {}
        self._added: set[int] = set()
        self._again: list[Work] = []

    def attach(self, loop: asyncio.AbstractEventLoop, *, nested: bool) -> None:
        """Serve within a running loop; `nested`: the loop has no `LoopSelector` and must watch the set itself."""
        self._loop = loop
        self._nested = nested
        if nested:
            loop.add_reader(self.epoll.fileno(), self._wake)

    def add(self, descriptor: int, events: int, handler: Handler) -> None:
        """Call `handler` with the events that occur, from the next wake-up on.

        Raises:
            OSError: the kernel's limit of watched descriptors is reached.
        """
        self.epoll.register(descriptor, events)
        self._handlers[descriptor] = handler
        self._added.add(descriptor)

    def change(self, descriptor: int, events: int) -> None:
        """Wait for other events; what is already so is told too."""
        self.epoll.modify(descriptor, events)

    def hand_over(self, descriptor: int, handler: Handler) -> None:
        """Call another handler from now on."""
        self._handlers[descriptor] = handler

    def forget(self, descriptor: int) -> None:
        """Call no handler any more; the descriptor is about to be closed, by which the kernel forgets it too."""
        self._handlers.pop(descriptor, None)

    def remove(self, descriptor: int) -> None:
        """Stop watching a descriptor that stays open."""
        if self._handlers.pop(descriptor, None) is not None:
            self.epoll.unregister(descriptor)

    def again(self, work: Work) -> None:
        """Call `work` once the other sockets have had their turn."""
        if self._nested and not self._again:
            assert self._loop is not None
            self._loop.call_soon(self.go_on)
        self._again.append(work)

    def later(self, seconds: float, work: Work) -> None:
        """Call `work` after a while."""
        assert self._loop is not None
        self._loop.call_later(seconds, work)
        self.loop_wanted = True

    @property
    def has_work(self) -> bool:
        """Whether somebody is to be called again."""
        return bool(self._again)

    def close(self) -> None:
        """Serve no more.  A `LoopSelector` needs the set for as long as its loop, and closes it."""
        self._handlers.clear()
        self._again.clear()
        if self._nested and self._loop is not None:
            self._loop.remove_reader(self.epoll.fileno())
            self.epoll.close()

    def handle(self, events: list[tuple[int, int]]) -> None:
        """Call the handlers of what has occurred."""
        handlers, added = self._handlers, self._added
        added.clear()
        for descriptor, what in events:
            handler = handlers.get(descriptor)
            # A descriptor that was closed and given out again within the batch has an event of its predecessor.
            if handler is not None and descriptor not in added:
                try:
                    handler(what)
                except Exception as error:  # noqa: BLE001  # one connection's mishap is not to be that of the others
                    self._complain(error)

    def go_on(self) -> None:
        """Call who wanted to be called again."""
        works, self._again = self._again, []
        for work in works:
            try:
                work()
            except Exception as error:  # noqa: BLE001  # likewise
                self._complain(error)

    def _wake(self) -> None:
        self.handle(self.epoll.poll(0, BATCH))

    def _complain(self, error: Exception) -> None:
        assert self._loop is not None
        self._loop.call_exception_handler({"message": "a connection's handler failed", "exception": error})


class LoopSelector(selectors.EpollSelector):
    """The selector of an asyncio loop that has the data path served while it waits for the loop's own descriptors."""

    def __init__(self, poller: Poller) -> None:
        super().__init__()
        self._poller = poller
        poller.epoll.register(self.fileno(), select.EPOLLIN)

    def close(self) -> None:
        super().close()
        self._poller.epoll.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready of the loop's own, after at most `timeout` seconds, in which the data path goes on."""
        poller, poll, own = self._poller, self._poller.epoll.poll, self.fileno()
        left = math.inf if timeout is None else max(0.0, timeout)
        end = time.monotonic() + left
        poller.loop_wanted = False
        while True:
            events = poll(0.0 if poller.has_work else _as_epoll(left), BATCH)
            poller.handle(events)
            if poller.has_work:
                poller.go_on()
            for descriptor, _ in events:
                if descriptor == own:
                    return super().select(0)
            left = end - time.monotonic()
            if poller.loop_wanted or left <= 0:
                return []


def _as_epoll(seconds: float) -> float:
    """How long the kernel may wait; like its timers, to the millisecond above; -1: for ever."""
    return -1.0 if seconds == math.inf else math.ceil(seconds * 1e3) * 1e-3
