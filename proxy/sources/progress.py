"""How following a resource goes: when to try again, what to log, and what to tell who asks.

Only changes of state are logged (connected; lost, why, and when the next try is), never an event.
"""

from __future__ import annotations

import asyncio
import enum
import random as randomness
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from proxy.logs import get_logger
from proxy.sources.base import Resource
from proxy.sources.failing import Failing, advice
from proxy.sources.transport import ApiError
from proxy.state import SECOND_LOOK


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The reflector's times, in seconds, and sizes."""

    first_delay: float = 0.8
    longest_delay: float = 30.0
    forget_after: float = 120.0
    """So long without a failure, and the next one starts at `first_delay` again."""
    watch_shortest: float = 300.0
    watch_longest: float = 600.0
    """A watch is asked for between these, at random: else all nodes come back in the same second."""
    silence: float = 180.0
    """No byte of a watch for so long, and it is opened anew: a server sends a bookmark each minute or so."""
    answer: float = 60.0
    """The same for a list, and for the first byte of any answer."""
    initial_silence: float = 10.0
    """The same for a streaming list: a server that ignores the request for one never says that it is complete."""
    page: int = 500
    """Objects on a page of a list."""
    rare: float = 600.0
    """Between two tries of a resource that the server doesn't have."""
    doubt: float = SECOND_LOOK
    """Before the second look at a list from which most has vanished."""
    streaming: bool = True


class Timing(NamedTuple):
    """Time and chance, as tests pass their own."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = randomness.random


class State(enum.Enum):
    STARTING = "starting"
    LISTING = "listing"
    WATCHING = "watching"
    WAITING = "waiting to try again"
    NOT_SERVED = "not served"


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """How one resource is followed; times are seconds ago, None where it never happened."""

    state: State
    listed: float | None
    changed: float | None
    """Since the last event that was not a bookmark."""
    lag: float | None
    """Since anything was heard of the server for this resource; minutes mean that the node may be behind."""
    version: str
    lists: int
    watches: int
    events: int
    error: str
    """The last failure, until the server is heard again."""


class Progress:
    """State, counters and delays of one resource."""

    def __init__(
        self,
        resource: Resource,
        settings: Settings,
        timing: Timing,
        on_change: Callable[[], None] = lambda: None,
        failing: Failing | None = None,
    ) -> None:
        self.resource = resource
        self._failing = failing or Failing()
        self.settings = settings
        self.timing = timing
        self._on_change = on_change
        self._log = get_logger("sluice.api").bind(resource=resource.value)
        self._state = State.STARTING
        self._listed: float | None = None
        self._changed: float | None = None
        self._heard: float | None = None
        self._version = ""
        self._lists = self._watches = self._events = 0
        self._error = ""
        self._lost = False
        """Whether it failed otherwise than happens to everybody."""
        self._failures = 0
        self._failed = timing.clock()

    def statistics(self) -> Statistics:
        now = self.timing.clock()

        def ago(moment: float | None) -> float | None:
            return None if moment is None else now - moment

        return Statistics(
            state=self._state,
            listed=ago(self._listed),
            changed=ago(self._changed),
            lag=ago(self._heard),
            version=self._version,
            lists=self._lists,
            watches=self._watches,
            events=self._events,
            error=self._error,
        )

    def listing(self) -> None:
        self._lists += 1
        if self._state is not State.NOT_SERVED:  # until the server shows that it is
            self._state = State.LISTING

    def listed(self, count: int, version: str) -> None:
        self._log.info("listed", objects=count, version=version)
        self._listed = self.timing.clock()
        self._version = version
        self._recovered()

    def watching(self) -> None:
        """A watch was accepted."""
        self._watches += 1
        self._state = State.WATCHING
        if self._error:
            tell = self._log.info if self._lost else self._log.debug
            tell("connected")
            self._lost = False
        self._recovered()

    def lasted(self) -> None:
        """A watch has lasted: what fails now fails for the first time."""
        self._failures = 0

    def heard(self, version: str, *, event: bool) -> None:
        self._heard = self.timing.clock()
        self._version = version or self._version
        if event:
            self._changed = self._heard
            self._events += 1

    def not_served(self, why: str) -> None:
        if self._state is not State.NOT_SERVED:
            self._log.info("not served", why=why)
        self._state = State.NOT_SERVED

    def _recovered(self) -> None:
        self._heard = self.timing.clock()
        self._error = ""
        self._failing.recovered(self.resource)
        self._on_change()

    async def pause(self, error: ApiError) -> None:
        """Wait after a failure: longer after each, up to `longest_delay`, and as long as the server asks for."""
        delay = max(self._next_delay(), error.retry_after)
        news = not error.usual and self._failing.is_news(self.resource, error)
        self._lost = self._lost or not error.usual
        tell = self._log.warning if news else self._log.debug
        tell("lost", server=self._failing.server(), why=str(error), retry_in=round(delay, 1), do=advice(error))
        self._error = str(error)
        self._state = State.WAITING
        self._on_change()
        await self.timing.sleep(delay)

    def _next_delay(self) -> float:
        now = self.timing.clock()
        if now - self._failed > self.settings.forget_after:
            self._failures = 0
        delay = min(self.settings.longest_delay, self.settings.first_delay * 2.0 ** min(self._failures, 16))
        self._failures += 1
        # A quarter more or less, so that the nodes of a cluster spread out.
        delay *= 0.75 + self.timing.random() / 2
        self._failed = now + delay
        return delay
