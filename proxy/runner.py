"""When a sync runs: kube-proxy's rules of batching, without its timers (SYN-2 to SYN-8).

The first request of a quiet period is served at once.  Requests during a run, or within `minimum` seconds after its
end, are served by one run when those seconds are over; only an urgent one does not wait for that.  A run that succeeds
is followed by another one `maximum` seconds later even if nobody asks, as a check.  A run that fails is followed by
another one soon, and later and later up to `retry` seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

FIRST_RETRY = 1.0
"""Seconds after the first failure in a row; doubled with each further one."""


class Periods(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds between syncs."""

    minimum: float
    """From the end of a run to the next one."""
    retry: float
    """At most, from a failed run to the next one."""
    maximum: float = 3600.0
    """From a run to the next one that nobody asked for."""

    def after(self, failures: int) -> float:
        """How long to wait, without a request, after a run and `failures` failures in a row."""
        if not failures:
            return self.maximum
        return min(FIRST_RETRY * 2.0 ** min(failures - 1, 30), self.retry, self.maximum)


class Runner:
    """Runs one coroutine function at a time, when it is requested and periodically."""

    def __init__(
        self,
        run: Callable[[bool], Awaitable[bool]],
        periods: Periods,
        wait: Callable[[asyncio.Event, float], Awaitable[bool]] | None = None,
    ) -> None:
        """Of a sync and its periods.

        Args:
            run: the sync; its argument says whether this is a periodic check or a retry rather than a request; it
                returns whether it succeeded.
            periods: when to run.
            wait: waits for an event, at most so many seconds, and says whether it was set; tests pass their own.
        """
        self._run = run
        self._periods = periods
        self._wait = wait or _wait
        self._requested = asyncio.Event()
        self._hurry = asyncio.Event()
        self._running = False

    def set_periods(self, periods: Periods) -> None:
        """Run by other periods, from the end of the next run on."""
        self._periods = periods

    @property
    def pending(self) -> bool:
        """Whether a run is asked for, or at work."""
        return self._running or self._requested.is_set()

    @property
    def at_work(self) -> bool:
        """Whether a run is at work."""
        return self._running

    def request(self, *, urgent: bool = False) -> None:
        """Ask for a run, as soon as the periods allow; an urgent one at the end of the run at work."""
        self._requested.set()
        if urgent:
            self._hurry.set()

    async def loop(self) -> None:
        """Run for ever."""
        failures = 0
        pause = self._periods.maximum
        while True:
            requested = await self._wait(self._requested, pause)
            self._requested.clear()
            self._hurry.clear()
            self._running = True
            try:
                failures = 0 if await self._run(not requested) else failures + 1
            finally:
                self._running = False
            # Both count from the end of the run.
            minimum = self._periods.minimum
            pause = max(0.0, self._periods.after(failures) - minimum)
            if minimum > 0:
                await self._wait(self._hurry, minimum)


class Allowance:
    """How often the kernel may be read because another process touched our rules.

    One that touches them once is answered at once.  One that fights for them (another agent, a script in a loop)
    answers every repair with another change: it gets `burst` answers at once, then one every `every` seconds, or
    fewer if an answer takes long, so that no more than a `share` of the time goes into the fight.
    """

    def __init__(self, *, burst: int = 10, every: float = 3.0, share: float = 0.05) -> None:
        self._burst = burst
        self._every = self._pace = every
        self._share = share
        self._left = float(burst)
        self._since = 0.0

    def wait(self, now: float) -> float:
        """Seconds until the kernel may be read; `now` is monotonic."""
        return max(0.0, (1.0 - self._left_at(now)) * self._pace)

    def spend(self, now: float, seconds: float) -> None:
        """An answer has ended, that took so many seconds."""
        self._left = self._left_at(now) - 1.0
        self._since = now
        self._pace = max(self._every, seconds / self._share)

    def _left_at(self, now: float) -> float:
        return min(self._burst, self._left + (now - self._since) / self._pace)


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return event.is_set()
