"""One packet through a table: each decision, in its order, with the clause behind it."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.explain import explain
from rules.explanation import (
    Dropped,
    Explanation,
    Origin,
    Packet,
    Reaches,
    Rejected,
    Share,
    StepKind,
    Untouched,
    Why,
    verdict,
)
from rules.forwarding import (
    Address,
    Backend,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    NodeFacts,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
    parse_address,
    parse_prefix,
)
from rules.near_misses import MOST_NEAR_MISSES
from tests import strategies
from tests.builders import at, backends, endpoints, networks

HERE, THERE = "10.180.0.1", "10.180.2.1"
LOCAL = frozenset(map(parse_address, ["192.168.0.2", "192.168.0.3", "127.0.0.1"]))
FACTS = NodeFacts(
    detector=SourcePrefix(parse_prefix("10.180.0.0/16")),
    node_port_addresses=frozenset([parse_address("192.168.0.2")]),
    service_cidrs=networks("172.30.0.0/16"),
)
BOTH = backends(HERE, THERE)


def cluster_ip(**fields) -> Route:
    return Route(**{"kind": Kind.CLUSTER_IP, "backends": BOTH, "label": "ns/web:http", **fields})


def external(kind: Kind = Kind.LOAD_BALANCER, **fields) -> Route:
    return Route(**{"kind": kind, "backends": BOTH, "label": "ns/web:http", **fields})


POLICY_LOCAL = {"local_backends": backends(HERE)}
NONE_HERE = {"local_backends": frozenset(), "refusal": Refusal.DROP}
NOBODY = {"backends": frozenset(), "refusal": Refusal.REJECT}


def table(routes: dict[str, Route], facts: NodeFacts = FACTS, **fields) -> ForwardingTable:
    return ForwardingTable(
        family=Family.IPV4, node=facts, routes={at(text): route for text, route in routes.items()}, **fields
    )


def ask(
    where: ForwardingTable, to: str, source: str | Origin = "10.180.0.9", *, protocol=Protocol.TCP, interface: str = ""
) -> Explanation:
    host, _, port = to.rpartition(":")
    packet = Packet(
        destination=parse_address(host),
        protocol=protocol,
        port=int(port),
        source=None if isinstance(source, Origin) else parse_address(source),
        origin=source if isinstance(source, Origin) else None,
        interface=interface,
    )
    return explain(where, packet, LOCAL)


def shares(explanation: Explanation) -> dict[str, bool]:
    """The backends' addresses, and whether the source is masqueraded on the way to them."""
    assert isinstance(explanation.outcome, Reaches), explanation.outcome
    return {str(share.backend).rpartition(":")[0]: share.masqueraded for share in explanation.outcome.shares}


def clauses(explanation: Explanation) -> list[str]:
    return [step.clause for step in explanation.steps]


POD, NODE, CLIENT = "10.180.0.9", "192.168.0.2", "203.0.113.9"
KEPT, MASQUERADED = {HERE: False, THERE: False}, {HERE: True, THERE: True}


@pytest.mark.parametrize(
    ("facts", "source", "expected", "clause"),
    [
        pytest.param({}, POD, KEPT, "TRF-8", id="TRF-8 a pod keeps its source"),
        pytest.param({}, NODE, MASQUERADED, "TRF-6", id="TRF-6 the node is masqueraded"),
        pytest.param({}, CLIENT, MASQUERADED, "TRF-6", id="TRF-6 an outsider is masqueraded"),
        pytest.param({"masquerade_all": True}, POD, MASQUERADED, "TRF-6", id="TRF-6 masqueradeAll, pods too"),
        pytest.param({"detector": None}, CLIENT, KEPT, "TRF-6", id="TRF-6 without a detector nobody is"),
    ],
)
def test_who_is_masqueraded_at_a_cluster_ip(facts, source, expected, clause):
    where = table({"172.30.0.41:80": cluster_ip()}, msgspec.structs.replace(FACTS, **facts))
    found = ask(where, "172.30.0.41:80", source)
    assert shares(found) == expected
    assert clause in clauses(found)
    assert found.frontend == at("172.30.0.41:80")


@pytest.mark.parametrize(("source", "expected"), [(CLIENT, False), (POD, False), (NODE, True)])
def test_trf_9_what_a_program_of_the_node_itself_gets_from_outside_is_not_masqueraded(source, expected):
    """Sources are replaced of what leaves the node, and by its loopback leaves what it sends to itself."""
    routes = {"*:3001": external(Kind.NODE_PORT, backends=backends(NODE, THERE))}
    found = ask(table(routes), f"{NODE}:3001", source)
    assert shares(found) == {NODE: expected, THERE: True}
    assert ("kept on the way to" in str(found.steps)) is not expected
    relayed = msgspec.structs.replace(FACTS, relayed=True)
    assert shares(ask(table(routes, relayed), f"{NODE}:3001", source)) == {NODE: True, THERE: True}


@pytest.mark.parametrize(
    ("route", "source", "expected", "clause"),
    [
        pytest.param({}, POD, MASQUERADED, "TRF-5", id="TRF-5 Cluster, pod"),
        pytest.param({}, CLIENT, MASQUERADED, "TRF-5", id="TRF-5 Cluster, outsider"),
        pytest.param(POLICY_LOCAL, POD, KEPT, "TRF-4", id="TRF-4 Local, pod: short circuit"),
        pytest.param(POLICY_LOCAL, NODE, MASQUERADED, "TRF-4", id="TRF-4 Local, node: short circuit"),
        pytest.param(POLICY_LOCAL, CLIENT, {HERE: False}, "TRF-8", id="TRF-8 Local, outsider: source kept"),
        pytest.param(NONE_HERE, POD, KEPT, "TRF-4", id="TRF-4 Local, nothing here, pod"),
    ],
)
@pytest.mark.parametrize("kind", [Kind.EXTERNAL_IP, Kind.LOAD_BALANCER, Kind.NODE_PORT])
def test_external_policy_by_origin(kind, route, source, expected, clause):
    frontend, to = ("*:3001", "192.168.0.2:3001") if kind is Kind.NODE_PORT else ("1.2.3.4:80", "1.2.3.4:80")
    found = ask(table({frontend: external(kind, **route)}), to, source)
    assert (shares(found), found.local_list) == (expected, expected == {HERE: False})
    assert clause in clauses(found)


def test_trf_4_a_source_in_the_pods_network_is_a_pod_even_if_it_is_the_nodes():
    where = table({"1.2.3.4:80": external(**POLICY_LOCAL)})
    packet = Packet(destination=parse_address("1.2.3.4"), protocol=Protocol.TCP, port=80, source=parse_address(POD))
    found = explain(where, packet, LOCAL | {parse_address(POD)})
    assert found.origin is Origin.LOCAL_POD


@pytest.mark.parametrize(
    ("detector", "interface", "expected"),
    [
        (InputInterface("cni0"), "cni0", Origin.LOCAL_POD),
        (InputInterface("cni0"), "cni01", Origin.ELSEWHERE),
        (InputInterface("cni0"), "", Origin.ELSEWHERE),
        (InputInterfacePrefix("pod-"), "pod-7", Origin.LOCAL_POD),
        (InputInterfacePrefix("pod-"), "eth0", Origin.ELSEWHERE),
        (InputInterfacePrefix("pod-"), "", Origin.ELSEWHERE),
        (None, "cni0", Origin.ELSEWHERE),
    ],
)
def test_trf_10_pods_by_their_interface(detector, interface, expected):
    where = table({}, msgspec.structs.replace(FACTS, detector=detector))
    assert ask(where, "172.30.0.41:80", CLIENT, interface=interface).origin is expected


def test_trf_4_without_a_detector_some_pod_is_treated_like_an_outsider():
    where = table({"1.2.3.4:80": external(**POLICY_LOCAL)}, msgspec.structs.replace(FACTS, detector=None))
    found = ask(where, "1.2.3.4:80", Origin.LOCAL_POD)
    assert (found.origin, shares(found)) == (Origin.ELSEWHERE, {HERE: False})


def test_trf_7_only_the_backend_that_is_the_source_is_masqueraded():
    where = table({"172.30.0.41:80": cluster_ip()}, hairpins=endpoints(HERE, THERE))
    found = ask(where, "172.30.0.41:80", HERE)
    assert shares(found) == {HERE: True, THERE: False}
    assert [step.clause for step in found.steps if step.kind is StepKind.HAIRPIN] == ["TRF-7"]
    assert shares(ask(where, "172.30.0.41:80", POD)) == KEPT


def test_trf_7_a_hairpin_is_of_one_protocol():
    where = table({"172.30.0.41:80": cluster_ip()}, hairpins=endpoints(HERE, protocol=Protocol.UDP))
    assert shares(ask(where, "172.30.0.41:80", HERE)) == KEPT


def test_trf_24_affinity_is_told():
    found = ask(table({"172.30.0.41:80": cluster_ip(affinity=600)}), "172.30.0.41:80")
    assert isinstance(found.outcome, Reaches)
    assert found.outcome.affinity == 600
    assert "TRF-24" in clauses(found)


@pytest.mark.parametrize(
    ("source", "outcome", "clause"),
    [
        ("203.0.113.9", Reaches, "TRF-17"),
        ("203.0.113.200", Dropped(Why.SOURCE_RANGES), "TRF-17"),
        (POD, Dropped(Why.SOURCE_RANGES), "TRF-19"),
        (Origin.ELSEWHERE, Reaches, "TRF-17"),
        (Origin.LOCAL_POD, Dropped(Why.SOURCE_RANGES), "TRF-19"),
    ],
)
def test_trf_17_source_ranges_come_first(source, outcome, clause):
    route = external(source_ranges=networks("203.0.113.0/25"), **POLICY_LOCAL)
    found = ask(table({"1.2.3.4:80": route}), "1.2.3.4:80", source)
    assert isinstance(found.outcome, outcome) if isinstance(outcome, type) else found.outcome == outcome
    assert next(step.clause for step in found.steps if step.kind is StepKind.SOURCE_RANGES) == clause


def test_nft_11_a_blocked_source_of_a_service_without_endpoints_is_dropped():
    route = external(source_ranges=networks("203.0.113.0/25"), **NOBODY)
    assert ask(table({"1.2.3.4:80": route}), "1.2.3.4:80", "198.51.100.1").outcome == Dropped(Why.SOURCE_RANGES)
    assert ask(table({"1.2.3.4:80": route}), "1.2.3.4:80", "203.0.113.1").outcome == Rejected(Why.NO_ENDPOINTS)


@pytest.mark.parametrize(
    ("route", "outcome"),
    [
        (cluster_ip(**NOBODY), Rejected(Why.NO_ENDPOINTS)),
        (cluster_ip(backends=frozenset(), refusal=Refusal.DROP), Dropped(Why.NO_LOCAL_ENDPOINTS)),
    ],
)
def test_sel_11_a_cluster_ip_without_backends(route, outcome):
    found = ask(table({"172.30.0.41:80": route}), "172.30.0.41:80")
    assert (found.outcome, clauses(found)[-1]) == (outcome, "SEL-11")


def test_sel_11_policy_local_without_a_local_endpoint_drops_outsiders():
    found = ask(table({"1.2.3.4:80": external(**NONE_HERE)}), "1.2.3.4:80", CLIENT)
    assert (found.outcome, found.local_list) == (Dropped(Why.NO_LOCAL_ENDPOINTS), True)


@pytest.mark.parametrize(
    ("addresses", "to", "answers", "clause"),
    [
        (None, "192.168.0.2:3001", True, "TRF-20"),
        (None, "192.168.0.3:3001", True, "TRF-20"),
        (None, "127.0.0.1:3001", False, "TRF-21"),
        (["192.168.0.2"], "192.168.0.2:3001", True, "TRF-20"),
        (["192.168.0.2"], "192.168.0.3:3001", False, "TRF-20"),
        ([], "192.168.0.2:3001", False, "TRF-20"),
    ],
)
def test_trf_20_where_node_ports_answer(addresses, to, answers, clause):
    facts = msgspec.structs.replace(
        FACTS, node_port_addresses=None if addresses is None else frozenset(map(parse_address, addresses))
    )
    found = ask(table({"*:3001": external(Kind.NODE_PORT)}, facts), to, CLIENT)
    if answers:
        assert shares(found) == MASQUERADED
    else:
        assert found.outcome == Untouched(Why.NODE_PORT_ADDRESS)
        assert [step.frontend for step in found.steps if step.kind is StepKind.NODE_PORT_ADDRESS] == [at("*:3001")]
    assert clause in clauses(found)


def test_trf_20_a_node_port_is_none_of_other_hosts_business():
    found = ask(table({"*:3001": external(Kind.NODE_PORT)}), "198.51.100.7:3001", CLIENT)
    assert found.outcome == Untouched(Why.NO_FRONTEND)
    assert not [step for step in found.steps if step.frontend is not None]


def test_trf_21_loopback_node_ports_are_for_the_node_alone():
    facts = msgspec.structs.replace(FACTS, loopback_node_ports=True)
    where = table({"*:3001": external(Kind.NODE_PORT), "*:3002": external(Kind.NODE_PORT, **NOBODY)}, facts)
    assert shares(ask(where, "127.0.0.1:3001", "127.0.0.1")) == MASQUERADED
    assert ask(where, "127.0.0.1:3002", "127.0.0.1").outcome == Rejected(Why.NO_ENDPOINTS)
    for port in (3002, 3003):
        found = ask(where, f"127.0.0.1:{port}", CLIENT)
        assert (found.outcome, clauses(found)[-1]) == (Dropped(Why.LOOPBACK), "IPT-14")


def test_nft_28_an_address_comes_before_a_node_port():
    routes = {"192.168.0.2:3001": external(Kind.EXTERNAL_IP), "*:3001": external(Kind.NODE_PORT, **POLICY_LOCAL)}
    assert ask(table(routes), "192.168.0.2:3001", CLIENT).frontend == at("192.168.0.2:3001")


def test_nft_28_where_the_address_has_no_backend_the_node_port_is_asked():
    routes = {"192.168.0.2:3001": external(Kind.EXTERNAL_IP, **NOBODY), "*:3001": external(Kind.NODE_PORT)}
    found = ask(table(routes), "192.168.0.2:3001", CLIENT)
    assert (found.frontend, shares(found)) == (at("*:3001"), MASQUERADED)
    routes["*:3001"] = external(Kind.NODE_PORT, **NONE_HERE)
    found = ask(table(routes), "192.168.0.2:3001", CLIENT)
    assert (found.frontend, found.outcome) == (at("192.168.0.2:3001"), Rejected(Why.NO_ENDPOINTS))


@pytest.mark.parametrize(
    ("reject", "outcome", "clause"),
    [(True, Rejected(Why.CLOSED_PORT), "NFT-20"), (False, Untouched(Why.CLOSED_PORT), "TRF-13")],
)
def test_closed_ports_of_a_cluster_ip(reject, outcome, clause):
    facts = msgspec.structs.replace(FACTS, reject_closed_ports=reject)
    found = ask(table({"172.30.0.41:80": cluster_ip(**NOBODY)}, facts), "172.30.0.41:81")
    assert (found.outcome, clauses(found)[-1]) == (outcome, clause)
    [near] = [step for step in found.steps if step.kind is StepKind.NEAR_MISS]
    assert (near.frontend, near.label) == (at("172.30.0.41:80"), "ns/web:http")


def test_nft_20_unallocated_addresses_of_the_service_cidrs():
    assert ask(table({}), "172.30.0.99:80").outcome == Dropped(Why.UNALLOCATED)
    assert ask(table({}), "172.31.0.99:80").outcome == Untouched(Why.NO_FRONTEND)
    without = msgspec.structs.replace(FACTS, service_cidrs=())
    assert ask(table({}, without), "172.30.0.99:80").outcome == Untouched(Why.NO_FRONTEND)


def test_nft_20_what_is_addressed_to_the_node_itself_is_not_refused_on_its_way_in():
    where = table({"192.168.0.2:80": cluster_ip()})
    assert ask(where, "192.168.0.2:81", CLIENT).outcome == Untouched(Why.NO_FRONTEND)
    assert ask(where, "192.168.0.2:81", NODE).outcome == Rejected(Why.CLOSED_PORT)


def test_the_protocol_is_part_of_a_frontend():
    found = ask(table({"172.30.0.41:53": cluster_ip()}), "172.30.0.41:53", protocol=Protocol.UDP)
    [near] = [step for step in found.steps if step.kind is StepKind.NEAR_MISS]
    assert near.words == "172.30.0.41:53/TCP is the ClusterIP of ns/web:http, but the packet is UDP"


def test_near_misses_are_few_and_the_nearest_first():
    where = table({f"172.30.0.41:{port}": cluster_ip() for port in range(1000, 1100, 10)})
    near = [step.frontend.port for step in ask(where, "172.30.0.41:1041").steps if step.kind is StepKind.NEAR_MISS]
    assert near == [1040, 1050, 1030, 1060, 1020, 1070][:MOST_NEAR_MISSES]


def test_a_route_that_nothing_refuses_lets_packets_by():
    damaged = table({"1.2.3.4:80": external(backends=frozenset())}, damage=frozenset({"an element is missing"}))
    assert ask(damaged, "1.2.3.4:80").outcome == Untouched(Why.NO_ENDPOINTS)


# --- whatever the table ----------------------------------------------------------------------------------------------


@st.composite
def questions(draw: st.DrawFn) -> tuple[ForwardingTable, Packet, frozenset[Address]]:
    family = draw(st.sampled_from(list(Family)))
    where = draw(strategies.tables(family))
    addresses = [frontend.address for frontend in where.routes if frontend.address]
    backs = [backend.address for route in where.routes.values() for backend in route.backends]
    some = st.binary(min_size=family.address_bytes, max_size=family.address_bytes)
    known = [*addresses, *backs, *sorted(where.node.node_port_addresses or ())]
    any_address = st.sampled_from(known) | some if known else some
    ports = sorted({frontend.port for frontend in where.routes} | {1234})
    packet = Packet(
        destination=draw(any_address),
        protocol=draw(strategies.PROTOCOLS),
        port=draw(st.sampled_from(ports)),
        source=draw(st.none() | any_address),
        interface=draw(st.sampled_from(["", "cni0", "pod-1", "eth0.100"])),
        origin=draw(st.none() | st.sampled_from(list(Origin))),
    )
    return where, packet, frozenset(draw(st.lists(any_address, max_size=3)))


@given(questions())
def test_every_question_has_an_answer(question):
    where, packet, local = question
    found = explain(where, packet, local)
    assert found.steps or isinstance(found.outcome, Untouched)
    assert all(step.words and step.clause for step in found.steps)
    assert verdict(found.outcome)
    if not isinstance(found.outcome, Reaches):
        return
    assert math.isclose(sum(share.probability for share in found.outcome.shares), 1)
    route = where.routes[found.frontend]
    chosen = (route.local_backends if found.local_list else route.backends) or frozenset()
    assert {share.backend for share in found.outcome.shares} == chosen
    assert found.frontend in {
        Frontend(packet.destination, packet.protocol, packet.port),
        Frontend(b"", packet.protocol, packet.port),
    }


@given(questions(), st.data())
def test_what_does_not_match_is_of_no_consequence(question, data):
    """Without any one frontend that neither decided nor is at the address, the outcome is the same."""
    where, packet, local = question
    before = explain(where, packet, local)
    others = sorted(
        frontend
        for frontend in where.routes
        if frontend.address != packet.destination and (frontend.address or frontend.port != packet.port)
    )
    if not others:
        return
    gone = data.draw(st.sampled_from(others))
    routes = {frontend: route for frontend, route in where.routes.items() if frontend != gone}
    assert explain(msgspec.structs.replace(where, routes=routes), packet, local).outcome == before.outcome


def test_verdicts_in_words():
    share = Share(backend=Backend(parse_address(HERE), 80), probability=1.0, masqueraded=False)
    assert verdict(Reaches(shares=(share,), affinity=0)) == f"goes to {HERE}:80, its source kept"
    assert verdict(Rejected(Why.NO_ENDPOINTS)) == "is refused (ICMP port unreachable)"
    assert verdict(Dropped(Why.UNALLOCATED)) == "is dropped (the client hears nothing)"
    assert verdict(Untouched(Why.NO_FRONTEND)) == "goes on unchanged"
