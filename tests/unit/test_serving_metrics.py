"""Metrics: kube-proxy's names, labels and buckets (MET-*)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from proxy.serving.health import ProxyHealth
from proxy.serving.metrics import Metrics
from proxy.serving.observer import Observer
from proxy.state import Statistics
from rules.dataplane import Applied
from rules.forwarding import Family

DATA = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
RECORDED = (DATA / "nftables.metrics.txt").read_text()
MODES = ("nftables", "iptables")
V4, V6 = Family.IPV4, Family.IPV6


def types(text):
    return dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE kubeproxy_"))


def samples(metrics):
    lines = metrics.exposition().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


@pytest.fixture
def metrics():
    return Metrics("nftables", "1.2.3", clock=lambda: 1000.5)


@pytest.mark.parametrize("mode", MODES)
def test_names_and_types_are_those_of_kube_proxy(mode):
    ours = types(Metrics(mode, "1").exposition().decode())
    theirs = types((DATA / f"{mode}.metrics.txt").read_text())
    assert len(theirs) > 10
    assert theirs.items() <= ours.items()


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_those_of_kube_proxy(mode):
    metrics = Metrics(mode, "1")
    for family in Family:
        metrics.started(family)
        metrics.sync_done(family, 0.1, Applied(full=True, rules=dict.fromkeys(("filter", "nat"), 3)))
        metrics.sync_done(family, 0.1, Applied())
        metrics.reconciled(family, 0.1, 1)
        metrics.no_local(family, 1, 1)
    theirs = series((DATA / f"{mode}.metrics.txt").read_text())
    assert theirs
    assert theirs <= series(metrics.exposition().decode())


@pytest.mark.parametrize("mode", [*MODES, "ipvs", "userspace"])
def test_a_parser_of_the_text_format_reads_all_of_it_and_histograms_add_up(mode):
    metrics = Metrics(mode, "1")
    for family in Family:
        metrics.started(family)
        metrics.sync_done(family, 0.1, Applied(full=True))
        metrics.programming_latency(family, 1000.0)
    hostile = 'a"b\\c\nd'
    metrics.api_answered(hostile, "GET", 200, 0.5)
    parsed = {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}
    assert {family.type for family in parsed.values()} <= {"gauge", "counter", "histogram"}
    assert all(family.documentation for family in parsed.values())
    assert {sample.labels["host"] for sample in parsed["rest_client_requests"].samples} == {hostile}
    histograms = [family for family in parsed.values() if family.type == "histogram"]
    assert len(histograms) > 3
    for family in histograms:
        found: dict[frozenset[tuple[str, str]], list[float]] = {}
        counts: dict[frozenset[tuple[str, str]], float] = {}
        for sample in family.samples:
            labels = frozenset((name, value) for name, value in sample.labels.items() if name != "le")
            if sample.name.endswith("_bucket"):
                found.setdefault(labels, []).append(sample.value)
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        assert found.keys() == counts.keys()
        for labels, buckets in found.items():
            assert buckets == sorted(buckets)
            assert buckets[-1] == counts[labels]


def test_met_10_11_packets_are_counted_in_iptables_mode_alone():
    metrics = Metrics("iptables", "1")
    metrics.packets(3, 1)
    metrics.packets(0, 2)
    found = samples(metrics)
    assert found["kubeproxy_iptables_ct_state_invalid_dropped_packets_total"] == 3
    assert found["kubeproxy_iptables_localhost_nodeports_accepted_packets_total"] == 3
    assert not [name for name in samples(Metrics("nftables", "1")) if name.startswith("kubeproxy_iptables")]


def series(text):
    """Every series of kube-proxy's, its labels in order and numbers in one form."""
    found = set()
    for name, labels in re.findall(r"^(kubeproxy_\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        pairs = sorted(re.findall(r'(\w+)="([^"]*)"', labels))
        shown = [f"{key}={float(value) if key == 'le' else value}" for key, value in pairs]
        found.add(f"{name}{{{','.join(shown)}}}")
    return found


def test_met_1_buckets_are_those_of_kube_proxy(metrics):
    metrics.sync_done(V4, 0.01, Applied(full=True))
    name = "kubeproxy_sync_full_proxy_rules_duration_seconds_bucket"
    pattern = re.compile(rf'^{name}\{{ip_family="IPv4",le="([^"]*)"\}}', re.MULTILINE)
    ours, theirs = (pattern.findall(text) for text in (metrics.exposition().decode(), RECORDED))
    assert ours == theirs
    assert len(ours) == 16


def test_met_5_buckets(metrics):
    metrics.programming_latency(V4, 2.5)
    metrics.programming_latency(V4, -1)  # clocks differ
    bounds = re.findall(
        r'network_programming_duration_seconds_bucket\{ip_family="IPv4",le="([^"]*)"', metrics.exposition().decode()
    )
    numbers = list(map(float, bounds))
    assert numbers[:4] == [0.25, 0.5, 1.0, 2.0]
    assert numbers[60:63] == [59.0, 60.0, 65.0]
    assert numbers[-8:] == [120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0, float("inf")]
    assert samples(metrics)['kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv4"}'] == 2.5


def test_met_1_to_4_a_full_and_a_partial_sync(metrics):
    metrics.sync_done(V4, 0.5, Applied(full=True, operations=7, refused=frozenset(["a/b:c"])))
    metrics.sync_done(V4, 0.25, Applied(operations=3))
    found = samples(metrics)
    assert found['kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv4"}'] == 0.75
    assert found['kubeproxy_sync_full_proxy_rules_duration_seconds_sum{ip_family="IPv4"}'] == 0.5
    assert found['kubeproxy_sync_partial_proxy_rules_duration_seconds_sum{ip_family="IPv4"}'] == 0.25
    assert found['kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}'] == 1000.5
    assert found['sluice_kernel_operations_total{ip_family="IPv4"}'] == 10
    assert found['sluice_refused_routes{ip_family="IPv4"}'] == 1
    assert not any("IPv6" in name for name in found)


def test_routes_that_the_kernel_refused_are_told_until_a_whole_sync_finds_that_it_takes_them(metrics):
    def refused():
        return samples(metrics)['sluice_refused_routes{ip_family="IPv4"}']

    metrics.sync_done(V4, 0.1, Applied(full=True, refused=frozenset(["a/b:c"])))
    metrics.sync_done(V4, 0.1, Applied(operations=1))  # of other Services
    metrics.sync_done(V4, 0.0, Applied())
    assert refused() == 1
    metrics.sync_done(V4, 0.1, Applied(full=True))
    assert refused() == 0


def test_met_16_failures_are_counted_and_are_no_success(metrics):
    metrics.sync_failed(V6, 0.5)
    found = samples(metrics)
    assert found['kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv6"}'] == 1
    assert found['sluice_sync_failures_total{ip_family="IPv6"}'] == 1
    assert 'kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv6"}' not in found


def test_met_33_what_a_mode_does_not_have_is_absent():
    names = types(Metrics("ipvs", "1").exposition().decode())
    assert "kubeproxy_sync_proxy_rules_duration_seconds" in names
    assert "kubeproxy_sync_full_proxy_rules_duration_seconds" not in names
    assert "kubeproxy_sync_proxy_rules_nftables_sync_failures_total" not in names


def test_met_24_and_25_stale_flows(metrics):
    metrics.reconciled(V4, 0.25, 3)
    metrics.reconciled(V4, 0.5, 0)
    found = samples(metrics)
    assert found['kubeproxy_conntrack_reconciler_sync_duration_seconds_sum{ip_family="IPv4"}'] == 0.75
    assert found['kubeproxy_conntrack_reconciler_sync_duration_seconds_bucket{ip_family="IPv4",le="0.256"}'] == 1
    assert found['kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv4"}'] == 3


def test_met_6_to_9_changes_are_asked_for_at_every_scrape(metrics):
    for total, pending in ((3, 2), (3, 0), (10, 1)):
        known = Statistics(
            services=4,
            slices=5,
            service_changes_total=total,
            service_changes_pending=pending,
            endpoint_changes_total=2 * total,
            endpoint_changes_pending=pending + 1,
            troubles=6,
        )
        metrics.follow(lambda known=known: known)
        found = samples(metrics)
        assert found["kubeproxy_sync_proxy_rules_service_changes_total"] == total
        assert found["kubeproxy_sync_proxy_rules_service_changes_pending"] == pending
        assert found["kubeproxy_sync_proxy_rules_endpoint_changes_total"] == 2 * total
        assert found["kubeproxy_sync_proxy_rules_endpoint_changes_pending"] == pending + 1
    assert (found["sluice_services"], found["sluice_endpoint_slices"], found["sluice_troubles"]) == (4, 5, 6)


def test_met_12_to_15_restores_and_rules_of_iptables():
    metrics = Metrics("iptables", "1")
    metrics.started(V4)
    name = 'kubeproxy_sync_proxy_rules_iptables_%s{ip_family="IPv4"%s}'
    failures = [name % (each, "") for each in ("restore_failures_total", "partial_restore_failures_total")]
    assert [samples(metrics)[each] for each in failures] == [0, 0]
    applied = Applied(
        rules={"nat": 70, "filter": 20}, rules_written={"nat": 7}, failed_restores=2, failed_partial_restores=1
    )
    metrics.sync_done(V4, 0.1, applied)
    metrics.sync_done(V4, 0.1, Applied())  # nothing was written: what the last one said holds
    metrics.sync_failed(V4, 0.1)
    found = samples(metrics)
    assert [found[each] for each in failures] == [3, 1]
    assert [found[name % ("total", f',table="{table}"')] for table in ("nat", "filter")] == [70, 20]
    assert [found[name % ("last", f',table="{table}"')] for table in ("nat", "filter")] == [7, 0]


def test_met_17_what_another_mode_has_left_cannot_be_removed(metrics):
    metrics.started(V4)
    metrics.cleanup_failed(V4)
    assert samples(metrics)['kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family="IPv4"}'] == 1


def test_met_20_and_21_answers_by_status(metrics):
    for status in (200, 200, 503):
        metrics.healthz_answered(status)
        metrics.livez_answered(200)
    found = samples(metrics)
    assert found['kubeproxy_proxy_healthz_total{code="200"}'] == 2
    assert found['kubeproxy_proxy_healthz_total{code="503"}'] == 1
    assert found['kubeproxy_proxy_livez_total{code="200"}'] == 3


def test_met_31_requests_to_the_api_server(metrics):
    metrics.api_answered("h:1", "GET", 200, None)
    metrics.api_answered("h:1", "POST", 201, 0.5)
    metrics.api_answered("h:1", "GET", None, 1.0)
    found = samples(metrics)
    assert found['rest_client_requests_total{code="200",host="h:1",method="GET"}'] == 1
    assert found['rest_client_requests_total{code="<error>",host="h:1",method="GET"}'] == 1
    assert found['rest_client_request_duration_seconds_sum{host="h:1",verb="POST"}'] == 0.5
    assert found['rest_client_request_duration_seconds_count{host="h:1",verb="GET"}'] == 1


def test_collectors_of_others_are_asked_too(metrics):
    class Others:
        def collect(self):
            yield GaugeMetricFamily("sluice_userspace_flows", "Flows", value=3)

    metrics.register(Others())
    assert samples(metrics)["sluice_userspace_flows"] == 3


def test_met_19_no_local_endpoints_by_policy(metrics):
    metrics.no_local(V4, 1, 2)
    found = samples(metrics)
    name = 'kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="%s"}'
    assert (found[name % "internal"], found[name % "external"]) == (1, 2)


def test_no_created_series_double_the_others(metrics):
    metrics.sync_done(V4, 0.5, Applied())
    assert "_created" not in metrics.exposition().decode()


def test_two_agents_of_one_process_share_nothing():
    first, second = Metrics("nftables", "1"), Metrics("nftables", "1")
    first.healthz_answered(200)
    assert 'kubeproxy_proxy_healthz_total{code="200"}' not in samples(second)


def test_syn_2_and_9_the_observer_tells_health_and_metrics(metrics):
    """MET-18: the moment of the last request, and before any that of the start."""
    now = 0.0
    health = ProxyHealth(10.0, now=lambda: 0, monotonic=lambda: now)
    observer = Observer(health, metrics)
    observer.started(V4)
    assert samples(metrics)['kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"}'] == 1000.5
    observer.queued(V4)
    observer.failed(V4, 0.1)
    now = 11.0
    assert not health.healthy(V4)
    observer.succeeded(V4, 0.1, Applied())
    assert health.healthy(V4)


def test_repairs_of_drift_are_counted_and_what_is_left_is_shown():
    metrics = Metrics("nftables", "1.0")
    for differences, repaired in ((3, True), (0, True), (1, True)):
        metrics.drifted(Family.IPV4, differences, repaired=repaired)
    metrics.drifted(Family.IPV6, 2, repaired=False)
    text = metrics.exposition().decode()
    assert 'sluice_drift_repairs_total{ip_family="IPv4"} 2.0' in text
    assert 'sluice_drift_repairs_total{ip_family="IPv6"} 0.0' in text
    assert 'sluice_drift{ip_family="IPv6"} 2.0' in text
