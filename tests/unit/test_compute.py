"""Routes of Services, by the clauses of sections 1 to 3 and the rows of section 11 of the behaviour document."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.compute import NOTHING, HealthCheck, Outcome, compute, decide, semantics_of
from proxy.objects import PROXY_NAME_LABEL, EndpointSlice, Service
from proxy.selection import Reason
from rules.forwarding import (
    Endpoint,
    Family,
    Kind,
    Protocol,
    Refusal,
    Route,
    check_route,
    parse_address,
)
from tests.builders import (
    NODE,
    OTHER,
    at,
    backends,
    endpoint,
    endpoint_slice,
    endpoints,
    networks,
    service,
    view,
)

LOCAL = {"externalTrafficPolicy": "Local"}
VIP = "1.2.3.4"
EXTERNAL = "192.168.99.11"


def v4(svc: Service, *slices: EndpointSlice, mode: str = "nftables", **fields: Any) -> Outcome:
    return compute(svc, slices, view(mode, **fields), Family.IPV4)


def v6(svc: Service, *slices: EndpointSlice) -> Outcome:
    return compute(svc, slices, view(), Family.IPV6)


def balancer(**spec: Any) -> Service:
    """The Service of 11.1, 11.6 and 11.7: every kind of frontend."""
    values: dict[str, Any] = {
        "type": "LoadBalancer",
        "vips": [VIP],
        "externalIPs": [EXTERNAL],
        "ports": [{"port": 80, "nodePort": 3001}],
    }
    return service(**(values | spec))


OF_BALANCER = {
    Kind.CLUSTER_IP: at("172.30.0.41:80"),
    Kind.EXTERNAL_IP: at(f"{EXTERNAL}:80"),
    Kind.LOAD_BALANCER: at(f"{VIP}:80"),
    Kind.NODE_PORT: at("*:3001"),
}
TWO = endpoint_slice([endpoint("10.180.0.1", None), endpoint("10.180.2.1", NODE)])
BOTH = backends("10.180.0.1", "10.180.2.1")
HERE = backends("10.180.2.1")


# --- which Services get rules, and where (SVC-*) ---


def test_trf1_every_frontend_of_a_service_port_has_a_route_with_its_label() -> None:
    outcome = v4(balancer(ports=[{"name": "http", "port": 80, "nodePort": 3001}]))
    assert {frontend: route.kind for frontend, route in outcome.routes.items()} == {
        frontend: kind for kind, frontend in OF_BALANCER.items()
    }
    assert {route.label for route in outcome.routes.values()} == {"ns/svc:http"}
    assert v4(service()).routes[at("172.30.0.41:80")].label == "ns/svc"


def test_routes_of_a_service_port_share_their_sets() -> None:
    routes = v4(balancer(**LOCAL), TWO).routes
    assert len({id(route.backends) for route in routes.values()}) == 1
    assert len({id(route.local_backends) for route in routes.values() if route.policy_local}) == 1


@pytest.mark.parametrize(
    "svc",
    [
        service(cluster_ip="None"),
        service(cluster_ip=""),
        service(type="ExternalName", externalName="a.example"),
        service(labels={PROXY_NAME_LABEL: ""}),
        service(labels={PROXY_NAME_LABEL: "other"}, type="LoadBalancer", vips=[VIP]),
    ],
    ids=["headless", "no ClusterIP yet", "ExternalName", "proxy name, empty", "proxy name"],
)
def test_svc1_svc4_b160_services_that_get_no_rules(svc: Service) -> None:
    assert v4(svc, TWO) is NOTHING


def test_svc5_each_family_has_its_own_cluster_ip() -> None:
    both = service(cluster_ip=["172.30.0.41", "fd00:30::41"])
    assert set(v4(both).routes) == {at("172.30.0.41:80")}
    assert set(v6(both).routes) == {at("[fd00:30::41]:80")}
    assert v6(service()) is NOTHING
    assert set(v6(service(cluster_ip=["fd00:30::41", "172.30.0.41"])).routes) == {at("[fd00:30::41]:80")}


def test_svc5_without_ip_families_the_one_cluster_ip_counts() -> None:
    old = service(ipFamilies=[], clusterIPs=["172.30.0.41", "fd00:30::41"])
    assert set(v4(old).routes) == {at("172.30.0.41:80")}
    assert v6(old) is NOTHING


def test_svc5_a_family_without_an_address_or_with_a_wrong_one_has_no_rules() -> None:
    assert v6(service(ipFamilies=["IPv4", "IPv6"])) is NOTHING
    wrong = v6(service(ipFamilies=["IPv4", "IPv6"], clusterIPs=["172.30.0.41", "172.30.0.42"]))
    assert wrong.routes == {}
    assert wrong.problems == ("spec.clusterIPs: 172.30.0.42 is not IPv6, as spec.ipFamilies says",)
    unread = v4(service(cluster_ip="172.30.0"))
    assert unread.problems == ("spec.clusterIP: '172.30.0' is no IP address",)


def test_svc6_b11_2_ports_match_endpoints_by_name_and_protocol() -> None:
    svc2 = service(
        ports=[
            {"name": "http", "port": 80},
            {"name": "https", "port": 443},
            {"name": "dns-udp", "port": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "port": 53},
            {"name": "dns-sctp", "port": 53, "protocol": "SCTP"},
            {"name": "dns-sctp", "port": 54, "protocol": "TCP"},
        ]
    )
    ports = [
        {"name": "http", "port": 80},
        {"name": "https", "port": 8443},
        {"name": "dns-udp", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 5353},
        {"name": "dns-sctp", "port": 53, "protocol": "SCTP"},
    ]
    routes = v4(svc2, endpoint_slice([endpoint("10.180.0.1", NODE), endpoint("10.180.2.1")], ports=ports)).routes
    assert {frontend: route.backends for frontend, route in routes.items()} == {
        at("172.30.0.41:80"): backends("10.180.0.1", "10.180.2.1", port=80),
        at("172.30.0.41:443"): backends("10.180.0.1", "10.180.2.1", port=8443),
        at("172.30.0.41:53", Protocol.UDP): backends("10.180.0.1", "10.180.2.1", port=53),
        at("172.30.0.41:53", Protocol.TCP): backends("10.180.0.1", "10.180.2.1", port=5353),
        at("172.30.0.41:53", Protocol.SCTP): backends("10.180.0.1", "10.180.2.1", port=53),
        at("172.30.0.41:54", Protocol.TCP): frozenset(),
    }


def test_a_port_of_an_unknown_protocol_is_skipped_and_told() -> None:
    outcome = v4(service(ports=[{"port": 80, "protocol": "QUIC"}, {"port": 81, "name": "b"}]))
    assert set(outcome.routes) == {at("172.30.0.41:81")}
    assert outcome.problems == ("port 80: protocol 'QUIC' is none of TCP, UDP and SCTP",)


def test_svc8_external_ips_are_read_leniently_and_one_by_one() -> None:
    outcome = v4(service(externalIPs=["192.168.099.022", " ", "", "nonsense", "fd00::1", "192.168.99.22"]))
    assert set(outcome.routes) == {at("172.30.0.41:80"), at("192.168.99.22:80")}
    assert outcome.problems == ("spec.externalIPs: 'nonsense' is no IP address",)


def test_trf15_without_the_gate_there_are_no_external_ips() -> None:
    assert set(v4(balancer(), external_ips=False).routes) == set(OF_BALANCER.values()) - {at(f"{EXTERNAL}:80")}


def test_svc9_b156_load_balancer_addresses() -> None:
    vips = [
        {"ip": "1.2.3.004", "ipMode": "VIP"},
        {"ip": "1.2.3.5", "ipMode": "Proxy"},
        {"ip": "1.2.3.6"},
        {"hostname": "lb.example"},
        {"ip": "fd00::1"},
    ]
    # The status counts whatever the type.
    kinds = {frontend: route.kind for frontend, route in v4(service(vips=vips)).routes.items()}
    assert kinds == {
        at("172.30.0.41:80"): Kind.CLUSTER_IP,
        at("1.2.3.4:80"): Kind.LOAD_BALANCER,
        at("1.2.3.6:80"): Kind.LOAD_BALANCER,
    }


@pytest.mark.parametrize(
    ("ranges", "expected", "problems"),
    [
        ([], (), 0),
        (["192.168.9.0/24", " 203.0.113.0/25"], ("192.168.9.0/24", "203.0.113.0/25"), 0),
        (["203.0.113.000/025", "203.0.113.77/25"], ("203.0.113.0/25",), 0),
        (["203.0.113.0/25", "203.0.113.128/25", "203.0.113.7/32"], ("203.0.113.0/24",), 0),
        (["203.0.113.0/25", "0.0.0.0/0"], (), 0),
        (["0.0.0.0/1", "128.0.0.0/1"], (), 0),
        (["fd00::/8"], (), 0),
        (["203.0.113.0/25", "fd00::/8", "nonsense", "1.2.3.4"], ("203.0.113.0/25",), 2),
        (["nonsense"], (), 2),
        # The node's address 192.168.0.2 is inside, and so are then both addresses (TRF-18, B-31).
        (["192.168.0.0/24"], (f"{VIP}/32", "5.6.7.8/32", "192.168.0.0/24"), 0),
    ],
)
def test_svc10_trf17_trf18_source_ranges(ranges: list[str], expected: tuple[str, ...], problems: int) -> None:
    svc = balancer(vips=[VIP, "5.6.7.8"], loadBalancerSourceRanges=ranges)
    outcome = v4(svc, TWO)
    for frontend, route in outcome.routes.items():
        assert route.source_ranges == (networks(*expected) if route.kind is Kind.LOAD_BALANCER else ()), frontend
    assert len(outcome.problems) == problems


def test_nft11_without_any_endpoints_ranges_stand_only_where_they_come_first() -> None:
    svc = balancer(loadBalancerSourceRanges=["203.0.113.0/25"])
    ranges = {mode: v4(svc, mode=mode).routes[at(f"{VIP}:80")].source_ranges for mode in ("nftables", "iptables", "")}
    assert ranges == {"nftables": networks("203.0.113.0/25"), "iptables": (), "": ()}
    assert v4(svc, TWO, mode="iptables").routes[at(f"{VIP}:80")].source_ranges == networks("203.0.113.0/25")


@pytest.mark.parametrize(
    ("spec", "local"),
    [
        ({"type": "LoadBalancer"}, True),
        ({"type": "NodePort"}, True),
        ({"type": "ClusterIP"}, True),
        ({"type": "ClusterIP", "externalIPs": []}, False),
    ],
)
def test_svc11_external_policy_local_needs_a_service_that_is_exposed(spec: dict[str, Any], local: bool) -> None:
    routes = v4(balancer(**LOCAL, **spec), TWO).routes
    assert routes[at("*:3001")].policy_local is local


@pytest.mark.parametrize(
    ("spec", "seconds", "problems"),
    [
        ({}, 0, 0),
        ({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 9}}}, 0, 0),
        ({"sessionAffinity": "ClientIP"}, 10800, 0),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 9}}}, 9, 0),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}, 10800, 1),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}, 10800, 1),
    ],
)
def test_trf24_affinity_is_of_all_frontends_with_backends(spec: dict[str, Any], seconds: int, problems: int) -> None:
    outcome = v4(balancer(**spec), TWO)
    assert {route.affinity for route in outcome.routes.values()} == {seconds}
    assert len(outcome.problems) == problems
    assert {route.affinity for route in v4(balancer(**spec)).routes.values()} == {0}


def test_b155_bad_spellings_of_old_objects_work() -> None:
    svc = service(
        cluster_ip="172.030.0.041",
        type="LoadBalancer",
        vips=["1.2.3.004"],
        externalIPs=["192.168.099.022"],
        loadBalancerSourceRanges=["203.0.113.000/025"],
        ports=[{"name": "p80", "port": 80, "nodePort": 3001}],
    )
    outcome = v4(svc, endpoint_slice([endpoint("10.180.00.001")], ports=[{"name": "p80", "port": 80}]))
    frontends = {str(frontend) for frontend in outcome.routes}
    assert frontends == {"172.30.0.41:80/TCP", "1.2.3.4:80/TCP", "192.168.99.22:80/TCP", "*:3001/TCP"}
    assert {route.backends for route in outcome.routes.values()} == {backends("10.180.0.1")}
    assert outcome.routes[at("1.2.3.4:80")].source_ranges == networks("203.0.113.0/25")
    assert outcome.problems == ()


@pytest.mark.parametrize(
    ("spec", "winner"),
    [
        ({"externalIPs": [VIP]}, Kind.LOAD_BALANCER),
        ({"externalIPs": [VIP], "vips": []}, Kind.EXTERNAL_IP),
        ({"externalIPs": [VIP], "cluster_ip": VIP}, Kind.CLUSTER_IP),
    ],
)
def test_one_address_of_several_kinds_is_the_strongest(spec: dict[str, Any], winner: Kind) -> None:
    outcome = v4(balancer(**spec), TWO)
    assert outcome.routes[at(f"{VIP}:80")].kind is winner
    assert outcome.problems == ()


def test_two_ports_with_one_frontend_are_told_and_the_first_is_served() -> None:
    ports = [{"name": "a", "port": 80, "nodePort": 3001}, {"name": "b", "port": 81, "nodePort": 3001}]
    outcome = v4(service(type="NodePort", ports=ports), endpoint_slice([endpoint("10.0.0.1")], ports=ports[:1]))
    assert outcome.routes[at("*:3001")].label == "ns/svc:a"
    assert outcome.problems == ("*:3001/TCP stands in it twice: the first one, ns/svc:a, is served",)


def test_troubles_of_slices_are_told_once_and_with_the_slice() -> None:
    each = endpoint_slice([endpoint("nonsense"), endpoint("nonsense"), endpoint("10.0.0.1")], name="s-1")
    outcome = v4(service(), each)
    assert outcome.routes[at("172.30.0.41:80")].backends == backends("10.0.0.1")
    assert outcome.problems == (f"EndpointSlice s-1: 'nonsense': {Reason.BAD_ADDRESS.text}",)


# --- where packets go (SEL-11, TRF-*, section 11) ---


def test_b1_to_b6_without_endpoints_everything_is_refused() -> None:
    for policy in ({}, LOCAL):
        routes = v4(balancer(**policy)).routes
        assert set(routes) == set(OF_BALANCER.values())
        for route in routes.values():
            assert (route.backends, route.local_backends, route.refusal) == (frozenset(), None, Refusal.REJECT)


def test_b60_to_b66_external_policy_local() -> None:
    routes = v4(balancer(**LOCAL), TWO).routes
    assert routes[OF_BALANCER[Kind.CLUSTER_IP]] == Route(kind=Kind.CLUSTER_IP, backends=BOTH, label="ns/svc")
    for kind in (Kind.EXTERNAL_IP, Kind.LOAD_BALANCER, Kind.NODE_PORT):
        assert routes[OF_BALANCER[kind]] == Route(kind=kind, backends=BOTH, local_backends=HERE, label="ns/svc")


def test_b70_to_b76_external_policy_cluster() -> None:
    for kind, frontend in OF_BALANCER.items():
        assert v4(balancer(), TWO).routes[frontend] == Route(kind=kind, backends=BOTH, label="ns/svc")


def test_sel11_external_policy_local_without_local_endpoints_drops_outsiders_only() -> None:
    routes = v4(balancer(**LOCAL), endpoint_slice([endpoint("10.180.0.1")])).routes
    route = routes[at("*:3001")]
    assert (route.backends, route.local_backends, route.refusal) == (
        backends("10.180.0.1"),
        frozenset(),
        Refusal.DROP,
    )
    assert routes[at("172.30.0.41:80")].refusal is None


ITP_CASES = [
    ("B-80", "Cluster", [NODE, OTHER, OTHER], ["10.0.1.1", "10.0.1.2", "10.0.1.3"], None),
    ("B-81", "Local", [NODE, OTHER, OTHER], ["10.0.1.1"], None),
    ("B-82", "Local", [NODE, NODE, OTHER], ["10.0.1.1", "10.0.1.2"], None),
    ("B-83", "Local", [OTHER, OTHER, OTHER], [], Refusal.DROP),
    ("B-84 Cluster", "Cluster", [], [], Refusal.REJECT),
    ("B-84 Local", "Local", [], [], Refusal.REJECT),
]


@pytest.mark.parametrize(
    ("policy", "nodes", "used", "refusal"), [case[1:] for case in ITP_CASES], ids=[c[0] for c in ITP_CASES]
)
def test_internal_policy(policy: str, nodes: list[str], used: list[str], refusal: Refusal | None) -> None:
    svc = service(cluster_ip="172.30.1.1", internalTrafficPolicy=policy)
    made = [endpoint(f"10.0.1.{index}", where) for index, where in enumerate(nodes, start=1)]
    assert v4(svc, *([endpoint_slice(made)] if made else [])).routes == {
        at("172.30.1.1:80"): Route(kind=Kind.CLUSTER_IP, backends=backends(*used), refusal=refusal, label="ns/svc")
    }


L, R = NODE, OTHER
# Per endpoint: last octet, node, condition; then the cluster list, the local list, the refusals of both.
TERMINATING_CASES = [
    ("B-90", [(1, L, "R"), (2, L, "R"), (3, L, "ST"), (4, L, "T"), (5, R, "R")], [1, 2, 5], [1, 2]),
    ("B-91", [(2, L, "ST"), (3, L, "ST"), (4, L, "T"), (5, R, "R")], [5], [2, 3]),
    ("B-92", [(5, R, "ST")], [5], []),
    ("B-93", [(4, L, "T"), (5, R, "T")], [], []),
    ("B-94", [], [], []),
    ("B-100", [(1, L, "R"), (2, L, "R"), (3, R, "ST"), (4, R, "T"), (5, R, "R")], [1, 2, 5], [1, 2]),
    ("B-101", [(2, L, "ST"), (3, L, "ST"), (4, R, "T"), (5, R, "ST")], [2, 3, 5], [2, 3]),
    ("B-102", [(5, R, "ST")], [5], []),
    ("B-103", [(4, L, "T"), (5, R, "T")], [], []),
    ("B-104", [], [], []),
]


@pytest.mark.parametrize("policy", ["Local", "Cluster"])
@pytest.mark.parametrize(
    ("made", "cluster", "local"), [case[1:] for case in TERMINATING_CASES], ids=[c[0] for c in TERMINATING_CASES]
)
def test_terminating_endpoints(
    policy: str, made: list[tuple[int, str, str]], cluster: list[int], local: list[int]
) -> None:
    svc = service(cluster_ip="172.30.1.1", type="LoadBalancer", vips=[VIP], externalTrafficPolicy=policy)
    slices = [endpoint_slice([endpoint(f"10.0.1.{octet}", *rest) for octet, *rest in made])] if made else []
    routes = v4(svc, *slices).routes
    everywhere = backends(*(f"10.0.1.{octet}" for octet in cluster))
    here = backends(*(f"10.0.1.{octet}" for octet in local))
    nowhere = None if cluster else Refusal.REJECT
    assert routes[at("172.30.1.1:80")].backends == everywhere
    assert routes[at("172.30.1.1:80")].refusal is nowhere
    route = routes[at(f"{VIP}:80")]
    assert route.backends == everywhere
    if policy == "Cluster" or not cluster:
        assert (route.local_backends, route.refusal) == (None, nowhere)
    else:
        assert (route.local_backends, route.refusal) == (here, None if here else Refusal.DROP)


def test_b130_internal_policy_local_leaves_external_frontends_alone() -> None:
    routes = v4(balancer(internalTrafficPolicy="Local"), TWO).routes
    assert routes[at("172.30.0.41:80")].backends == HERE
    assert routes[at(f"{VIP}:80")].backends == BOTH
    assert not routes[at(f"{VIP}:80")].policy_local


@pytest.mark.parametrize(
    ("mode", "spec", "hairpins"),
    [
        ("nftables", {}, ["10.180.2.1"]),
        ("iptables", {}, ["10.180.0.1", "10.180.2.1"]),
        ("", {}, ["10.180.0.1", "10.180.2.1"]),
        ("iptables", {"internalTrafficPolicy": "Local"}, ["10.180.2.1"]),
    ],
)
def test_trf7_nft14_hairpins(mode: str, spec: dict[str, Any], hairpins: list[str]) -> None:
    assert v4(service(**spec), TWO, mode=mode).hairpins == endpoints(*hairpins)


def test_hairpins_have_the_protocol_and_only_endpoints_that_are_used() -> None:
    each = endpoint_slice(
        [endpoint("10.0.0.1", NODE), endpoint("10.0.0.2", NODE, "N"), endpoint("10.0.0.3", NODE, "ST")],
        ports=[{"name": "", "port": 53, "protocol": "UDP"}, {"name": "unused", "port": 1}],
    )
    outcome = v4(service(ports=[{"port": 53, "protocol": "UDP"}]), each)
    assert outcome.hairpins == {Endpoint(parse_address("10.0.0.1"), Protocol.UDP, 53)}


def test_only_nftables_means_what_nftables_means() -> None:
    assert semantics_of("nftables") != semantics_of("iptables")
    assert semantics_of("") == semantics_of("userspace") == semantics_of("iptables")


def test_ipvs_lets_in_health_checks_and_has_its_firewall_before_refusals() -> None:
    """TRF-7, TRF-27, IPVS-16."""
    ipvs = semantics_of("ipvs")
    assert (ipvs.firewall_before_refusal, ipvs.let_in_health_checks, ipvs.hairpin_remote) == (True, True, False)


# --- what is told of a Service (HC-20, SEL-12) ---


def test_hc22_b158_the_health_check_counts_addresses_of_local_ready_endpoints() -> None:
    ports = [{"name": "a", "port": 80}, {"name": "b", "port": 81}]
    svc = balancer(**LOCAL, healthCheckNodePort=30000, ports=ports)
    ready = [endpoint(f"10.0.0.{octet}", NODE) for octet in (1, 2, 3)]
    others = [endpoint("10.0.0.4", NODE, "N"), endpoint("10.0.0.5", NODE, "ST"), endpoint("10.0.0.6", OTHER)]
    assert v4(svc, endpoint_slice([*ready, *others], ports=ports)).health_check == HealthCheck(30000, 3)
    leaving = [endpoint(f"10.0.0.{octet}", NODE, "ST") for octet in (1, 2, 3)]
    assert v4(svc, endpoint_slice(leaving, ports=ports)).health_check == HealthCheck(30000, 0)
    assert v4(svc).health_check == HealthCheck(30000, 0)


@pytest.mark.parametrize("spec", [{}, {**LOCAL, "type": "NodePort"}, {**LOCAL, "type": "ClusterIP"}])
def test_svc13_only_load_balancers_under_policy_local_have_a_health_check(spec: dict[str, Any]) -> None:
    assert v4(balancer(healthCheckNodePort=30000, **spec), TWO).health_check is None


def test_svc13_a_service_that_has_no_service_port_has_no_health_check_and_lets_nobody_in() -> None:
    ports = [{"name": "a", "port": 80, "protocol": "QUIC"}]
    outcome = v4(balancer(**LOCAL, healthCheckNodePort=30000, ports=ports), TWO, mode="iptables")
    assert (outcome.routes, outcome.health_check, outcome.let_in) == ({}, None, 0)


def test_svc13_a_missing_health_check_port_is_told() -> None:
    outcome = v4(balancer(**LOCAL), TWO)
    assert outcome.health_check is None
    assert outcome.problems == ("spec.healthCheckNodePort is 0: load balancers cannot ask this node for its endpoints",)


@pytest.mark.parametrize(
    ("itp", "etp", "where", "counts"),
    [
        ("Local", "Local", NODE, (0, 0)),
        ("Local", "Cluster", OTHER, (1, 0)),
        ("Cluster", "Local", OTHER, (0, 1)),
        ("Local", "Local", OTHER, (1, 1)),
        ("Cluster", "Cluster", OTHER, (0, 0)),
        ("Local", "Local", None, (0, 0)),
    ],
)
def test_sel12_b157_service_ports_without_local_endpoints_are_counted(
    itp: str, etp: str, where: str | None, counts: tuple[int, int]
) -> None:
    svc = balancer(internalTrafficPolicy=itp, externalTrafficPolicy=etp, healthCheckNodePort=1)
    outcome = v4(svc, *([endpoint_slice([endpoint("10.0.0.1", where)])] if where else []))
    assert (outcome.no_local_internal, outcome.no_local_external) == counts


# --- what holds for every Service ---

_IPS = st.sampled_from(
    ["172.30.0.1", "172.30.0.2", "1.2.3.4", "192.168.0.2", "fd00::1", "fd00::2", "010.0.0.1", "x", "", "::ffff:1.2.3.4"]
)
_POLICY = st.sampled_from(["", "Cluster", "Local"])
_PORTS = st.lists(
    st.fixed_dictionaries(
        {"port": st.integers(1, 4)},
        optional={
            "name": st.sampled_from(["", "a", "b"]),
            "protocol": st.sampled_from(["TCP", "UDP", "SCTP", "ICMP"]),
            "nodePort": st.sampled_from([0, 3001, 3002]),
        },
    ),
    max_size=4,
)
_RANGES = st.sampled_from(
    ["192.168.0.0/24", "10.0.0.0/8", "10.0.0.0/9", "10.128.0.0/9", "0.0.0.0/0", "::/0", "fd00::/8", "y"]
)
_SERVICES = st.builds(
    service,
    cluster_ip=st.lists(_IPS, min_size=1, max_size=2, unique=True),
    ports=_PORTS,
    vips=st.lists(_IPS, max_size=3),
    type=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]),
    externalIPs=st.lists(_IPS, max_size=3),
    internalTrafficPolicy=_POLICY,
    externalTrafficPolicy=_POLICY,
    sessionAffinity=st.sampled_from(["", "None", "ClientIP"]),
    loadBalancerSourceRanges=st.lists(_RANGES, max_size=3),
)
_SLICES = st.builds(
    endpoint_slice,
    st.lists(
        st.builds(
            endpoint,
            st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::a", "fd00::b", "z"]),
            st.sampled_from([NODE, OTHER, None]),
            st.sampled_from(["R", "ST", "T", "N", "P", ""]),
            zones=st.lists(st.sampled_from("ab"), max_size=1),
            nodes=st.lists(st.sampled_from([NODE, OTHER]), max_size=1),
        ),
        max_size=5,
    ),
    name=st.sampled_from(["one", "two", "three"]),
    ports=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "name": st.sampled_from(["", "a", "b"]),
                "protocol": st.sampled_from(["TCP", "UDP"]),
                "port": st.sampled_from([0, 80, 8080]),
            },
        ),
        max_size=3,
    ),
    address_type=st.sampled_from(["IPv4", "IPv6", "FQDN"]),
)
_OBJECTS = st.tuples(_SERVICES, st.lists(_SLICES, max_size=3, unique_by=lambda each: each.metadata.name))
_MODES = st.sampled_from(["nftables", "iptables"])


@given(_OBJECTS, _MODES, st.sampled_from(list(Family)), st.sampled_from(["", "a"]))
def test_every_route_is_canonical_and_every_hairpin_used(
    objects: tuple[Service, list[EndpointSlice]], mode: str, family: Family, zone: str
) -> None:
    svc, slices = objects
    outcome = compute(svc, slices, view(mode, zone=zone), family)
    reached = set()
    for frontend, route in outcome.routes.items():
        assert check_route(family, frontend, route) is None
        assert not any(prefix.length == 0 for prefix in route.source_ranges)
        for backend in route.backends | (route.local_backends or frozenset()):
            reached.add(Endpoint(backend.address, frontend.protocol, backend.port))
    assert outcome.hairpins <= reached
    if mode == "iptables":
        assert outcome.hairpins == reached
    assert all(problem and "\n" not in problem for problem in outcome.problems)


@given(_OBJECTS, _MODES, st.sampled_from(list(Family)), st.randoms(use_true_random=False))
def test_the_order_of_slices_changes_nothing(
    objects: tuple[Service, list[EndpointSlice]], mode: str, family: Family, random: Any
) -> None:
    svc, slices = objects
    before = compute(svc, slices, view(mode), family)
    random.shuffle(slices)
    assert compute(svc, slices, view(mode), family) == before


@given(_OBJECTS, st.sampled_from(list(Family)))
def test_decisions_are_those_that_the_routes_show(objects: tuple[Service, list[EndpointSlice]], family: Family) -> None:
    svc, slices = objects
    outcome = compute(svc, slices, view(), family)
    used = {decision.endpoint for decision in decide(svc, slices, view(), family) if decision.used}
    reached = {
        str(backend)
        for route in outcome.routes.values()
        for backend in route.backends | (route.local_backends or frozenset())
    }
    assert reached <= used
    # A list may be decided on and reached by nobody, where its frontends are another's.
    shadowed = svc.spec.external_ips or svc.status.load_balancer.ingress or any("twice" in p for p in outcome.problems)
    if not shadowed:
        assert reached == used
