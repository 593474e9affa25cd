"""What has passed all workers, by service port: sums that only grow, whichever worker dies.

Workers tell what has passed each frontend since they began to serve it.  A service port has several frontends, and is
served by several workers, some of which are gone: their last figures are kept here.  Memory and metrics are bounded by
a number of service ports; what exceeds it is counted together, under the name `OTHERS`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from proxy.userspace.control import CONNECT_BUCKETS, FrontendStats, StatsAnswer
from rules.forwarding import Family, Frontend

MOST = 1000
"""Service ports that are told apart."""
OTHERS = "others"


class ServicePort(NamedTuple):
    """Whose connections are counted together."""

    label: str
    """`namespace/service:port`."""
    protocol: str


class Sums(msgspec.Struct):
    """Figures of a service port."""

    open: int = 0
    total: int = 0
    bytes_in: int = 0
    """From clients to backends."""
    bytes_out: int = 0
    failures: int = 0
    connect_seconds: float = 0.0
    connects: list[int] = msgspec.field(default_factory=lambda: [0] * (len(CONNECT_BUCKETS) + 1))
    """How many connects took up to each of CONNECT_BUCKETS, not cumulated; the last one is for all longer ones."""

    def add(self, other: FrontendStats | Sums, *, with_open: bool = True) -> None:
        """Count another one's figures too; what is open only where it still is."""
        self.open += other.open if with_open else 0
        self.total += other.total
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.failures += other.failures
        self.connect_seconds += other.connect_seconds
        self.connects = [mine + more for mine, more in zip(self.connects, other.connects, strict=True)]


class Totals:
    """The sums of one family.  One thread takes, another reads."""

    def __init__(self, family: Family, *, most: int = MOST) -> None:
        self._family = family
        self._most = most
        self._lock = threading.Lock()
        self._last: Mapping[tuple[int, Frontend], FrontendStats] = {}
        """What each worker told last, by process."""
        self._past: dict[ServicePort, Sums] = {}
        """What those told last who tell no more."""
        self._names: dict[ServicePort, ServicePort] = {}
        """What service ports are counted under: their own name, or that of all others."""
        self._workers = 0

    def take(self, answers: Iterable[tuple[int, StatsAnswer]]) -> None:
        """What all workers tell now, by process."""
        answers = list(answers)
        now = {
            (pid, each.frontend): each
            for pid, answer in answers
            for each in answer.frontends
            if each.family is self._family
        }
        with self._lock:
            self._workers = len(answers)
            for key, before in self._last.items():
                after = now.get(key)
                if after is None or after.total < before.total:
                    self._past.setdefault(self._name(before), Sums()).add(before, with_open=False)
            self._last = now
            if answers:
                # A Service that nobody serves any more has no figures either.
                alive = {_port(each) for each in now.values()}
                self._names = {port: name for port, name in self._names.items() if port in alive}
                names = {*self._names.values(), ServicePort(OTHERS, "")}
                self._past = {name: sums for name, sums in self._past.items() if name in names}

    @property
    def workers(self) -> int:
        """How many workers answered last."""
        return self._workers

    def sums(self) -> dict[ServicePort, Sums]:
        """All figures."""
        found: dict[ServicePort, Sums] = {}
        with self._lock:
            for name, past in self._past.items():
                found.setdefault(name, Sums()).add(past)
            for each in self._last.values():
                found.setdefault(self._name(each), Sums()).add(each)
        return found

    def _name(self, each: FrontendStats) -> ServicePort:
        port = _port(each)
        if port not in self._names:
            self._names[port] = port if len(self._names) < self._most else ServicePort(OTHERS, "")
        return self._names[port]


def _port(each: FrontendStats) -> ServicePort:
    return ServicePort(each.label or str(each.frontend), each.frontend.protocol.name)
