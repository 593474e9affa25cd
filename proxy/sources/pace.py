"""How many requests an API server gets: `clientConnection.qps` and `burst`, as client-go keeps them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class Pace:
    """At most `qps` requests a second on average, and `burst` at once; who comes too soon waits for his turn."""

    def __init__(
        self,
        qps: float = 5.0,
        burst: int = 10,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """A full bucket.

        Args:
            qps: requests a second; not above 0: as many as come.
            burst: how many may come at once.
            clock: monotonic seconds.
            sleep: how to wait.
        """
        self._qps = qps
        self._burst = max(burst, 1)
        self._clock = clock
        self._sleep = sleep
        self._left = float(self._burst)
        self._since = clock()

    async def turn(self) -> None:
        """Wait until the next request may go."""
        if self._qps <= 0:
            return
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._since) * self._qps) - 1
        self._since = now
        if self._left < 0:
            await self._sleep(-self._left / self._qps)
