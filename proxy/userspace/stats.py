"""What has passed a worker, by frontend: counted by adding, and read as frozen records."""

from __future__ import annotations

from bisect import bisect_left

from proxy.userspace.control import CONNECT_BUCKETS, FrontendStats
from rules.forwarding import Backend, Family, Frontend


class Counters:
    """The figures of one frontend; they outlive changes of its route."""

    __slots__ = ("bytes_in", "bytes_out", "connect_seconds", "connects", "failures", "label", "load", "open", "total")

    def __init__(self) -> None:
        self.label = ""
        self.open = 0
        self.total = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.failures = 0
        self.connect_seconds = 0.0
        self.connects = [0] * (len(CONNECT_BUCKETS) + 1)
        self.load: dict[Backend, int] = {}
        """Connections by backend, those included that are being opened."""

    def begin(self) -> None:
        """A connection was accepted."""
        self.open += 1
        self.total += 1

    def end(self) -> None:
        """It is gone."""
        self.open -= 1

    def take(self, backend: Backend) -> None:
        """A backend is given to one."""
        self.load[backend] = self.load.get(backend, 0) + 1

    def leave(self, backend: Backend) -> None:
        """It leaves its backend."""
        left = self.load[backend] - 1
        if left:
            self.load[backend] = left
        else:
            del self.load[backend]

    def connected(self, seconds: float) -> None:
        """A backend has answered, after so long."""
        self.connect_seconds += seconds
        self.connects[bisect_left(CONNECT_BUCKETS, seconds)] += 1

    def record(self, family: Family, frontend: Frontend) -> FrontendStats:
        """As the agent gets them."""
        return FrontendStats(
            frontend=frontend,
            family=family,
            label=self.label,
            open=self.open,
            total=self.total,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            failures=self.failures,
            connect_seconds=self.connect_seconds,
            connects=list(self.connects),
        )
