"""What has passed each Service: connections, packets and bytes, by frontend and backend.

Theory of operation
-------------------
Connection tracking knows everything that is asked: an entry's original destination is the frontend, its reply source
the backend, and with `nf_conntrack_acct` it counts what passes in each direction.  So nothing is added to the rules, in
any mode, and nothing is spent while counters are off.  (A counter on every element of the nftables maps would be an
alternative; but only the first packet of a connection passes those, and every element would grow by 16 bytes.)

A `Ledger` adds up two things: looks at the flows that are open (`see`), and events that tell the last figures of a flow
that has ended (`end`).  It remembers what each open flow had at the last look and adds what has come since, so that its
sums only grow, and a flow whose end nobody was told of has lost nothing but what came after the last look.  A flow that
begins and ends between two looks is counted at its end.

Memory is bounded by `MOST_FLOWS` open flows (more are counted at their end) and `MOST_PAIRS` pairs of frontend and
backend (more are counted for the frontend alone).  Metrics are bounded by `Series`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from rules.forwarding import Backend, Family, Frontend, Protocol, Route
from rules.netlink.conntrack import DESTINATION_NAT, Flow
from rules.netlink.counters import Counts, measure

MOST_FLOWS = 100_000
"""Open flows that are remembered; some 300 bytes each."""
MOST_PAIRS = 20_000
"""Pairs of a frontend and a backend that are told apart."""
OTHERS = "others"
"""What service ports that metrics don't tell apart are counted under."""


class Traffic(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Sums of some flows."""

    connections: int = 0
    """Begun, UDP flows among them; those too that were there before counting began."""
    open: int = 0
    packets_in: int = 0
    """From clients."""
    bytes_in: int = 0
    """With IP headers, as the kernel counts; in mode userspace without."""
    packets_out: int = 0
    bytes_out: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            connections=self.connections + other.connections,
            open=self.open + other.open,
            packets_in=self.packets_in + other.packets_in,
            bytes_in=self.bytes_in + other.bytes_in,
            packets_out=self.packets_out + other.packets_out,
            bytes_out=self.bytes_out + other.bytes_out,
        )


NOTHING = Traffic()


class Row(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """The sums of a frontend and a backend of it."""

    family: str
    service: str
    """`namespace/service:port`."""
    protocol: str
    frontend: str = ""
    """Empty: all frontends of the service port (mode userspace)."""
    backend: str = ""
    """Empty: backends that are gone, or that nobody told apart."""
    traffic: Traffic


class Report(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How counting goes, beside its rows."""

    on: bool
    since: float = 0.0
    """Seconds since counting began."""
    looked: float = 0.0
    """Seconds since the open flows were last looked at."""
    lost: int = 0
    """How often the kernel dropped events: ends of flows that were not told."""
    uncounted: int = 0
    """Open flows whose packets the kernel does not count, as they began before it was to."""
    problems: tuple[str, ...] = ()


class _Sum:
    """Sums that grow."""

    __slots__ = ("bytes_in", "bytes_out", "connections", "open", "packets_in", "packets_out")

    def __init__(self) -> None:
        self.connections = self.open = 0
        self.packets_in = self.bytes_in = self.packets_out = self.bytes_out = 0

    def grow(self, counts: Counts, before: Counts) -> None:
        self.packets_in += counts[0] - before[0]
        self.bytes_in += counts[1] - before[1]
        self.packets_out += counts[2] - before[2]
        self.bytes_out += counts[3] - before[3]

    def take_over(self, other: _Sum) -> None:
        self.connections += other.connections
        self.grow(Counts(other.packets_in, other.bytes_in, other.packets_out, other.bytes_out), _ZERO)

    def frozen(self) -> Traffic:
        return Traffic(
            connections=self.connections,
            open=self.open,
            packets_in=self.packets_in,
            bytes_in=self.bytes_in,
            packets_out=self.packets_out,
            bytes_out=self.bytes_out,
        )


class _Seen:
    """An open flow, as it was at the last look."""

    __slots__ = ("closed", "counts", "look", "sum")

    def __init__(self, sum_: _Sum) -> None:
        self.sum = sum_
        self.counts = _ZERO
        self.closed = False
        self.look = 0
        sum_.connections += 1
        sum_.open += 1

    def grow(self, counts: Counts) -> None:
        """It has these by now."""
        if counts < self.counts:
            # Another flow has got the number of one whose end was not told.
            self.sum.connections += 1
            self.counts = _ZERO
        self.sum.grow(counts, self.counts)
        self.counts = counts

    def close(self) -> None:
        """It is open no longer, if it was."""
        if not self.closed:
            self.closed = True
            self.sum.open -= 1


_ZERO = Counts(0, 0, 0, 0)
_Pair = tuple[Frontend, Backend | None]


class Ledger:
    """The sums of one family.  One thread writes, any may read."""

    def __init__(
        self,
        family: Family,
        routes: Callable[[], Mapping[Frontend, Route]],
        *,
        most_flows: int = MOST_FLOWS,
        most_pairs: int = MOST_PAIRS,
    ) -> None:
        """Of the flows to the frontends that `routes` has whenever it is asked."""
        self._family = family
        self._routes = routes
        self._most_flows = most_flows
        self._most_pairs = most_pairs
        self._lock = threading.Lock()
        self._sums: dict[_Pair, _Sum] = {}
        self._labels: dict[Frontend, str] = {}
        """Of the frontends in `_sums`: they may outlive their routes by their flows."""
        self._seen: dict[int, _Seen] = {}
        self._look = 0
        self._uncounted = self._uncounted_now = 0

    @property
    def family(self) -> Family:
        return self._family

    @property
    def uncounted(self) -> int:
        """How many open flows had no counters at the last look."""
        return self._uncounted

    # --- what comes in -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A look at all open flows begins."""
        self._look += 1
        self._uncounted_now = 0

    def see(self, flows: Iterable[Flow]) -> None:
        """These are open; one may be told twice.

        Raises:
            DecodeError: the rest of a flow is malformed.
        """
        with self._lock:
            for flow in flows:
                self._see(flow)

    def end(self, flows: Iterable[Flow]) -> None:
        """These have ended.

        Raises:
            DecodeError: the rest of a flow is malformed.
        """
        with self._lock:
            for flow in flows:
                self._end(flow)

    def finish(self) -> None:
        """All that are open have been seen, and the ends of those that went meanwhile were told."""
        self._uncounted = self._uncounted_now
        routes = self._routes()
        with self._lock:
            # Nobody told of their ends: they are gone all the same.  A look may miss a flow where the table changes
            # under it, so it takes two.
            for key in [each for each, seen in self._seen.items() if seen.look < self._look - 1]:
                self._seen.pop(key).close()
            self._forget(routes)

    def _see(self, flow: Flow) -> None:
        identity, counts, closed = measure(flow)
        if identity is None:
            return
        key = _key(identity, flow)
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= self._most_flows or (found := self._sum_of(flow)) is None:
                return
            seen = self._seen[key] = _Seen(found)
        if counts is None:
            self._uncounted_now += seen.look != self._look
        else:
            seen.grow(counts)
        seen.look = self._look
        if closed:
            seen.close()

    def _end(self, flow: Flow) -> None:
        identity, counts, _ = measure(flow)
        seen = self._seen.pop(_key(identity, flow), None) if identity is not None else None
        if seen is None:
            if (found := self._sum_of(flow)) is None:
                return
            seen = _Seen(found)
        if counts is not None:
            seen.grow(counts)
        seen.close()

    def _frontend_of(self, flow: Flow) -> Frontend | None:
        if not (flow.status & DESTINATION_NAT or flow.translated):
            return None
        routes = self._routes()
        for address in (flow.destination, b""):
            place = (address, flow.protocol, flow.port)
            if place in routes or place in self._labels:
                return Frontend(address, Protocol(flow.protocol), flow.port)
        return None

    def _sum_of(self, flow: Flow) -> _Sum | None:
        """Where a flow is counted; None: it goes through no Service."""
        frontend = self._frontend_of(flow)
        if frontend is None:
            return None
        route = self._routes().get(frontend)
        if route is not None:
            self._labels[frontend] = route.label
        pair: _Pair = frontend, flow.backend
        found = self._sums.get(pair)
        if found is None:
            if len(self._sums) >= self._most_pairs:
                pair = frontend, None
            found = self._sums.setdefault(pair, _Sum())
        return found

    def _forget(self, routes: Mapping[Frontend, Route]) -> None:
        """Let go what nobody has any more and no open flow uses: frontends, and backends as such."""
        kept: set[Frontend] = set()
        for pair, each in list(self._sums.items()):
            frontend, backend = pair
            route = routes.get(frontend)
            if each.open or (route is not None and (backend is None or _has(route, backend))):
                kept.add(frontend)
                continue
            del self._sums[pair]
            if route is not None:
                kept.add(frontend)
                self._sums.setdefault((frontend, None), _Sum()).take_over(each)
        for frontend in self._labels.keys() - kept:
            del self._labels[frontend]
        for frontend in self._labels:
            if (route := routes.get(frontend)) is not None:
                self._labels[frontend] = route.label

    # --- what goes out -----------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        """The sums of now, of what had any traffic."""
        with self._lock:
            found = [(*pair, self._labels.get(pair[0], ""), each.frozen()) for pair, each in self._sums.items()]
        for frontend, backend, label, traffic in found:
            yield Row(
                family=self._family.label,
                service=label or str(frontend),
                protocol=Protocol(frontend.protocol).name,
                frontend=str(frontend),
                backend="" if backend is None else str(backend),
                traffic=traffic,
            )


def _key(identity: int, flow: Flow) -> int:
    """What tells a flow from others: the kernel's number is a hash, of which 100,000 flows have some twice."""
    return identity << 16 | flow.source_port


def _has(route: Route, backend: Backend) -> bool:
    return backend in route.backends or backend in (route.local_backends or ())


class ServicePort(NamedTuple):
    """Whose traffic is one series."""

    family: str
    service: str
    protocol: str


def by_service_port(rows: Iterable[Row]) -> dict[ServicePort, Traffic]:
    """The sums of each service port."""
    found: dict[ServicePort, Traffic] = {}
    for row in rows:
        port = ServicePort(row.family, row.service, row.protocol)
        found[port] = found.get(port, NOTHING) + row.traffic
    return found


class Series:
    """A bounded number of series, none of which ever falls.

    The first service ports that have traffic get a series of their own, and keep it until they are gone; what the
    others have more than before is added to one for all of them.  (The busiest ones would be a choice that changes:
    whenever one came or went, a sum would fall, which Prometheus takes for a restart.)
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: set[ServicePort] = set()
        self._before: dict[ServicePort, Traffic] = {}
        """Of those without a series of their own."""
        self._others: dict[str, Traffic] = {}
        """By family."""

    def take(self, now: Mapping[ServicePort, Traffic]) -> dict[ServicePort, Traffic]:
        """The series, from the sums of now."""
        self._named &= now.keys()
        series: dict[ServicePort, Traffic] = {}
        before, self._before = self._before, {}
        open_: dict[str, int] = {}
        for port, traffic in now.items():
            if port in self._named or len(self._named) < self._most:
                self._named.add(port)
                series[port] = traffic
                continue
            self._before[port] = traffic
            more = traffic + _negative(before.get(port, NOTHING))
            self._others[port.family] = self._others.get(port.family, NOTHING) + more
            open_[port.family] = open_.get(port.family, 0) + traffic.open
        for family, traffic in self._others.items():
            others = msgspec.structs.replace(traffic, open=open_.get(family, 0))
            series[ServicePort(family, OTHERS, "")] = others
        return series


def _negative(traffic: Traffic) -> Traffic:
    return Traffic(**{name: -getattr(traffic, name) for name in traffic.__struct_fields__})
