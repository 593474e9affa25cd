"""Flags: each of kube-proxy 1.36, and Go's ways to spell them (CFG-1, CFG-2)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import cli
from proxy.config import flags
from proxy.config.errors import ConfigError
from proxy.config.load import load
from proxy.config.schema import SECOND
from proxy.config.values import Type

# Flag: text, the field that it sets, what to.
FIELDS = {
    "feature-gates": ("AllAlpha=true,AllBeta=false", "featureGates", {"AllAlpha": True, "AllBeta": False}),
    "kubeconfig": ("/k", "clientConnection.kubeconfig", "/k"),
    "kube-api-content-type": ("application/json", "clientConnection.contentType", "application/json"),
    "kube-api-qps": ("2.5", "clientConnection.qps", 2.5),
    "kube-api-burst": ("7", "clientConnection.burst", 7),
    "hostname-override": (" Node-A ", "hostnameOverride", "node-a"),
    "bind-address": ("192.0.2.1", "bindAddress", "192.0.2.1"),
    "healthz-bind-address": ("192.0.2.1", "healthzBindAddress", "192.0.2.1:10256"),
    "metrics-bind-address": ("fd00::1", "metricsBindAddress", "[fd00::1]:10249"),
    "bind-address-hard-fail": ("T", "bindAddressHardFail", True),
    "profiling": ("true", "enableProfiling", True),
    "show-hidden-metrics-for-version": ("1.35", "showHiddenMetricsForVersion", "1.35"),
    "proxy-mode": ("nftables", "mode", "nftables"),
    "iptables-masquerade-bit": ("0x1f", "iptables.masqueradeBit", 31),
    "masquerade-all": ("1", "iptables.masqueradeAll", True),
    "iptables-localhost-nodeports": ("false", "iptables.localhostNodePorts", False),
    "iptables-sync-period": ("1h2m3.5s", "iptables.syncPeriod", 3_723 * SECOND + SECOND // 2),
    "iptables-min-sync-period": ("0", "iptables.minSyncPeriod", 0),
    "ipvs-sync-period": ("5s", "ipvs.syncPeriod", 5 * SECOND),
    "ipvs-min-sync-period": ("5ms", "ipvs.minSyncPeriod", SECOND // 200),
    "ipvs-scheduler": ("lc", "ipvs.scheduler", "lc"),
    "ipvs-exclude-cidrs": ("192.0.2.0/24,fd00::/8", "ipvs.excludeCIDRs", ("192.0.2.0/24", "fd00::/8")),
    "ipvs-strict-arp": ("true", "ipvs.strictARP", True),
    "ipvs-tcp-timeout": ("1m", "ipvs.tcpTimeout", 60 * SECOND),
    "ipvs-tcpfin-timeout": ("1m", "ipvs.tcpFinTimeout", 60 * SECOND),
    "ipvs-udp-timeout": ("1m", "ipvs.udpTimeout", 60 * SECOND),
    "detect-local-mode": ("NodeCIDR", "detectLocalMode", "NodeCIDR"),
    "pod-bridge-interface": ("br0", "detectLocal.bridgeInterface", "br0"),
    "pod-interface-name-prefix": ("veth", "detectLocal.interfaceNamePrefix", "veth"),
    "cluster-cidr": ("192.0.2.0/24", "clusterCIDR", "192.0.2.0/24"),
    "nodeport-addresses": ("192.0.2.0/24", "nodePortAddresses", ("192.0.2.0/24",)),
    "oom-score-adj": ("-7", "oomScoreAdj", -7),
    "conntrack-max-per-core": ("0", "conntrack.maxPerCore", 0),
    "conntrack-min": ("0", "conntrack.min", 0),
    "conntrack-tcp-timeout-established": ("0s", "conntrack.tcpEstablishedTimeout", 0),
    "conntrack-tcp-timeout-close-wait": ("0", "conntrack.tcpCloseWaitTimeout", 0),
    "conntrack-tcp-be-liberal": ("true", "conntrack.tcpBeLiberal", True),
    "conntrack-udp-timeout": ("1s", "conntrack.udpTimeout", SECOND),
    "conntrack-udp-timeout-stream": ("1s", "conntrack.udpStreamTimeout", SECOND),
    "config-sync-period": ("1m", "configSyncPeriod", 60 * SECOND),
    "healthz-port": ("7", "healthzBindAddress", "0.0.0.0:7"),
    "metrics-port": ("7", "metricsBindAddress", "127.0.0.1:7"),
    "v": ("4", "logging.verbosity", 4),
    "vmodule": ("a=1,b=2", "logging.vmodule", (("a", 1), ("b", 2))),
    "logging-format": ("json", "logging.format", "json"),
    "log-flush-frequency": ("9s", "logging.flushFrequency", 9 * SECOND),
    "log-text-split-stream": ("true", "logging.options.text.splitStream", True),
    "log-text-info-buffer-size": ("64Ki", "logging.options.text.infoBufferSize", "64Ki"),
    "log-json-split-stream": ("true", "logging.options.json.splitStream", True),
    "log-json-info-buffer-size": ("1M", "logging.options.json.infoBufferSize", "1M"),
}
ACTIONS = {"config", "write-config-to", "cleanup", "init-only", "master", "version", "boot-id-file", "machine-id-file"}


def test_cfg_2_every_flag_of_kube_proxy_is_there_and_no_other():
    assert {flag.name for flag in flags.FLAGS if not flag.own} == FIELDS.keys() | ACTIONS


@pytest.mark.parametrize("name", FIELDS)
def test_cfg_2_every_flag_sets_its_field(name):
    text, path, value = FIELDS[name]
    gates = [("feature-gates", "LoggingAlphaOptions=true")] if path.startswith("logging.options.") else []
    merged = load([(name, text), *gates]).merged
    assert merged.values[path] == value
    assert (merged.origins[path].kind, merged.origins[path].where) == ("flag", f"--{name}")


@pytest.mark.parametrize("spelling", ["--{name}={text}", "--{name} {text}", "--{under}={text}", "--{under} {text}"])
@pytest.mark.parametrize("name", FIELDS)
def test_cfg_1_2_the_command_line_takes_every_flag_in_every_spelling(name, spelling, capsys):
    text, path, _ = FIELDS[name]
    if flags.BY_NAME[name].type is Type.BOOL:
        spelling = spelling.replace(" {text}", "")  # a switch takes no next word: it would be an argument
        text = "true" if "=" not in spelling else text
    gates = ["--feature-gates=LoggingAlphaOptions=true"] if path.startswith("logging.options.") else []
    words = [word.format(name=name, under=name.replace("-", "_"), text=text) for word in spelling.split(" ")]
    assert cli.main(["config", "-o", "json", *words, *gates], name="sluice") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["origins"][path] == {"kind": "flag", "where": f"--{name}"}


@pytest.mark.parametrize("name", ["master", "boot-id-file", "machine-id-file"])
def test_cfg_2_flags_that_set_no_field_are_taken(name):
    assert load([(name, "x")]).warnings == ()


@pytest.mark.parametrize("name", ["healthz-port", "metrics-port"])
def test_his_8_deprecated_flags_work_and_name_their_successor(name):
    successor = name.replace("port", "bind-address")
    assert load([(name, "7")]).warnings == (f"--{name} is deprecated: use --{successor}",)


@pytest.mark.parametrize("name", [name for name in FIELDS if not flags.BY_NAME[name].with_config])
def test_cfg_1_flags_beside_a_file_are_ignored_but_for_a_few(name, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n")
    loaded = load([("config", str(path)), (name, FIELDS[name][0])])
    assert loaded.settings == load([("config", str(path))]).settings
    assert loaded.warnings == (f"--{name} has no effect together with --config; set it in {path}",)


def test_cfg_1_those_few():
    kept = {name for name in FIELDS if flags.BY_NAME[name].with_config}
    logging = {"v", "vmodule", "logging-format", "log-flush-frequency"}
    logging |= {f"log-{form}-{what}" for form in ("text", "json") for what in ("split-stream", "info-buffer-size")}
    assert kept == logging | {"hostname-override"}
    assert all(flags.BY_NAME[name].with_config for name in ACTIONS)


def test_cfg_2_an_empty_hostname_override_leaves_the_name_of_the_file(tmp_path):
    """As where $(NODE_NAME) comes to nothing."""
    path = tmp_path / "c.yaml"
    path.write_text("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nhostnameOverride: a\n")
    found = load([("config", str(path)), ("hostname-override", "")])
    assert (found.settings.hostname_override, found.merged.origins["hostnameOverride"].kind) == ("a", "file")


def test_cfg_2_lists_add_up_and_other_flags_take_the_last():
    found = load(
        [
            ("nodeport-addresses", "10.0.0.0/8"),
            ("nodeport-addresses", "fd00::/8,192.168.0.0/16"),
            ("v", "1"),
            ("v", "2"),
        ]
    )
    assert found.settings.node_port_addresses == ("10.0.0.0/8", "fd00::/8", "192.168.0.0/16")
    assert found.settings.verbosity == 2


def test_cfg_2_items_of_lists_may_be_quoted():
    found = load([("nodeport-addresses", '"10.0.0.0/8",192.168.0.0/16')]).settings
    assert found.node_port_addresses == ("10.0.0.0/8", "192.168.0.0/16")
    with pytest.raises(ConfigError, match="is not a list with commas"):
        load([("nodeport-addresses", '"10.0.0.0/8')])


# --- spellings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "normal"),
    [
        (["--config", "x"], ["--config=x"]),
        (["--config=x=y"], ["--config=x=y"]),
        (["--hostname_override=a"], ["--hostname-override=a"]),
        (["--masquerade-all", "--v", "2"], ["--masquerade-all=true", "--v=2"]),
        (["--masquerade-all=false"], ["--masquerade-all=false"]),
        (["-v=4"], ["--v=4"]),
        (["-v4"], ["--v=4"]),
        (["-v", "4"], ["--v=4"]),
        (["--version"], ["--version=true"]),
        (["--version=raw"], ["--version=raw"]),
        (["--config="], ["--config="]),
        (["--help", "pos", "-x"], ["--help", "pos", "-x"]),
        (["-config", "x"], ["-config", "x"]),
        (["--", "--config"], ["--", "--config"]),
        (["--manifests", "--config"], ["--manifests=--config"]),
    ],
)
def test_cfg_1_gos_spellings_become_one(arguments, normal):
    assert flags.normalise(arguments) == normal


def test_cfg_1_a_flag_without_its_value_is_named():
    with pytest.raises(ConfigError, match="--config: needs a value"):
        flags.normalise(["--config"])


@given(st.lists(st.text(max_size=12) | st.sampled_from([f"--{name}" for name in flags.BY_NAME]), max_size=6))
def test_normalising_twice_changes_nothing(arguments):
    try:
        once = flags.normalise(arguments)
    except ConfigError:
        return
    assert flags.normalise(once) == once
