"""Counting at work: a thread that hears of flows that end, and looks at those that are open now and then.

A look costs the kernel a walk of its table and this process some 10 µs for each flow through a Service, so that looks
take at most a twentieth of the time (`REST`).  While somebody watches they come every `LIVE` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol as Interface
from typing import runtime_checkable

from proxy.counters import Ledger, Report, Row, Traffic
from proxy.logs import get_logger
from proxy.userspace.totals import Totals
from rules.forwarding import Family, Protocol
from rules.netlink.attributes import DecodeError
from rules.netlink.conntrack import DESTINATION_NAT, Flow
from rules.netlink.conntrack_table import Conntrack
from rules.netlink.counters import EndedFlows

INTERVAL, LIVE = 10.0, 2.0
"""Seconds between looks, when nobody watches and while somebody does."""
ATTENTION = 10.0
"""Seconds for which somebody watches after the last call of `watched`."""
REST = 20.0
"""How many times as long as a look took no other one comes."""
RETRY = 30.0
"""Seconds after which events are listened to again, where that failed."""

ACCOUNTING = Path("/proc/sys/net/netfilter/nf_conntrack_acct")
_CHUNK = 500
_PATIENCE = 2.0
"""Seconds for the thread to end."""

_log = get_logger("sluice.counters")


class Counters(Interface):
    """What is counted, wherever it is."""

    def report(self) -> Report: ...

    def rows(self) -> list[Row]: ...

    def watched(self) -> None:
        """Somebody looks at the figures: let them be fresh for a while."""


class Off:
    """Nothing is counted."""

    def report(self) -> Report:
        return Report(on=False)

    def rows(self) -> list[Row]:
        return []

    def watched(self) -> None:
        pass


@runtime_checkable
class Relaying(Interface):
    """A userspace dataplane, whose workers count what they relay."""

    @property
    def family(self) -> Family: ...

    @property
    def totals(self) -> Totals: ...


class Relayed:
    """What the workers of mode userspace have counted: always, and without packets."""

    def __init__(self, dataplanes: Iterable[Relaying], clock: Callable[[], float] = time.monotonic) -> None:
        self._dataplanes = tuple(dataplanes)
        self._clock = clock
        self._since = clock()

    def report(self) -> Report:
        """How it goes; the workers' figures are gathered every few seconds anyway."""
        return Report(on=True, since=self._clock() - self._since)

    def rows(self) -> list[Row]:
        """What was counted until now."""
        return [
            Row(
                family=each.family.label,
                service=port.label,
                protocol=port.protocol,
                traffic=Traffic(
                    connections=sums.total, open=sums.open, bytes_in=sums.bytes_in, bytes_out=sums.bytes_out
                ),
            )
            for each in self._dataplanes
            for port, sums in each.totals.sums().items()
        ]

    def watched(self) -> None:
        pass


class Flows(Interface):
    """What is asked of connection tracking; see `rules.netlink.conntrack_table.Conntrack`."""

    def flows(self, protocol: Protocol, status: int = 0) -> Iterator[Flow]: ...

    def close(self) -> None: ...


class Events(Interface):
    """What tells of flows that end; see `rules.netlink.counters.EndedFlows`."""

    @property
    def lost(self) -> int: ...

    def fileno(self) -> int: ...

    def take(self) -> list[Flow]: ...

    def close(self) -> None: ...


class Counting:
    """Counts what connection tracking tracks; nothing is done before `run`."""

    def __init__(
        self,
        ledgers: Iterable[Ledger],
        *,
        open_table: Callable[[Family], Flows] = Conntrack,
        open_events: Callable[..., Events] = EndedFlows,
        nat: bool = True,
        clock: Callable[[], float] = time.monotonic,
        accounting: Path = ACCOUNTING,
    ) -> None:
        """Of some ledgers, one for each family.

        Args:
            ledgers: where it is written down.
            open_table: how the open flows of a family are read.
            open_events: how one listens to flows that end; asked for `every` one where NAT tells nothing.
            nat: whether what goes through Services is what NAT has translated, so that the kernel can leave out all
                else; IPVS translates by itself.
            clock: monotonic seconds.
            accounting: the file that says whether the kernel counts packets and bytes.
        """
        self._ledgers = {ledger.family: ledger for ledger in ledgers}
        self._open_table = open_table
        self._open_events = open_events
        self._nat = nat
        self._clock = clock
        self._accounting = accounting
        self._tables: dict[Family, Flows] = {}
        self._events: Events | None = None
        self._since = self._looked = clock()
        self._watched = -ATTENTION
        self._lost = 0
        self._problems: dict[str, str] = {}
        self._stop = threading.Event()
        self._near, self._far = socket.socketpair()
        for end in (self._near, self._far):
            end.setblocking(False)

    async def run(self) -> None:
        """Count until cancelled."""
        thread = threading.Thread(target=self._work, name="counters", daemon=True)
        self._since = self._looked = self._clock()
        thread.start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._stop.set()
            self._wake()
            thread.join(_PATIENCE)

    def watched(self) -> None:
        """Somebody looks at the figures: look at open flows more often for a while."""
        if self._clock() - self._watched > ATTENTION:
            self._watched = self._clock()
            self._wake()
        self._watched = self._clock()

    def report(self) -> Report:
        """How it goes."""
        now = self._clock()
        return Report(
            on=True,
            since=now - self._since,
            looked=now - self._looked,
            lost=self._lost,
            uncounted=sum(ledger.uncounted for ledger in self._ledgers.values()),
            problems=tuple(self._problems.values()),
        )

    def rows(self) -> list[Row]:
        """What was counted until now."""
        return [row for ledger in self._ledgers.values() for row in ledger.rows()]

    # --- the thread --------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._near.send(b"!")

    def _work(self) -> None:
        cost: float | None = None
        listen = 0.0
        try:
            while not self._stop.is_set():
                now = self._clock()
                if self._events is None and now >= listen:
                    # Before the look: what ends after it is told.
                    self._listen()
                    listen = now + RETRY
                if cost is None or self._due(cost) <= now:
                    self._look()
                    self._looked = self._clock()
                    cost = self._looked - now
                self._wait(self._due(cost) - self._clock())
                self._take()
        finally:
            for table in self._tables.values():
                table.close()
            if self._events is not None:
                self._events.close()
            self._near.close()
            self._far.close()

    def _due(self, cost: float) -> float:
        """When the next look comes, after one that took `cost` seconds."""
        live = self._clock() - self._watched < ATTENTION
        return self._looked + max(LIVE if live else INTERVAL, REST * cost)

    def _wait(self, seconds: float) -> None:
        sources: list[int] = [self._far.fileno(), *([self._events.fileno()] if self._events else [])]
        poll = select.poll()
        for each in sources:
            poll.register(each, select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        with contextlib.suppress(BlockingIOError):
            while self._far.recv(64):
                pass

    def _listen(self) -> None:
        try:
            self._events = self._open_events(every=not self._nat)
        except OSError as error:
            self._complain("events", f"ends of flows are not heard of: {error.strerror or error}")
        else:
            self._problems.pop("events", None)

    def _take(self) -> None:
        """Write down the flows that have ended."""
        if self._events is None:
            return
        lost = self._events.lost
        try:
            while flows := self._events.take():
                for family, ended in by_family(flows):
                    ledger = self._ledgers.get(family)
                    if ledger is not None:
                        ledger.end(ended)
                if self._stop.is_set():
                    return
        except (OSError, DecodeError) as error:
            self._complain("events", f"ends of flows cannot be read: {error}")
            self._events.close()
            self._events = None
            return
        if self._events.lost > lost:
            self._lost += self._events.lost - lost
            self._complain("lost", "the kernel told of more flows that end than could be taken: sums are too low")

    def _look(self) -> None:
        for family, ledger in self._ledgers.items():
            try:
                table = self._tables.get(family) or self._tables.setdefault(family, self._open_table(family))
                ledger.begin()
                for protocol in Protocol:
                    flows = table.flows(protocol, DESTINATION_NAT if self._nat else 0)
                    while some := list(itertools.islice(flows, _CHUNK)):
                        ledger.see(some)
                        if self._stop.is_set():
                            return
                self._take()
                ledger.finish()
            except (OSError, DecodeError) as error:
                self._complain(family.label, f"open {family.label} flows cannot be read: {error}")
                self._forget_table(family)
            else:
                self._problems.pop(family.label, None)
        self._check_accounting()

    def _forget_table(self, family: Family) -> None:
        if (table := self._tables.pop(family, None)) is not None:
            table.close()

    def _check_accounting(self) -> None:
        try:
            on = self._accounting.read_text().strip() != "0"
        except OSError:
            on = False
        if on:
            self._problems.pop("accounting", None)
        else:
            self._complain(
                "accounting",
                "the kernel counts no packets and bytes, only connections: set net.netfilter.nf_conntrack_acct to 1",
            )

    def _complain(self, what: str, problem: str) -> None:
        if self._problems.get(what) != problem:
            self._problems[what] = problem
            _log.warning("traffic is not counted fully", reason=problem)


def by_family(flows: Sequence[Flow]) -> list[tuple[Family, list[Flow]]]:
    """Flows of both families apart."""
    first: list[Flow] = []
    second: list[Flow] = []
    for flow in flows:
        (first if len(flow.destination) == 4 else second).append(flow)
    return [(Family.IPV4, first), (Family.IPV6, second)]
