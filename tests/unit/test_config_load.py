"""Configuration: files, flags, and what holds when both are given (CFG-*)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from msgspec import structs

from proxy.config.document import parse
from proxy.config.errors import ConfigError
from proxy.config.load import load
from proxy.config.schema import FIELDS, GROUP_VERSION, KIND, OWN_GROUP_VERSION, OWN_KIND, SECOND
from proxy.config.settings import ConntrackLimits, HostPort, Settings, UserspaceLimits
from proxy.config.values import Type
from rules.forwarding import Family, parse_prefix

HEAD = f"apiVersion: {GROUP_VERSION}\nkind: {KIND}\n"
OWN_HEAD = f"apiVersion: {OWN_GROUP_VERSION}\nkind: {OWN_KIND}\n"
DATA = Path(__file__).parents[1] / "data"
RECORDED = DATA / "kube-proxy-v1.36.2"


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file, and gives its path."""

    def write(text, head=HEAD):
        path = tmp_path / "config.yaml"
        path.write_text(head + text)
        return str(path)

    return write


def settings_of(path, *more):
    return load([("config", path), *more]).settings


# --- defaults and whole files ----------------------------------------------------------------------------------


def test_cfg_11_without_file_and_flags_the_defaults_hold():
    settings, warnings, _ = load([])
    assert not warnings
    # Also the defaults that tests and the demo start from.
    assert settings == Settings(configz=settings.configz)


KUBEADM = Settings(
    kubeconfig="/var/lib/kube-proxy/kubeconfig.conf",
    cluster_cidrs=(parse_prefix("10.244.0.0/16"),),
)
CONFIG_MAPS = {
    "kubeadm": KUBEADM,
    "kind": structs.replace(KUBEADM, mode="iptables", conntrack=ConntrackLimits(max_per_core=0)),
    "kind-rootless-ipv6": structs.replace(
        KUBEADM,
        mode="nftables",
        cluster_cidrs=(parse_prefix("fd00:10:244::/56"),),
        bind_address="::",
        healthz_bind_address=HostPort("::", 10256),
        metrics_bind_address=HostPort("::1", 10249),
        node_port_addresses=("primary",),
        conntrack=ConntrackLimits(max_per_core=0, tcp_established_timeout=0.0, tcp_close_wait_timeout=0.0),
    ),
}


@pytest.mark.parametrize("name", CONFIG_MAPS)
def test_cfg_11_configmaps_of_kubeadm_and_kind_load_without_a_word(name, file):
    config_map = yaml.safe_load((DATA / "configmaps" / f"{name}.yaml").read_text())
    path = file(config_map["data"]["config.conf"], head="")
    settings, warnings, _ = load([("config", path)])
    assert warnings == ()
    assert structs.replace(settings, configz={}, feature_gates={}, config="") == CONFIG_MAPS[name]


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_http_1_configz_is_what_kube_proxy_answered_to_the_same_file(mode, file):
    text = (RECORDED / "config.yaml").read_text().replace("<the mode in the file's name>", mode)
    text += "clientConnection: {kubeconfig: /var/lib/kube-proxy/kubeconfig}\n"  # what the recording was started with
    recorded = (RECORDED / f"{mode}.configz.json").read_text()
    configz = load([("config", file(text, head=""))]).settings.configz
    assert json.dumps({"kubeproxy.config.k8s.io": configz}, separators=(",", ":")) == recorded


def test_cfg_10_json_with_tabs_is_read_too(file):
    text = json.dumps({"apiVersion": GROUP_VERSION, "kind": KIND, "mode": "nftables"}, indent="\t")
    assert settings_of(file(text, head="")).mode == "nftables"


@pytest.mark.parametrize(
    ("text", "value"), [("5.0", 5), ("1e1", 10), ("3.", 3), ("+5", 5), ("0x1F", 31), ("017", 15), ("1_0", 10)]
)
def test_cfg_10_whole_numbers_are_written_in_any_way_of_yaml(text, value, file):
    assert settings_of(file(f"iptables: {{masqueradeBit: {text}}}")).masquerade_bit == value


def test_cfg_10_a_large_number_as_helm_writes_it(file):
    """A template's number is a float, and a large one has an exponent."""
    assert settings_of(file("conntrack: {min: 1.048576e+06}")).conntrack.minimum == 1_048_576


@pytest.mark.parametrize("text", ["5.5", "1e-1", "1e10", "1e400", "5.0.0", ".", "'5'", '"5.0"', ".inf", ".nan", "e1"])
def test_cfg_10_other_numbers_are_none(text, file):
    with pytest.raises(ConfigError, match=r"iptables\.masqueradeBit: "):
        load([("config", file(f"iptables: {{masqueradeBit: {text}}}"))])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("iptables: &p {syncPeriod: 9s}\nnftables: {<<: *p, minSyncPeriod: 2s}", {"nftables.minSyncPeriod": 2}),
        ("iptables: &p {syncPeriod: 9s}\nnftables:\n  minSyncPeriod: 2s\n  <<: *p", {"nftables.minSyncPeriod": 2}),
        ("iptables: &p {syncPeriod: 9s}\nnftables: {<<: [*p, {syncPeriod: 8s, minSyncPeriod: 2s}]}", {}),
        ("winkernel: &p {syncPeriod: 7s}\nnftables: {<<: *p, syncPeriod: 9s}", {}),
        ("iptables: &p {<<: {syncPeriod: 9s}}\nnftables: {<<: *p}", {"iptables.syncPeriod": 9}),
    ],
)
def test_cfg_10_merge_keys_of_yaml_bring_in_what_the_mapping_does_not_say_itself(text, values, file):
    merged = load([("config", file(text))]).merged
    expected = {"nftables.syncPeriod": 9, **values}
    assert {path: merged.values[path] // SECOND for path in expected} == expected


def test_cfg_10_merge_keys_that_lead_nowhere_are_told(file):
    path = file("mode: nftables\n<<: 5\n")
    loaded = load([("config", path)])
    assert (loaded.settings.mode, loaded.warnings) == ("nftables", (f"{path}:4: << is no mapping; it is passed over",))


def test_cfg_10_merge_keys_cannot_blow_up(file):
    lines = ["a0: &a0 {mode: nftables}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 1500)]
    assert (
        settings_of(file("\n".join([*lines, "<<: *a1499", "z: &z {<<: *z}", "iptables: &y {<<: *y}"]))).mode
        == "nftables"
    )


def test_cfg_11_every_field_is_known_by_name_and_type(file):
    examples = {
        Type.STRING: '""',
        Type.BOOL: "false",
        Type.INT: "1",
        Type.FLOAT: "1.5",
        Type.DURATION: "24h",
        Type.FLUSH: "5000000000",
        Type.QUANTITY: "64Ki",
        Type.STRINGS: "[]",
        Type.GATES: "{AllAlpha: false}",
        Type.VMODULE: "[{filePattern: a, verbosity: 1}]",
    }
    for field in FIELDS:
        text = examples[field.type]
        for name in reversed(field.path.split(".")):
            text = f"{{{name}: {text}}}"
        found = parse(HEAD + text[1:-1], "x")
        assert not found.unknown, field.path


# --- values ----------------------------------------------------------------------------------------------------


def test_cfg_13_periods_and_masquerading_come_from_the_section_of_the_mode(file):
    text = """
mode: {}
iptables: {{syncPeriod: 10s, minSyncPeriod: 2s, masqueradeAll: true, masqueradeBit: 5}}
nftables: {{syncPeriod: 20s, minSyncPeriod: 3s, masqueradeBit: 6}}
ipvs: {{syncPeriod: 40s, minSyncPeriod: 4s}}
"""

    def picked(mode):
        found = settings_of(file(text.format(mode)))
        return found.sync_period, found.min_sync_period, found.masquerade_all, found.masquerade_bit

    assert picked('""') == (10.0, 2.0, True, 5)
    assert picked("iptables") == (10.0, 2.0, True, 5)
    assert picked("nftables") == (20.0, 3.0, False, 6)
    assert picked("ipvs") == (40.0, 4.0, True, 5)


def test_cfg_12_zero_and_null_in_a_file_mean_the_default(file):
    found = settings_of(file("iptables: {minSyncPeriod: 0s, syncPeriod: null, masqueradeBit: 0}\nclusterCIDR: ~\n"))
    assert (found.min_sync_period, found.sync_period) == (1.0, 30.0)
    assert found.masquerade_bit == 0  # a number whose zero is a value


def test_cfg_12_a_flag_can_say_zero():
    assert load([("iptables-min-sync-period", "0")]).settings.min_sync_period == 0.0


def test_cfg_2_ipvs_flags_have_defaults_of_their_own():
    found = load([("proxy-mode", "ipvs"), ("iptables-min-sync-period", "9s")]).settings
    assert (found.sync_period, found.min_sync_period) == (30.0, 1.0)


def test_cfg_2_iptables_flags_hold_in_nftables_mode():
    found = load([("proxy-mode", "nftables"), ("iptables-sync-period", "9s"), ("masquerade-all", "true")]).settings
    assert (found.sync_period, found.masquerade_all) == (9.0, True)
    assert found.configz["nftables"]["syncPeriod"] == "9s"


def test_cfg_14_nftables_without_node_port_addresses_means_primary(file):
    assert settings_of(file("mode: nftables")).node_port_addresses == ("primary",)
    assert settings_of(file("mode: nftables\nnodePortAddresses: [10.0.0.0/8]")).node_port_addresses == ("10.0.0.0/8",)
    assert settings_of(file("mode: iptables")).node_port_addresses == ()


def test_cfg_14_an_empty_mode_is_kept_but_behaves_as_iptables(file):
    found = settings_of(file("mode: ''"))
    assert (found.mode, found.behaviour, found.configz["mode"]) == ("", "iptables", "iptables")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2.3.4", HostPort("1.2.3.4", 10256)),
        ("1.2.3.4:5", HostPort("1.2.3.4", 5)),
        ("fd00::5", HostPort("fd00::5", 10256)),
        ("'[fd00::5]:7'", HostPort("fd00::5", 7)),
    ],
)
def test_cfg_4_addresses_without_port_get_the_usual_one(file, text, expected):
    assert settings_of(file(f"healthzBindAddress: {text}")).healthz_bind_address == expected


def test_cfg_11_an_ipv6_bind_address_moves_the_servers_to_ipv6(file):
    found = settings_of(file("bindAddress: fd00::1"))
    assert str(found.healthz_bind_address) == "[::]:10256"
    assert str(found.metrics_bind_address) == "[::1]:10249"
    assert found.node_ip_override == bytes.fromhex("fd00" + "0" * 27 + "1")


def test_cfg_3_empty_address_flags_leave_the_defaults():
    given_flags = [(name, "") for name in ("bind-address", "healthz-bind-address", "metrics-bind-address")]
    assert load(given_flags).settings == load([]).settings


def test_hc_8_deprecated_ports_disable_or_move_the_servers():
    assert load([("healthz-port", "0")]).settings.healthz_bind_address is None
    assert load([("metrics-port", "0")]).settings.metrics_bind_address is None
    assert str(load([("healthz-port", "8")]).settings.healthz_bind_address) == "0.0.0.0:8"
    both = load([("healthz-port", "8"), ("healthz-bind-address", "1.2.3.4")]).settings
    assert str(both.healthz_bind_address) == "1.2.3.4:8"


def test_cfg_40_cluster_cidrs_are_one_of_each_family(file):
    found = settings_of(file("clusterCIDR: 10.244.7.0/16,fd00:244::/32"))
    assert found.cluster_cidr(Family.IPV4) == parse_prefix("10.244.0.0/16")
    assert found.cluster_cidr(Family.IPV6) == parse_prefix("fd00:244::/32")


def test_cfg_21_without_cluster_cidr_there_is_none():
    assert load([]).settings.cluster_cidr(Family.IPV4) is None


def test_nod_1_the_host_name_is_trimmed_and_lowered(file):
    assert settings_of(file("hostnameOverride: ' Node-A '")).hostname_override == "node-a"


def test_scalars_mean_what_their_field_is(file):
    text = "hostnameOverride: 123\nbindAddressHardFail: yes\niptables: {masqueradeBit: 0x10}\n"
    found = settings_of(file(text))
    assert (found.hostname_override, found.bind_address_hard_fail, found.masquerade_bit) == ("123", True, 16)


def test_cfg_63_external_ips_hang_on_their_gate(file):
    assert not settings_of(file("featureGates: {AllowServiceExternalIPs: false}")).allow_external_ips


# --- our own document ------------------------------------------------------------------------------------------


def test_sluices_settings_stand_in_a_second_document(file):
    text = f"mode: nftables\n---\n{OWN_HEAD}serviceCIDRs: [10.96.0.0/12, fd00:96::/108]\nmanifests: /m\n"
    found = settings_of(file(text))
    assert found.mode == "nftables"
    assert found.service_cidrs == (parse_prefix("10.96.0.0/12"), parse_prefix("fd00:96::/108"))
    assert found.manifests == "/m"


def test_sluices_settings_may_stand_alone(file):
    assert settings_of(file("manifests: /m\n", head=OWN_HEAD)).manifests == "/m"


def test_sluices_own_flags_hold_with_a_file(file):
    more = [("manifests", "/other"), ("takeover", "true"), ("drift-policy", "report"), ("iptables-backend", "nft")]
    settings, warnings, _ = load([("config", file("manifests: /m\niptablesBackend: legacy", head=OWN_HEAD)), *more])
    assert (settings.manifests, settings.takeover, warnings) == ("/other", True, ())
    assert (settings.drift_policy, settings.iptables_backend) == ("report", "nft")


def test_settings_of_the_userspace_mode(file):
    assert settings_of(file("driftPolicy: repair", head=OWN_HEAD)).userspace == UserspaceLimits()
    text = """
userspace:
  workers: 3
  drain: 0s
  connectTimeout: 1s
  tcpIdleTimeout: 0s
  udpIdleTimeout: 5s
  udpStreamTimeout: 1m
  maxUDPFlows: 100
"""
    assert settings_of(file(text, head=OWN_HEAD)).userspace == UserspaceLimits(
        workers=3,
        drain=0.0,
        connect_timeout=1.0,
        tcp_idle_timeout=0.0,
        udp_idle_timeout=5.0,
        udp_stream_timeout=60.0,
        max_udp_flows=100,
    )


# --- files and flags -------------------------------------------------------------------------------------------


def test_cfg_1_with_a_file_most_flags_are_ignored_and_that_is_said(file):
    found = load([("config", file("mode: nftables")), ("proxy-mode", "iptables"), ("cluster-cidr", "10.0.0.0/8")])
    assert (found.settings.mode, found.settings.cluster_cidrs) == ("nftables", ())
    assert ["--proxy-mode" in each or "--cluster-cidr" in each for each in found.warnings] == [True, True]


def test_cfg_1_a_few_flags_win_over_the_file(file):
    text = "hostnameOverride: a\nlogging: {format: json, verbosity: 1, vmodule: [{filePattern: x, verbosity: 2}]}\n"
    more = [
        ("hostname-override", "b"),
        ("master", "https://m"),
        ("v", "5"),
        ("logging-format", "text"),
        ("vmodule", "y=3"),
    ]
    found = settings_of(file(text), *more)
    assert (found.hostname_override, found.master, found.verbosity, found.log_format) == ("b", "https://m", 5, "text")
    patterns = [each["filePattern"] for each in found.configz["logging"]["vmodule"]]
    assert patterns == ["y", "x"]
