"""Conntrack settings, sysctls of the modes, OOM score: CT-8, CT-9, IPT-30, IPVS-3, CFG-53."""

from __future__ import annotations

import pytest

from proxy import privileged
from proxy.config.load import load
from proxy.config.settings import ConntrackLimits, Settings
from proxy.privileged import conntrack_settings, cores, flows, needs_route_localnet, set_up
from rules.forwarding import Family

NOTHING = ConntrackLimits(
    max_per_core=0, minimum=0, tcp_established_timeout=0, tcp_close_wait_timeout=0, udp_timeout=0, udp_stream_timeout=0
)


@pytest.mark.parametrize(
    ("per_core", "minimum", "number", "expected"),
    [
        (32768, 131072, 2, 131072),
        (32768, 131072, 8, 262144),
        (32768, 131072, 32, 1048576),
        (32768, 131072, 33, 1048576),  # the cap
        (32768, 2_000_000, 33, 1048576),
        (32768, 2_000_000, 32, 2_000_000),  # min may exceed the cap while the product does not
        (0, 131072, 8, 0),
        (1, 0, 4, 4),
    ],
)
def test_ct_8_how_many_flows(per_core, minimum, number, expected):
    assert flows(ConntrackLimits(max_per_core=per_core, minimum=minimum), number) == expected


def test_ct_8_defaults():
    found = {setting.name: setting.value for setting in conntrack_settings(Settings().conntrack, 4)}
    assert found == {
        "net.netfilter.nf_conntrack_max": 131072,
        "net.netfilter.nf_conntrack_tcp_timeout_established": 86400,
        "net.netfilter.nf_conntrack_tcp_timeout_close_wait": 3600,
    }


def test_ct_8_everything_asked_for():
    limits = ConntrackLimits(
        max_per_core=0,
        tcp_established_timeout=1.9,
        tcp_close_wait_timeout=2,
        tcp_be_liberal=True,
        udp_timeout=3,
        udp_stream_timeout=4,
    )
    found = {setting.name.rpartition("conntrack_")[2]: setting.value for setting in conntrack_settings(limits, 4)}
    assert found == {
        "tcp_timeout_established": 1,  # whole seconds
        "tcp_timeout_close_wait": 2,
        "tcp_be_liberal": 1,
        "udp_timeout": 3,
        "udp_timeout_stream": 4,
    }


def test_ct_8_zeros_leave_everything_alone():
    assert list(conntrack_settings(NOTHING, 4)) == []


def test_ct_8_flags_reach_the_settings():
    flags = {
        "conntrack-max-per-core": "7",
        "conntrack-min": "8",
        "conntrack-tcp-timeout-established": "9s",
        "conntrack-tcp-timeout-close-wait": "1m",
        "conntrack-tcp-be-liberal": "true",
        "conntrack-udp-timeout": "11s",
        "conntrack-udp-timeout-stream": "12s",
        "oom-score-adj": "13",
        "profiling": "true",
    }
    settings = load(list(flags.items())).settings
    assert settings.conntrack == ConntrackLimits(
        max_per_core=7,
        minimum=8,
        tcp_established_timeout=9,
        tcp_close_wait_timeout=60,
        tcp_be_liberal=True,
        udp_timeout=11,
        udp_stream_timeout=12,
    )
    assert (settings.oom_score_adj, settings.enable_profiling) == (13, True)


def test_ct_9_cores_are_counted_in_sys(tmp_path):
    for name in ("cpu0", "cpu1", "cpu10"):
        (tmp_path / name / "topology").mkdir(parents=True)
    (tmp_path / "cpu11").mkdir()  # offline
    (tmp_path / "cpufreq" / "topology").mkdir(parents=True)
    assert cores(tmp_path) == 3
    assert cores(tmp_path / "missing") >= 1


class Node:
    """Files in the place of the kernel's."""

    def __init__(self, root, monkeypatch):
        self.root = root
        monkeypatch.setattr(privileged, "sysctl", self.setting)
        monkeypatch.setattr(privileged, "_HASHSIZE", root / "hashsize")
        monkeypatch.setattr(privileged, "_OOM_SCORE", root / "oom_score_adj")
        monkeypatch.setattr(privileged, "supported_families", lambda: tuple(Family))
        monkeypatch.setattr(privileged, "cores", lambda: 8)
        monkeypatch.setattr(privileged, "_load_conntrack", lambda: self.loaded.append(1))
        self.loaded = []
        self.holds("hashsize", 65536)
        self.holds("oom_score_adj", 0)

    def setting(self, name, value):
        return privileged.Setting(self.root / name.replace("/", "."), value)

    def holds(self, name, value):
        (self.root / name.replace("/", ".")).write_text(f"{value}\n")

    def __getitem__(self, name):
        return int((self.root / name.replace("/", ".")).read_text())


MAX = "net/netfilter/nf_conntrack_max"
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"


@pytest.fixture
def node(tmp_path, monkeypatch):
    return Node(tmp_path, monkeypatch)


def only_max(**more):
    return Settings(conntrack=ConntrackLimits(tcp_established_timeout=0, tcp_close_wait_timeout=0), **more)


def test_cfg_53_set_up_does_all_of_it(node):
    node.holds(MAX, 65536)
    node.holds(ROUTE_LOCALNET, 0)
    node.holds("hashsize", 1024)
    assert set_up(only_max()) == []
    assert (node[MAX], node["hashsize"], node[ROUTE_LOCALNET], node["oom_score_adj"]) == (262144, 65536, 1, -999)
    assert node.loaded == []


def test_ct_8_a_large_hash_table_stays(node):
    node.holds(MAX, 262144)
    node.holds("hashsize", 262144)
    assert set_up(only_max(mode="nftables")) == []
    assert node["hashsize"] == 262144


def test_ct_8_where_the_number_of_flows_cannot_be_set_the_machines_hash_table_is_left_alone(node, monkeypatch):
    node.holds(MAX, 65536)
    node.holds("hashsize", 1024)
    real = type(node.root).write_text

    def refuse(path, text):
        if path.name.endswith("nf_conntrack_max"):
            raise PermissionError(13, "Permission denied")
        return real(path, text)

    monkeypatch.setattr(type(node.root), "write_text", refuse)
    [complaint] = set_up(only_max(mode="nftables"))
    assert complaint.endswith("nf_conntrack_max to 262144: Permission denied")
    assert node["hashsize"] == 1024


def test_ct_8_connection_tracking_that_is_not_loaded_is_loaded(node):
    [complaint] = set_up(only_max(mode="nftables"))
    assert node.loaded == [1]
    assert complaint.endswith("No such file or directory")


def test_nothing_is_written_where_everything_is_right(node, monkeypatch):
    node.holds(MAX, 262144)
    node.holds(ROUTE_LOCALNET, 1)
    node.holds("oom_score_adj", -999)
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_: pytest.fail("it was written"))
    assert set_up(only_max()) == []


def test_ipvs_3_sysctls(node, monkeypatch):
    for name in ("conntrack", "conn_reuse_mode", "expire_nodest_conn", "expire_quiescent_template"):
        node.holds(f"net/ipv4/vs/{name}", 5)
    node.holds("net/ipv4/ip_forward", 0)
    monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"release": "5.4.0-42-generic"}))
    assert set_up(Settings(mode="ipvs", conntrack=NOTHING)) == []
    assert [node[f"net/ipv4/vs/{name}"] for name in ("conntrack", "conn_reuse_mode")] == [1, 0]
    node.holds("net/ipv4/vs/conn_reuse_mode", 5)
    monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"release": "6.1.0"}))
    set_up(Settings(mode="ipvs", conntrack=NOTHING))
    assert node["net/ipv4/vs/conn_reuse_mode"] == 5
    assert node["net/ipv4/ip_forward"] == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), True),
        (Settings(mode="iptables"), True),
        (Settings(mode="nftables"), False),
        (Settings(mode="ipvs"), False),
        (Settings(localhost_node_ports=False), False),
        (Settings(node_port_addresses=("192.168.0.0/16",)), False),
        (Settings(node_port_addresses=("127.0.0.0/8",)), True),
        (Settings(node_port_addresses=("primary",)), False),
    ],
)
def test_ipt_30_when_loopback_node_ports_are_wanted(settings, expected):
    assert needs_route_localnet(settings) is expected
