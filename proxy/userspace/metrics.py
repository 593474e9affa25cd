"""The workers' figures in /metrics, with a bounded number of series (`proxy.userspace.totals`).

Nothing is asked of a worker when metrics are: they are what the watch has gathered some seconds ago, so that a busy
proxy delays nobody.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.userspace.control import CONNECT_BUCKETS
from proxy.userspace.totals import Sums, Totals
from rules.forwarding import Family

_LABELS = ("ip_family", "service_port", "protocol")
_PREFIX = "sluice_userspace"
_BOUNDS = (*map(str, CONNECT_BUCKETS), "+Inf")


class Counted(Protocol):
    """A dataplane whose connections are counted."""

    @property
    def family(self) -> Family: ...

    @property
    def totals(self) -> Totals: ...


class WorkersCollector(Collector):
    """What userspace dataplanes have counted; registered with `registry.register(WorkersCollector(dataplanes))`."""

    def __init__(self, dataplanes: Iterable[Counted]) -> None:
        self._dataplanes: Sequence[Counted] = tuple(dataplanes)

    def describe(self) -> Iterator[Metric]:
        """Nothing: what is collected costs little, and registering must not collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The metrics of now."""
        open_ = GaugeMetricFamily(
            f"{_PREFIX}_open_connections", "TCP connections and UDP flows that are open", labels=_LABELS
        )
        total = CounterMetricFamily(f"{_PREFIX}_connections", "TCP connections and UDP flows begun", labels=_LABELS)
        failures = CounterMetricFamily(
            f"{_PREFIX}_failures",
            "Connections without a backend, and backends that could not be reached",
            labels=_LABELS,
        )
        bytes_ = CounterMetricFamily(f"{_PREFIX}_bytes", "Bytes relayed", labels=(*_LABELS, "direction"))
        connect = HistogramMetricFamily(
            f"{_PREFIX}_connect_duration_seconds", "How long backends took to accept", labels=_LABELS
        )
        workers = GaugeMetricFamily(f"{_PREFIX}_workers", "Worker processes that answer", labels=_LABELS[:1])
        for dataplane in self._dataplanes:
            family = dataplane.family.label
            workers.add_metric([family], dataplane.totals.workers)
            for port, sums in dataplane.totals.sums().items():
                labels = [family, *port]
                open_.add_metric(labels, sums.open)
                total.add_metric(labels, sums.total)
                failures.add_metric(labels, sums.failures)
                bytes_.add_metric([*labels, "to_backend"], sums.bytes_in)
                bytes_.add_metric([*labels, "to_client"], sums.bytes_out)
                connect.add_metric(labels, _buckets(sums), sums.connect_seconds)
        yield from (open_, total, failures, bytes_, connect, workers)


def _buckets(sums: Sums) -> list[tuple[str, float]]:
    return list(zip(_BOUNDS, itertools.accumulate(map(float, sums.connects)), strict=True))
