"""The node's own facts (NOD-*, CFG-30 to CFG-40, TRF-10, TRF-21)."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.config.settings import Settings
from proxy.node import (
    DELETION_TAINT,
    NodeIPs,
    covers_loopback,
    detector_of,
    eligible,
    expand_node_port_addresses,
    node_facts,
    node_ips,
    normal_node_name,
    view_of,
    zone_of,
)
from proxy.objects import Node, ServiceCIDR, convert
from rules.forwarding import Family, InputInterface, InputInterfacePrefix, SourcePrefix, parse_address, parse_prefix
from tests.builders import NODE, networks, node

V4, V6 = Family.IPV4, Family.IPV6
INTERFACES = {
    "lo": [parse_address("127.0.0.1"), parse_address("::1")],
    "eth0": [parse_address(each) for each in ("192.168.0.2", "2001:db8::1", "fe80::1")],
    "eth1": [parse_address(each) for each in ("192.168.1.2", "2001:db8:1::2", "169.254.3.3")],
}
KNOWN = node(addresses={"InternalIP": ["192.168.0.2", "2001:db8::1"]})


def addresses(*texts: str) -> frozenset[bytes]:
    return frozenset(parse_address(text) for text in texts)


@pytest.mark.parametrize(
    ("override", "hostname", "name"),
    [("", "Host.Example ", "host.example"), (" Node-1\n", "host", "node-1"), ("  ", "host", "host")],
)
def test_nod1_the_name_is_trimmed_and_in_lower_case(override: str, hostname: str, name: str) -> None:
    assert normal_node_name(override, hostname) == name


def test_nod1_a_node_without_a_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty hostname is invalid"):
        normal_node_name("", " ")


@pytest.mark.parametrize(
    ("listed", "bind", "primary", "v4", "v6"),
    [
        ({}, None, V4, "127.0.0.1", "::1"),
        ({"InternalIP": ["10.0.0.1"]}, None, V4, "10.0.0.1", "::1"),
        ({"InternalIP": ["fd00::1"]}, None, V6, "127.0.0.1", "fd00::1"),
        ({"InternalIP": ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"]}, None, V4, "10.0.0.1", "fd00::1"),
        ({"InternalIP": ["fd00::1", "10.0.0.1"]}, None, V6, "10.0.0.1", "fd00::1"),
        ({"ExternalIP": ["1.2.3.4"], "InternalIP": ["10.0.0.1"]}, None, V4, "10.0.0.1", "::1"),
        ({"ExternalIP": ["1.2.3.4", "fd00::1"], "InternalIP": ["10.0.0.1"]}, None, V4, "10.0.0.1", "fd00::1"),
        ({"ExternalIP": ["1.2.3.4"]}, None, V4, "1.2.3.4", "::1"),
        ({"Hostname": ["1.2.3.4"], "InternalDNS": ["5.6.7.8"]}, None, V4, "127.0.0.1", "::1"),
        ({"InternalIP": ["nonsense", "010.0.0.001"]}, None, V4, "10.0.0.1", "::1"),
        ({}, "10.9.9.9", V4, "10.9.9.9", "::1"),
        ({}, "fd00::9", V6, "127.0.0.1", "fd00::9"),
        ({"InternalIP": ["10.0.0.1", "fd00::1"]}, "10.9.9.9", V4, "10.9.9.9", "fd00::1"),
        ({"InternalIP": ["10.0.0.1", "fd00::1"]}, "fd00::9", V6, "10.0.0.1", "fd00::9"),
    ],
)
def test_nod4_nod10_b234_node_ips(
    listed: dict[str, list[str]], bind: str | None, primary: Family, v4: str, v6: str
) -> None:
    found = node_ips(node(addresses=listed), parse_address(bind) if bind else None)
    assert found == NodeIPs(primary, {V4: parse_address(v4), V6: parse_address(v6)})


def test_nod10_an_unspecified_bind_address_overrides_nothing() -> None:
    for bind in ("0.0.0.0", "::"):
        assert Settings(bind_address=bind).node_ip_override is None


def test_an_unknown_node_has_loopback_and_without_a_cluster_its_interfaces() -> None:
    assert node_ips(None) == NodeIPs(V4, {V4: parse_address("127.0.0.1"), V6: parse_address("::1")})
    alone = NodeIPs(V4, {V4: parse_address("192.168.0.2"), V6: parse_address("2001:db8::1")})
    assert node_ips(None, None, INTERFACES) == alone
    assert node_ips(KNOWN, None, {}) == alone
    # A Node by hand, that says its zone alone.
    assert node_ips(node(labels={"a": "b"}), None, INTERFACES) == alone
    assert node_ips(None, None, {"lo": INTERFACES["lo"]}).known(V4) is None


def test_nod9_the_zone_is_the_label() -> None:
    assert zone_of(node(labels={"topology.kubernetes.io/zone": "zone-a"})) == "zone-a"
    assert zone_of(node()) == zone_of(None) == ""


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (None, False),
        (node(), True),
        (node(deleted=True), False),
        (node(taints=["other"]), True),
        (node(taints=["other", DELETION_TAINT]), False),
    ],
)
def test_nod8_hc5_eligibility(known: Node | None, expected: bool) -> None:
    assert eligible(known) is expected


@pytest.mark.parametrize(
    ("setting", "v4", "v6"),
    [
        ([], None, None),
        (["10.20.30.0/24"], [], None),
        (["0.0.0.0/0", "1.2.3.0/24"], None, None),
        (["192.168.0.0/24", "127.0.0.1/32"], ["192.168.0.2"], None),
        (["192.168.0.0/24", "192.168.1.0/24", "2001:db8::/64"], ["192.168.0.2", "192.168.1.2"], ["2001:db8::1"]),
        (["2001:db8::/64", "2001:db8:1::2/128"], None, ["2001:db8::1", "2001:db8:1::2"]),
        (["127.0.0.0/8", "::1/128"], [], []),
        (["primary"], ["192.168.0.2"], ["2001:db8::1"]),
    ],
)
def test_cfg30_b232_node_port_addresses(setting: list[str], v4: list[str] | None, v6: list[str] | None) -> None:
    ips = node_ips(KNOWN)
    for family, expected in ((V4, v4), (V6, v6)):
        found = expand_node_port_addresses(setting, INTERFACES, ips, family)
        assert found == (None if expected is None else addresses(*expected))


def test_cfg31_primary_without_a_known_address_is_every_address() -> None:
    one = node_ips(node(addresses={"InternalIP": ["192.168.0.2"]}))
    assert expand_node_port_addresses(["primary"], INTERFACES, one, V4) == addresses("192.168.0.2")
    assert expand_node_port_addresses(["primary"], INTERFACES, one, V6) is None
    assert expand_node_port_addresses(["primary"], INTERFACES, node_ips(None), V4) is None


def test_cfg31_cfg33_primary_is_looked_for_on_the_interfaces() -> None:
    behind_nat = node_ips(node(addresses={"InternalIP": ["192.0.2.1"]}))
    assert expand_node_port_addresses(["primary"], INTERFACES, behind_nat, V4) == frozenset()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ([], True),
        (["127.0.0.0/8"], True),
        (["127.0.2.0/28"], True),
        (["64.0.0.0/2"], True),
        (["0.0.0.0/0"], True),
        (["128.0.2.0/28"], False),
        (["192.168.0.0/24"], False),
        (["fd00::/8"], True),
        (["primary"], False),
    ],
)
def test_cfg32_b232_loopback_among_node_port_addresses(setting: list[str], expected: bool) -> None:
    assert covers_loopback(setting, node_ips(KNOWN)) is expected


PODS = networks("10.0.0.0/8", "fd00:10::/64")


@pytest.mark.parametrize(
    ("settings", "known", "v4", "v6"),
    [
        ({}, None, None, None),
        ({"cluster_cidrs": PODS}, None, SourcePrefix(PODS[0]), SourcePrefix(PODS[1])),
        ({"cluster_cidrs": PODS[1:]}, None, None, SourcePrefix(PODS[1])),
        ({"detect_local_mode": "NodeCIDR", "cluster_cidrs": PODS}, None, None, None),
        (
            {"detect_local_mode": "NodeCIDR"},
            node(pod_cidrs=["10.1.0.0/24", "10.2.0.0/24"]),
            SourcePrefix(parse_prefix("10.1.0.0/24")),
            None,
        ),
        (
            {"detect_local_mode": "BridgeInterface", "bridge_interface": "cni0"},
            None,
            InputInterface("cni0"),
            InputInterface("cni0"),
        ),
        (
            {"detect_local_mode": "InterfaceNamePrefix", "interface_name_prefix": "veth"},
            None,
            InputInterfacePrefix("veth"),
            InputInterfacePrefix("veth"),
        ),
    ],
)
def test_cfg40_trf10_trf11_detectors(settings: dict[str, Any], known: Node | None, v4: object, v6: object) -> None:
    assert detector_of(Settings(**settings), known, V4) == v4
    assert detector_of(Settings(**settings), known, V6) == v6


def test_cfg40_an_old_node_has_one_pod_cidr() -> None:
    old = convert(Node, {"spec": {"podCIDR": "10.1.0.0/24"}})
    assert detector_of(Settings(detect_local_mode="NodeCIDR"), old, V4) == SourcePrefix(parse_prefix("10.1.0.0/24"))


def cidrs(*texts: str) -> ServiceCIDR:
    return convert(ServiceCIDR, {"metadata": {"name": "x"}, "spec": {"cidrs": list(texts)}})


def test_nftables_mode_brings_its_own_facts() -> None:
    facts = node_facts(
        Settings(mode="nftables", masquerade_bit=3, masquerade_all=True),
        KNOWN,
        INTERFACES,
        [cidrs("172.30.0.0/16", "fd00:30::/112"), cidrs("172.31.0.0/16", "nonsense")],
    )
    assert facts[V4].service_cidrs == networks("172.30.0.0/15")
    assert facts[V6].service_cidrs == networks("fd00:30::/112")
    for family, own in ((V4, "192.168.0.2"), (V6, "2001:db8::1")):
        assert facts[family].mark == 8
        assert facts[family].masquerade_all
        assert facts[family].reject_closed_ports
        assert facts[family].node_port_addresses == addresses(own)
        assert not facts[family].loopback_node_ports


@pytest.mark.parametrize("mode", ["", "iptables", "userspace"])
def test_every_other_mode_means_iptables(mode: Any) -> None:
    facts = node_facts(Settings(mode=mode), KNOWN, INTERFACES, [cidrs("172.30.0.0/16", "fd00:30::/112")])
    for family, each in facts.items():
        assert (each.node_port_addresses, each.reject_closed_ports) == (None, False)
        # In userspace mode ClusterIPs are addresses of the node, network by network.
        network = {V4: "172.30.0.0/16", V6: "fd00:30::/112"}[family]
        assert each.service_cidrs == (networks(network) if mode == "userspace" else ())
    assert (facts[V4].loopback_node_ports, facts[V6].loopback_node_ports) == (True, False)


@pytest.mark.parametrize(
    ("row", "wanted", "setting", "loopback", "v4"),
    [
        ("B-40", True, [], True, None),
        ("B-41", False, [], False, None),
        ("B-42", False, ["192.168.0.0/24", "127.0.0.1/32"], False, ["192.168.0.2"]),
        ("B-43", False, ["192.168.0.0/24", "192.168.1.0/24"], False, ["192.168.0.2", "192.168.1.2"]),
        ("TRF-21", True, ["192.168.0.0/24"], False, ["192.168.0.2"]),
        ("TRF-21", True, ["127.0.0.0/8"], True, []),
    ],
)
def test_trf21_loopback_node_ports(
    row: str, wanted: bool, setting: list[str], loopback: bool, v4: list[str] | None
) -> None:
    settings = Settings(localhost_node_ports=wanted, node_port_addresses=tuple(setting))
    facts = node_facts(settings, KNOWN, INTERFACES)[V4]
    assert facts.loopback_node_ports is loopback, row
    assert facts.node_port_addresses == (None if v4 is None else addresses(*v4)), row


def test_cid2_b159_the_setting_stands_in_for_service_cidrs_that_nobody_tells() -> None:
    settings = Settings(mode="nftables", service_cidrs=networks("172.20.0.0/16", "fd00:20::/112"))
    assert node_facts(settings, KNOWN, INTERFACES)[V4].service_cidrs == networks("172.20.0.0/16")
    told = node_facts(settings, KNOWN, INTERFACES, [cidrs("172.30.0.0/16")])
    assert told[V4].service_cidrs == networks("172.30.0.0/16")
    assert told[V6].service_cidrs == ()


def test_without_a_cluster_node_ports_are_on_the_first_addresses_of_the_interfaces() -> None:
    settings = Settings(mode="nftables")
    alone = node_facts(settings, None, INTERFACES, standalone=True)
    assert alone[V4].node_port_addresses == addresses("192.168.0.2")
    assert alone[V6].node_port_addresses == addresses("2001:db8::1")
    assert node_facts(settings, None, INTERFACES)[V4].node_port_addresses is None


def test_the_view_of_the_node() -> None:
    known = node(addresses={"InternalIP": ["192.168.0.2"]}, labels={"topology.kubernetes.io/zone": "a"})
    view = view_of(Settings(mode="nftables", allow_external_ips=False), NODE, known, INTERFACES)
    assert (view.node_name, view.zone, view.external_ips) == (NODE, "a", False)
    assert view.node_ips == {V4: parse_address("192.168.0.2"), V6: parse_address("::1")}
    assert view.semantics.firewall_before_refusal
    assert not view_of(Settings(), NODE, known, INTERFACES).semantics.firewall_before_refusal
    assert view_of(Settings(), NODE, None, INTERFACES, standalone=True).node_ips[V6] == parse_address("2001:db8::1")
