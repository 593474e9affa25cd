"""Every field of the configuration: its default, how it is read, what zero and null mean (CFG-11, CFG-12)."""

from __future__ import annotations

import pytest
import yaml

from proxy.config.load import load
from proxy.config.schema import (
    BY_PATH,
    FIELDS,
    GROUP_VERSION,
    KIND,
    OWN_FIELDS,
    OWN_GROUP_VERSION,
    OWN_KIND,
    SECOND,
)
from proxy.config.values import Type, render

HEAD = f"apiVersion: {GROUP_VERSION}\nkind: {KIND}\n"
OWN_HEAD = f"apiVersion: {OWN_GROUP_VERSION}\nkind: {OWN_KIND}\n"


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file, and gives its path."""

    def write(text, head=HEAD):
        path = tmp_path / "config.yaml"
        path.write_text(head + text)
        return str(path)

    return write


KUBE_PROXY_DEFAULTS = {
    "featureGates": {},
    "clientConnection.kubeconfig": "",
    "clientConnection.acceptContentTypes": "",
    "clientConnection.contentType": "application/vnd.kubernetes.protobuf",
    "clientConnection.qps": 5,
    "clientConnection.burst": 10,
    "logging.format": "text",
    "logging.flushFrequency": "5s",
    "logging.verbosity": 0,
    "logging.vmodule": [],
    "logging.options.text.splitStream": False,
    "logging.options.text.infoBufferSize": "0",
    "logging.options.json.splitStream": False,
    "logging.options.json.infoBufferSize": "0",
    "hostnameOverride": "",
    "bindAddress": "0.0.0.0",
    "healthzBindAddress": "0.0.0.0:10256",
    "metricsBindAddress": "127.0.0.1:10249",
    "bindAddressHardFail": False,
    "enableProfiling": False,
    "showHiddenMetricsForVersion": "",
    "mode": "",
    "iptables.masqueradeBit": 14,
    "iptables.masqueradeAll": False,
    "iptables.localhostNodePorts": True,
    "iptables.syncPeriod": "30s",
    "iptables.minSyncPeriod": "1s",
    "ipvs.syncPeriod": "30s",
    "ipvs.minSyncPeriod": "0s",
    "ipvs.scheduler": "",
    "ipvs.excludeCIDRs": None,
    "ipvs.strictARP": False,
    "ipvs.tcpTimeout": "0s",
    "ipvs.tcpFinTimeout": "0s",
    "ipvs.udpTimeout": "0s",
    "nftables.masqueradeBit": 14,
    "nftables.masqueradeAll": False,
    "nftables.syncPeriod": "30s",
    "nftables.minSyncPeriod": "1s",
    "winkernel.networkName": "",
    "winkernel.sourceVip": "",
    "winkernel.enableDSR": False,
    "winkernel.rootHnsEndpointName": "",
    "winkernel.forwardHealthCheckVip": False,
    "detectLocalMode": "ClusterCIDR",
    "detectLocal.bridgeInterface": "",
    "detectLocal.interfaceNamePrefix": "",
    "clusterCIDR": "",
    "nodePortAddresses": None,
    "oomScoreAdj": -999,
    "conntrack.maxPerCore": 32768,
    "conntrack.min": 131072,
    "conntrack.tcpEstablishedTimeout": "24h0m0s",
    "conntrack.tcpCloseWaitTimeout": "1h0m0s",
    "conntrack.tcpBeLiberal": False,
    "conntrack.udpTimeout": "0s",
    "conntrack.udpStreamTimeout": "0s",
    "configSyncPeriod": "15m0s",
    "portRange": "",
    "windowsRunAsService": False,
}


def test_cfg_11_every_field_has_kube_proxys_default(file):
    assert {field.path: render(field.type, field.default) for field in FIELDS} == KUBE_PROXY_DEFAULTS
    values = load([("config", file(""))]).merged.values
    assert {field.path: render(field.type, values[field.path]) for field in FIELDS} == KUBE_PROXY_DEFAULTS


# Of each field a value that is not its default, and valid.
SAID = {
    "featureGates": {"AllowServiceExternalIPs": False},
    "clientConnection.qps": 2.5,
    "logging.format": "json",
    "logging.flushFrequency": "7s",
    "logging.vmodule": [],
    "bindAddress": "192.0.2.1",
    "healthzBindAddress": "192.0.2.1:1",
    "metricsBindAddress": "192.0.2.1:2",
    "showHiddenMetricsForVersion": "1.35",
    "mode": "ipvs",
    "ipvs.excludeCIDRs": ["192.0.2.0/24"],
    "detectLocalMode": "NodeCIDR",
    "clusterCIDR": "192.0.2.0/24",
    "nodePortAddresses": ["192.0.2.0/24"],
    "serviceCIDRs": ["192.0.2.0/24"],
    "driftPolicy": "report",
    "iptablesBackend": "legacy",
    "runDirectory": "/run/other",
}
OTHERWISE = {Type.STRING: "x", Type.INT: 3, Type.DURATION: "11s", Type.QUANTITY: "0"}


@pytest.mark.parametrize("path", [field.path for field in (*FIELDS, *OWN_FIELDS)])
def test_cfg_11_every_field_is_taken_from_the_file_with_its_line(path, file):
    field = BY_PATH[path]
    value = SAID.get(path, not field.default if field.type is Type.BOOL else OTHERWISE.get(field.type))
    document = value
    for name in reversed(path.split(".")):
        document = {name: document}
    if path.startswith("logging.options."):
        document["featureGates"] = {"LoggingAlphaOptions": True}
    head = HEAD if field in FIELDS else OWN_HEAD
    merged = load([("config", file(yaml.safe_dump(document), head=head))]).merged
    assert render(field.type, merged.values[path]) == value
    assert merged.origins[path].kind == "file"
    assert merged.said(path).endswith(f": {path}")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("iptables: {syncPeriod: 0s}", "iptables.syncPeriod", 30 * SECOND),
        ("iptables: {minSyncPeriod: 0s}", "iptables.minSyncPeriod", SECOND),
        ("nftables: {syncPeriod: 0s}", "nftables.syncPeriod", 30 * SECOND),
        ("nftables: {minSyncPeriod: 0s}", "nftables.minSyncPeriod", SECOND),
        ("ipvs: {syncPeriod: 0s}", "ipvs.syncPeriod", 30 * SECOND),
        ("configSyncPeriod: 0s", "configSyncPeriod", 900 * SECOND),
        ("clientConnection: {qps: 0}", "clientConnection.qps", 5.0),
        ("clientConnection: {burst: 0}", "clientConnection.burst", 10),
        ("clientConnection: {contentType: ''}", "clientConnection.contentType", "application/vnd.kubernetes.protobuf"),
        ("logging: {flushFrequency: 0}", "logging.flushFrequency", 5 * SECOND),
        ("bindAddress: ''", "bindAddress", "0.0.0.0"),
        ("healthzBindAddress: ''", "healthzBindAddress", "0.0.0.0:10256"),
        ("metricsBindAddress: ''", "metricsBindAddress", "127.0.0.1:10249"),
        # what keeps its zero
        ("conntrack: {maxPerCore: 0}", "conntrack.maxPerCore", 0),
        ("conntrack: {min: 0}", "conntrack.min", 0),
        ("conntrack: {tcpEstablishedTimeout: 0s}", "conntrack.tcpEstablishedTimeout", 0),
        ("conntrack: {tcpCloseWaitTimeout: 0s}", "conntrack.tcpCloseWaitTimeout", 0),
        ("oomScoreAdj: 0", "oomScoreAdj", 0),
        ("iptables: {localhostNodePorts: false}", "iptables.localhostNodePorts", False),
    ],
)
def test_cfg_12_what_zero_means(file, text, path, value):
    assert load([("config", file(text))]).merged.values[path] == value


def test_null_means_the_default_for_every_field(file):
    for field in FIELDS:
        text = "null"
        for name in reversed(field.path.split(".")):
            text = f"{{{name}: {text}}}"
        loaded = load([("config", file(f"{text[1:-1]}"))])
        assert (loaded.merged.values[field.path], loaded.warnings) == (field.default, ())


def test_logs_may_be_flushed_every_so_many_nanoseconds(file):
    merged = load([("config", file("logging: {flushFrequency: 5000000000}"))]).merged
    assert merged.values["logging.flushFrequency"] == 5 * SECOND
