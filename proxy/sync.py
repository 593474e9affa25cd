"""One family's syncs: what is wanted goes to the dataplane, as a delta or as a whole.

A delta is enough for as long as the kernel is known to hold the table before it.  After a start, a failure, an hour,
or when another process touched our rules, the kernel is read and what differs is written (DESIGN 4.2).  The dataplane
blocks, so it is called from a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from proxy.desired import Desired
from proxy.logs import get_logger
from proxy.runner import Periods, Runner
from proxy.state import State
from rules.dataplane import Applied, Dataplane, DataplaneError
from rules.forwarding import Family

_log = get_logger("sluice.sync")


class Observer(Protocol):
    """Who is told about syncs: health and metrics."""

    def queued(self, family: Family) -> None:
        """A sync was requested."""

    def started(self, family: Family) -> None:
        """The family's loop runs from now on."""

    def succeeded(self, family: Family, seconds: float, applied: Applied) -> None:
        """A sync was applied."""

    def failed(self, family: Family, seconds: float) -> None:
        """A sync was not applied."""


class FamilySync:
    """The sync loop of one family."""

    def __init__(
        self,
        dataplane: Dataplane,
        desired: Desired,
        state: State,
        periods: Periods,
        observer: Observer,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dataplane = dataplane
        self._desired = desired
        self._state = state
        self._observer = observer
        self._clock = clock
        self._runner = Runner(self._sync, periods)
        self._known = False
        """Whether the kernel holds the table that the last delta led to."""

    @property
    def family(self) -> Family:
        return self._dataplane.family

    def request(self) -> None:
        """Something changed."""
        if self._state.synced:
            self._observer.queued(self.family)
            self._runner.request()

    def doubt(self) -> None:
        """Another process touched our rules: read them."""
        self._known = False
        self.request()

    async def run(self) -> None:
        """Sync for ever."""
        self._observer.started(self.family)
        await self._runner.loop()

    async def _sync(self, periodic: bool) -> bool:
        if not self._state.synced:
            return True
        if periodic:
            self._known = False
        await self._desired.refresh()
        delta = self._desired.take_delta(self.family)
        known, self._known = self._known, True
        if known and not delta:
            self._observer.succeeded(self.family, 0.0, Applied())
            return True
        start = self._clock()
        try:
            if known:
                applied = await asyncio.to_thread(self._dataplane.apply, delta)
            else:
                applied = await asyncio.to_thread(self._dataplane.sync, self._desired.table(self.family))
        except Exception as error:  # noqa: BLE001  # see below
            self._known = False
            seconds = self._clock() - start
            self._observer.failed(self.family, seconds)
            # An error of our own making must not end the agent either: the node would lose its next changes too.
            trace = None if isinstance(error, DataplaneError) else error
            _log.error(
                "sync failed", family=self.family.label, seconds=round(seconds, 4), error=str(error), exc_info=trace
            )
            return False
        seconds = self._clock() - start
        self._observer.succeeded(self.family, seconds, applied)
        _log.info(
            "synced",
            family=self.family.label,
            full=not known,
            changed=len(delta.changed),
            removed=len(delta.removed),
            operations=applied.operations,
            bytes=applied.bytes_sent,
            seconds=round(seconds, 4),
        )
        for note in applied.notes:
            _log.warning(note, family=self.family.label)
        if applied.refused:
            _log.error("the kernel refused Services", family=self.family.label, services=sorted(applied.refused))
        return True
