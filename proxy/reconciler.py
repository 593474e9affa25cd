"""Deletes stale flows after syncs (CT-1, CT-6, CT-7); `proxy.conntrack` says which.

It runs beside the sync loop and never holds it up: what syncs changed is gathered while the kernel is at work, in a
thread.  What fails here fails no sync; the next round looks at every flow then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol as Interface

from proxy.conntrack import Change, Serving, change, compose, is_stale, matches_of
from proxy.logs import get_logger
from rules.dataplane import Applied
from rules.forwarding import Family, Frontend, Protocol
from rules.netlink.conntrack import Flow, Match
from rules.netlink.conntrack_table import Conntrack

_log = get_logger("sluice.conntrack")


class Table(Interface):
    """What is asked of connection tracking; see `rules.netlink.conntrack_table.Conntrack`."""

    def delete_matching(self, match: Match) -> int: ...

    def sweep(self, match: Match, stale: Callable[[Flow], bool]) -> int: ...

    def close(self) -> None: ...


class Reconciler:
    """Deletes the stale flows of one family."""

    def __init__(
        self,
        family: Family,
        serving: Callable[[], Mapping[Frontend, Serving]],
        report: Callable[[Family, float, int], None],
        *,
        table: Table | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of a family whose rules are written.

        Args:
            family: the family.
            serving: the endpoints that serve each frontend, as of now (`Desired.serving`).
            report: told the seconds that a round took and how many flows it deleted (MET-24, MET-25).
            table: the kernel's, unless given.
            clock: monotonic seconds.
        """
        self._family = family
        self._serving = serving
        self._report = report
        self._table = table or Conntrack(family)
        self._clock = clock
        self._changes: dict[Frontend, Change] = {}
        # What was there before this process is as stale as what it sees go.
        self._everything = True
        self._due = asyncio.Event()
        self.begun = asyncio.Event()
        """Set once all flows were looked at for the first time: none goes on as it was before the rules were there."""
        self._complaint = ""

    def written(self, changes: Mapping[Frontend, Change], applied: Applied) -> None:
        """A sync succeeded, and with it these changes became rules; on the event loop.

        A start, and a sync that repaired something, look at every flow: while rules were missing, flows went anywhere.
        """
        for frontend, each in changes.items():
            self._add(frontend, each)
        if applied.full and applied.operations:
            self._everything = True
        if self._everything:
            self._add_vanished(applied)
        if self._changes or self._everything:
            self._due.set()

    async def run(self) -> None:
        """Work for ever, after each sync that leaves something to do."""
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                await self._round()
                self.begun.set()
        finally:
            self._table.close()

    def _add(self, frontend: Frontend, each: Change) -> None:
        known = self._changes.get(frontend)
        self._changes[frontend] = each if known is None else compose(known, each)

    def _add_vanished(self, applied: Applied) -> None:
        """Frontends that the kernel held and nobody wants: their Services went while no agent watched."""
        if applied.found is None:
            return
        serving = self._serving()
        for frontend, route in applied.found.routes.items():
            if frontend.protocol is Protocol.UDP and frontend not in serving:
                self._add(frontend, change(route.backends, None))

    async def _round(self) -> None:
        changes, self._changes = self._changes, {}
        everything, self._everything = self._everything, False
        matches = None if everything else matches_of(self._family, changes)
        if matches is None:
            # Those that are gone are among the changes only.
            changed: dict[Frontend, Serving] = {frontend: each.serving for frontend, each in changes.items()}
            work = partial(_sweep, self._table, self._family, changed | dict(self._serving()))
        else:
            work = partial(_delete, self._table, matches)
        start = self._clock()
        try:
            deleted = await asyncio.to_thread(work)
        except Exception as error:  # noqa: BLE001  # even an error of our own making is no reason to end the agent
            self._everything = True
            if not self._complaint:
                # Frontends that went must not be forgotten; where nothing ever works they must not pile up.
                later, self._changes = self._changes, changes
                for frontend, each in later.items():
                    self._add(frontend, each)
            self._complain(error)
            return
        self._complaint = ""
        seconds = self._clock() - start
        self._report(self._family, seconds, deleted)
        tell = _log.info if deleted else _log.debug
        tell("stale flows deleted", family=self._family.label, flows=deleted, seconds=round(seconds, 4))

    def _complain(self, error: Exception) -> None:
        """Once for one reason: it may be that the node cannot do it at all."""
        complaint = str(error)
        if complaint != self._complaint:
            self._complaint = complaint
            expected = isinstance(error, (OSError, ValueError))
            _log.warning(
                "stale flows are not deleted: UDP clients may keep sending to endpoints that are gone",
                family=self._family.label,
                reason=complaint,
                exc_info=None if expected else error,
            )


def _delete(table: Table, matches: list[Match]) -> int:
    return sum(table.delete_matching(match) for match in matches)


def _sweep(table: Table, family: Family, serving: Mapping[Frontend, Serving]) -> int:
    protocols = sorted({frontend.protocol for frontend in serving})
    return sum(table.sweep(Match(family, protocol), partial(is_stale, serving=serving)) for protocol in protocols)
