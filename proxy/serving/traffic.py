"""What has passed each Service, in /metrics: a bounded number of series (`proxy.counters.Series`).

A scrape looks at nothing: it tells what was counted until the last look, some seconds ago.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.counters import Series, by_service_port
from proxy.counting import Counters

_LABELS = ("ip_family", "service_port", "protocol")


class TrafficCollector(Collector):
    """What connection tracking has counted; registered with `Metrics.register`."""

    def __init__(self, counters: Counters, most: int) -> None:
        """Of counters, with at most so many service ports told apart."""
        self._counters = counters
        self._series = Series(most)

    def describe(self) -> Iterator[Metric]:
        """Nothing: what is collected costs little, and registering must not collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The metrics of now."""
        connections = CounterMetricFamily(
            "sluice_service_connections", "Connections and UDP flows through Services", labels=_LABELS
        )
        open_ = GaugeMetricFamily("sluice_service_open_connections", "Those of them that are open", labels=_LABELS)
        packets = CounterMetricFamily("sluice_service_packets", "Their packets", labels=(*_LABELS, "direction"))
        bytes_ = CounterMetricFamily(
            "sluice_service_bytes", "Their bytes, IP headers among them", labels=(*_LABELS, "direction")
        )
        for port, sums in self._series.take(by_service_port(self._counters.rows())).items():
            connections.add_metric(port, sums.connections)
            open_.add_metric(port, sums.open)
            packets.add_metric([*port, "to_backend"], sums.packets_in)
            packets.add_metric([*port, "to_client"], sums.packets_out)
            bytes_.add_metric([*port, "to_backend"], sums.bytes_in)
            bytes_.add_metric([*port, "to_client"], sums.bytes_out)
        report = self._counters.report()
        lost = CounterMetricFamily(
            "sluice_service_traffic_losses", "Times that ends of flows were told faster than they could be taken"
        )
        lost.add_metric([], report.lost)
        uncounted = GaugeMetricFamily(
            "sluice_service_uncounted_connections", "Open connections that began before the kernel counted packets"
        )
        uncounted.add_metric([], report.uncounted)
        yield from (connections, open_, packets, bytes_, lost, uncounted)
