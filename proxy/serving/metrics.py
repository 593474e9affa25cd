"""Metrics: kube-proxy's own by name and label (MET-*), and a few of Sluice's.

The registry is this object's alone.  Names that kube-proxy has are kept, so that dashboards and alerts go on working;
what only one mode has is absent in the others, not zero (MET-33).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from rules.dataplane import Applied
from rules.forwarding import Family

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""OpenMetrics is never offered: it forbids a gauge whose name ends in _total, which MET-19 is."""

_PREFIX = "kubeproxy_"
_SYNC_BUCKETS = tuple(0.001 * 2**power for power in range(15))
_PROGRAMMING_BUCKETS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
_FAMILY = ("ip_family",)


class Metrics:
    """Everything that is counted, by those who see it happen."""

    def __init__(self, mode: str, version: str, *, clock: Callable[[], float] = time.time) -> None:
        """Of an agent whose dataplane is `mode`.

        Args:
            mode: the dataplane's name; it decides which metrics exist.
            version: Sluice's.
            clock: seconds since the epoch.
        """
        # kube-proxy has no _created series; the library's only switch for them is the process's.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._clock = clock
        registry = self._registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float] = _SYNC_BUCKETS) -> Histogram:
            return Histogram(_PREFIX + name, text, _FAMILY, registry=registry, buckets=buckets)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(_PREFIX + name, text, labels, registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=registry)

        self._duration = histogram("sync_proxy_rules_duration_seconds", "Seconds that a sync took")  # MET-1
        self._kinds = {
            full: histogram(f"sync_{kind}_proxy_rules_duration_seconds", f"Seconds that a {kind} sync took")
            for full, kind in ((True, "full"), (False, "partial"))
            if mode in {"iptables", "nftables"}
        }  # MET-2, MET-3
        self._last = gauge("sync_proxy_rules_last_timestamp_seconds", "When a sync last succeeded", _FAMILY)  # MET-4
        self._programming = histogram(
            "network_programming_duration_seconds",
            "Seconds from a change of endpoints in the cluster to its rules on this node",
            _PROGRAMMING_BUCKETS,
        )  # MET-5
        self._endpoint_pending = gauge(
            "sync_proxy_rules_endpoint_changes_pending", "Changes of endpoints not synced yet"
        )
        self._endpoint_total = counter("sync_proxy_rules_endpoint_changes", "Changes of endpoints seen")
        self._service_pending = gauge("sync_proxy_rules_service_changes_pending", "Changes of Services not synced yet")
        self._service_total = counter("sync_proxy_rules_service_changes", "Changes of Services seen")
        self._endpoints_seen = self._services_seen = 0
        self._mode_failures = (
            counter("sync_proxy_rules_nftables_sync_failures", "Syncs that the kernel refused", _FAMILY)
            if mode == "nftables"
            else None
        )  # MET-16
        self._queued = gauge(
            "sync_proxy_rules_last_queued_timestamp_seconds", "When a sync was last asked for", _FAMILY
        )
        self._no_local = gauge(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with policy Local and endpoints, none of them on this node",
            ("ip_family", "traffic_policy"),
        )  # MET-19
        self._reconciling = histogram(
            "conntrack_reconciler_sync_duration_seconds", "Seconds that a search for stale flows took"
        )  # MET-24
        self._stale_deleted = counter(
            "conntrack_reconciler_deleted_entries", "Stale flows that were deleted", _FAMILY
        )  # MET-25
        self._healthz = counter("proxy_healthz", "Answers to /healthz by status", ("code",))  # MET-20
        self._livez = counter("proxy_livez", "Answers to /livez by status", ("code",))  # MET-21
        self._operations = Counter(
            "sluice_kernel_operations", "Kernel objects added or deleted", _FAMILY, registry=registry
        )
        self._failures = Counter("sluice_sync_failures", "Syncs that failed, in any mode", _FAMILY, registry=registry)
        self._refused = Gauge("sluice_refused_routes", "Routes that the kernel refused", _FAMILY, registry=registry)
        self._routes = Gauge("sluice_routes", "Frontends that are programmed", _FAMILY, registry=registry)
        self._drift_repairs = Counter(
            "sluice_drift_repairs",
            "Times that the kernel held something else than was written, and was repaired",
            _FAMILY,
            registry=registry,
        )
        self._drift = Gauge(
            "sluice_drift", "Differences that were found and left, under driftPolicy report", _FAMILY, registry=registry
        )
        self._troubles = Gauge("sluice_troubles", "Objects and files that are wrong now", registry=registry)
        Gauge("sluice_info", "Version and dataplane", ("version", "dataplane"), registry=registry).labels(
            version, mode
        ).set(1)
        ProcessCollector(registry=registry)

    # --- what the sync loop tells ---

    def queued(self, family: Family) -> None:
        """A sync was asked for, or the loop started (MET-18)."""
        self._queued.labels(family.label).set(self._clock())

    def sync_done(self, family: Family, seconds: float, applied: Applied) -> None:
        """A sync succeeded (MET-1 to MET-4)."""
        self._took(family, seconds, full=applied.full)
        self._last.labels(family.label).set(self._clock())
        self._operations.labels(family.label).inc(applied.operations)
        self._refused.labels(family.label).set(len(applied.refused))

    def sync_failed(self, family: Family, seconds: float, *, full: bool = True) -> None:
        """A sync failed (MET-16)."""
        self._took(family, seconds, full=full)
        self._failures.labels(family.label).inc()
        if self._mode_failures is not None:
            self._mode_failures.labels(family.label).inc()

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

    def endpoint_changes(self, total: int, pending: int) -> None:
        """Changes of endpoints: all that were seen so far, and those not synced yet (MET-6, MET-7)."""
        self._endpoint_total.inc(max(0, total - self._endpoints_seen))
        self._endpoints_seen = total
        self._endpoint_pending.set(pending)

    def service_changes(self, total: int, pending: int) -> None:
        """The same for Services (MET-8, MET-9)."""
        self._service_total.inc(max(0, total - self._services_seen))
        self._services_seen = total
        self._service_pending.set(pending)

    def no_local(self, family: Family, internal: int, external: int) -> None:
        """Service ports whose policy Local admits no endpoint here (MET-19)."""
        self._no_local.labels(family.label, "internal").set(internal)
        self._no_local.labels(family.label, "external").set(external)

    def routes(self, family: Family, count: int) -> None:
        """How many frontends are programmed."""
        self._routes.labels(family.label).set(count)

    def troubles(self, count: int) -> None:
        """How many objects and files are wrong now."""
        self._troubles.set(count)

    # --- what the servers tell ---

    def healthz_answered(self, status: int) -> None:
        self._healthz.labels(str(status)).inc()

    def livez_answered(self, status: int) -> None:
        self._livez.labels(str(status)).inc()

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
