"""Metrics: kube-proxy's own by name and label (MET-*), and a few of Sluice's; docs/metrics.md lists them.

The registry is this object's alone.  Names that kube-proxy has are kept, so that dashboards and alerts go on working;
what only one mode has is absent in the others, not zero (MET-33).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from proxy.serving import protobuf
from proxy.serving.http import Server
from proxy.serving.native import NativeHistogram
from proxy.state import Statistics
from rules.dataplane import Applied
from rules.forwarding import Family

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""OpenMetrics is never offered: it forbids a gauge whose name ends in _total, which MET-19 is."""

_PREFIX = "kubeproxy_"
_SYNC_BUCKETS = tuple(0.001 * 2**power for power in range(15))
_PROGRAMMING_BUCKETS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
_API_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_FAMILY = ("ip_family",)
_NO_ANSWER = "<error>"
"""What client-go gives as the code of a request that got no answer."""


class Metrics:
    """Everything that is counted, by those who see it happen."""

    def __init__(
        self, mode: str, version: str, *, native: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        """Of an agent whose dataplane is `mode`.

        Args:
            mode: the dataplane's name; it decides which metrics exist.
            version: Sluice's.
            native: whether kube-proxy's histograms are native ones too (MET-32).
            clock: seconds since the epoch.
        """
        # kube-proxy has no _created series; the library's only switch for them is the process's.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._clock = clock
        self._native: dict[str, NativeHistogram] | None = {} if native else None
        """By name."""
        self._registry = CollectorRegistry()
        self._slis = CollectorRegistry()
        self._statistics: Callable[[], Statistics] | None = None
        self._http: Server | None = None
        self._seen: dict[Counter, float] = {}
        """Of counters that follow a total, how much of it they hold."""
        self._kube_proxy_metrics(mode)
        self._own_metrics(mode, version)
        ProcessCollector(registry=self._registry)
        check = ("name", "type")
        self._ping = Gauge(
            "kubernetes_healthcheck", "Whether a check of health succeeded", check, registry=self._slis
        ).labels("ping", "healthz")
        self._pings = Counter(
            "kubernetes_healthchecks", "Checks of health by result", (*check, "status"), registry=self._slis
        ).labels("ping", "healthz", "success")

    def _kube_proxy_metrics(self, mode: str) -> None:
        registry = self._registry

        def histogram(name: str, text: str, buckets: Sequence[float] = _SYNC_BUCKETS) -> Histogram:
            if self._native is None:
                return Histogram(_PREFIX + name, text, _FAMILY, registry=registry, buckets=buckets)
            made = NativeHistogram(_PREFIX + name, text, _FAMILY, registry=registry, buckets=buckets)
            self._native[_PREFIX + name] = made
            return made

        def gauge(name: str, text: str, labels: Sequence[str] = _FAMILY) -> Gauge:
            return Gauge(_PREFIX + name, text, labels, registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = _FAMILY) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=registry)

        self._duration = histogram("sync_proxy_rules_duration_seconds", "Seconds that a sync took")  # MET-1
        self._kinds = {
            full: histogram(f"sync_{kind}_proxy_rules_duration_seconds", f"Seconds that a {kind} sync took")
            for full, kind in ((True, "full"), (False, "partial"))
            if mode in {"iptables", "nftables"}
        }  # MET-2, MET-3
        self._last = gauge("sync_proxy_rules_last_timestamp_seconds", "When a sync last succeeded")  # MET-4
        self._programming = histogram(
            "network_programming_duration_seconds",
            "Seconds from a change of endpoints in the cluster to its rules on this node",
            _PROGRAMMING_BUCKETS,
        )  # MET-5
        self._endpoint_pending = gauge(
            "sync_proxy_rules_endpoint_changes_pending", "Changes of endpoints not synced yet", ()
        )  # MET-6
        self._endpoint_total = counter("sync_proxy_rules_endpoint_changes", "Changes of endpoints seen", ())  # MET-7
        self._service_pending = gauge(
            "sync_proxy_rules_service_changes_pending", "Changes of Services not synced yet", ()
        )  # MET-8
        self._service_total = counter("sync_proxy_rules_service_changes", "Changes of Services seen", ())  # MET-9
        self._restore_failures: list[Counter] = []
        self._rules: dict[str, Gauge] = {}
        self._packets: list[Counter] = []
        if mode in {"iptables", "ipvs"}:
            self._restore_failures.append(
                counter("sync_proxy_rules_iptables_restore_failures", "Restores that iptables refused")
            )  # MET-12
        if mode == "iptables":
            self._restore_failures.append(
                counter(
                    "sync_proxy_rules_iptables_partial_restore_failures",
                    "Restores of changes alone that iptables refused",
                )
            )  # MET-13
            self._packets = [
                counter(
                    "iptables_ct_state_invalid_dropped_packets", "Forwarded packets that were dropped as invalid", ()
                ),
                counter(
                    "iptables_localhost_nodeports_accepted_packets", "Connections to node ports at 127.0.0.0/8", ()
                ),
            ]  # MET-10, MET-11
            by_table = ("table", *_FAMILY)
            self._rules = {
                "total": gauge("sync_proxy_rules_iptables_total", "Rules of ours in iptables", by_table),  # MET-14
                "last": gauge("sync_proxy_rules_iptables_last", "Rules that the last sync wrote", by_table),  # MET-15
            }
        self._nftables_failures: list[Counter] = []
        if mode == "nftables":
            self._nftables_failures = [
                counter("sync_proxy_rules_nftables_sync_failures", "Syncs that the kernel refused"),  # MET-16
                counter(
                    "sync_proxy_rules_nftables_cleanup_failures", "Removals of what another mode had left that failed"
                ),  # MET-17
            ]
        self._queued = gauge(
            "sync_proxy_rules_last_queued_timestamp_seconds", "When a sync was last asked for"
        )  # MET-18
        self._no_local = gauge(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with policy Local and endpoints, none of them on this node",
            ("ip_family", "traffic_policy"),
        )  # MET-19
        self._healthz = counter("proxy_healthz", "Answers to /healthz by status", ("code",))  # MET-20
        self._livez = counter("proxy_livez", "Answers to /livez by status", ("code",))  # MET-21
        self._reconciling = histogram(
            "conntrack_reconciler_sync_duration_seconds", "Seconds that a search for stale flows took"
        )  # MET-24
        self._stale_deleted = counter("conntrack_reconciler_deleted_entries", "Stale flows that were deleted")  # MET-25
        self._requests = Counter(
            "rest_client_requests",
            "Requests to the API server by status, host and method",
            ("code", "host", "method"),
            registry=registry,
        )  # MET-31
        self._request_seconds = Histogram(
            "rest_client_request_duration_seconds",
            "Seconds until the API server answered; watches are not counted",
            ("verb", "host"),
            registry=registry,
            buckets=_API_BUCKETS,
        )  # MET-31

    def _own_metrics(self, mode: str, version: str) -> None:
        registry = self._registry

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"sluice_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"sluice_{name}", text, labels, registry=registry)

        self._operations = counter("kernel_operations", "Kernel objects added or deleted", _FAMILY)
        self._failures = counter("sync_failures", "Syncs that failed, in any mode", _FAMILY)
        self._refused = gauge("refused_routes", "Routes that the kernel refused", _FAMILY)
        self._routes = gauge("routes", "Frontends that are programmed", _FAMILY)
        self._drift_repairs = counter(
            "drift_repairs", "Times that the kernel held something else than was written, and was repaired", _FAMILY
        )
        self._drift = gauge("drift", "Differences that were found and left, under driftPolicy report", _FAMILY)
        self._troubles = gauge("troubles", "Objects and files that are wrong now")
        self._services = gauge("services", "Services that are known")
        self._slices = gauge("endpoint_slices", "EndpointSlices that are known")
        self._events = counter("events", "Events by what became of them", ("outcome",))
        self._connections = counter("http_connections", "Connections that the HTTP servers have taken")
        self._dropped = counter("http_dropped_connections", "Those of them that were ended without an answer")
        self._http_seconds = counter("http_seconds", "Seconds of the event loop that they took")
        gauge("info", "Version and dataplane", ("version", "dataplane")).labels(version, mode).set(1)

    def register(self, collector: Collector) -> None:
        """Have a collector asked at every scrape, for what is counted elsewhere.

        Raises:
            ValueError: it has a metric whose name is taken.
        """
        self._registry.register(collector)

    # --- what the sync loop tells ---

    def started(self, family: Family) -> None:
        """A family's loop runs: counters of its failures exist from now on, so that the first one is an increase."""
        for each in (*self._nftables_failures, *self._restore_failures, self._failures, self._drift_repairs):
            each.labels(family.label).inc(0)
        self.queued(family)

    def queued(self, family: Family) -> None:
        """A sync was asked for, or the loop started (MET-18)."""
        self._queued.labels(family.label).set(self._clock())

    def sync_done(self, family: Family, seconds: float, applied: Applied) -> None:
        """A sync succeeded (MET-1 to MET-4, MET-12 to MET-15)."""
        self._took(family, seconds, full=applied.full)
        self._last.labels(family.label).set(self._clock())
        self._operations.labels(family.label).inc(applied.operations)
        if applied.full:
            # A partial sync knows nothing of what was refused before.
            self._refused.labels(family.label).set(len(applied.refused))
        for each, count in zip(
            self._restore_failures, (applied.failed_restores, applied.failed_partial_restores), strict=False
        ):
            each.labels(family.label).inc(count)
        if self._rules and applied.rules:
            for table, count in applied.rules.items():
                self._rules["total"].labels(table, family.label).set(count)
                self._rules["last"].labels(table, family.label).set(applied.rules_written.get(table, 0))

    def sync_failed(self, family: Family, seconds: float, *, full: bool = True) -> None:
        """A sync failed (MET-12, MET-16)."""
        self._took(family, seconds, full=full)
        self._failures.labels(family.label).inc()
        for each in (*self._nftables_failures[:1], *self._restore_failures[:1]):
            each.labels(family.label).inc()

    def packets(self, invalid: int, loopback: int) -> None:
        """So many more packets were dropped as invalid, and let in to node ports at loopback (MET-10, MET-11)."""
        for each, count in zip(self._packets, (invalid, loopback), strict=False):
            each.inc(count)

    def cleanup_failed(self, family: Family) -> None:
        """What another mode had left could not be removed (MET-17)."""
        for each in self._nftables_failures[1:]:
            each.labels(family.label).inc()

    def drifted(self, family: Family, differences: int, *, repaired: bool) -> None:
        """The kernel was read, and held so many things otherwise than they were written."""
        self._drift_repairs.labels(family.label).inc(bool(differences and repaired))
        self._drift.labels(family.label).set(0 if repaired else differences)

    def reconciled(self, family: Family, seconds: float, deleted: int) -> None:
        """Connection tracking was searched for stale flows (MET-24, MET-25)."""
        self._reconciling.labels(family.label).observe(seconds)
        self._stale_deleted.labels(family.label).inc(deleted)

    def _took(self, family: Family, seconds: float, *, full: bool) -> None:
        self._duration.labels(family.label).observe(seconds)
        if full in self._kinds:
            self._kinds[full].labels(family.label).observe(seconds)

    def programming_latency(self, family: Family, seconds: float) -> None:
        """A change in the cluster has become rules after so many seconds (MET-5)."""
        self._programming.labels(family.label).observe(max(0.0, seconds))

    # --- what the state and the tables tell ---

    def follow(self, statistics: Callable[[], Statistics]) -> None:
        """Ask at every scrape what is known and what waits to be synced (MET-6 to MET-9)."""
        self._statistics = statistics

    def _ask(self, found: Statistics) -> None:
        self._advance(self._endpoint_total, found.endpoint_changes_total)
        self._advance(self._service_total, found.service_changes_total)
        self._endpoint_pending.set(found.endpoint_changes_pending)
        self._service_pending.set(found.service_changes_pending)
        self._services.set(found.services)
        self._slices.set(found.slices)
        self._troubles.set(found.troubles)

    def _advance(self, counter: Counter, total: float) -> None:
        counter.inc(total - self._seen.get(counter, 0))
        self._seen[counter] = total

    def no_local(self, family: Family, internal: int, external: int) -> None:
        """Service ports whose policy Local admits no endpoint here (MET-19)."""
        self._no_local.labels(family.label, "internal").set(internal)
        self._no_local.labels(family.label, "external").set(external)

    def routes(self, family: Family, count: int) -> None:
        """How many frontends are programmed."""
        self._routes.labels(family.label).set(count)

    # --- what the servers and the connection to the API server tell ---

    def healthz_answered(self, status: int) -> None:
        self._healthz.labels(str(status)).inc()

    def livez_answered(self, status: int) -> None:
        self._livez.labels(str(status)).inc()

    def pinged(self) -> None:
        """The metrics server's own /healthz was asked."""
        self._ping.set(1)
        self._pings.inc()

    def follow_server(self, server: Server) -> None:
        """Ask at every scrape how many connections there were."""
        self._http = server

    def api_answered(self, host: str, method: str, status: int | None, seconds: float | None) -> None:
        """The API server was asked; without a status there was no answer, without seconds it was a watch."""
        self._requests.labels(_NO_ANSWER if status is None else str(status), host, method).inc()
        if seconds is not None:
            self._request_seconds.labels(method, host).observe(seconds)

    def event(self, outcome: str) -> None:
        """An event was recorded, dropped or held back as repeated (`proxy.events`)."""
        self._events.labels(outcome).inc()

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        self._ask_all()
        return generate_latest(self._registry)

    def exposition_for(self, accept: str) -> tuple[str, bytes]:
        """Everything in the form that a scraper asks for by its Accept field, and what that form is called."""
        if self._native is None or not protobuf.is_asked_for(accept):
            return CONTENT_TYPE, self.exposition()
        self._ask_all()
        return protobuf.CONTENT_TYPE, protobuf.exposition(self._registry.collect(), self._native)

    def _ask_all(self) -> None:
        if self._statistics is not None:
            self._ask(self._statistics())
        if self._http is not None:
            self._advance(self._connections, self._http.accepted)
            self._advance(self._dropped, self._http.dropped)
            self._advance(self._http_seconds, self._http.seconds)

    def slis(self) -> bytes:
        """What is served as /metrics/slis (HTTP-1)."""
        return generate_latest(self._slis)
