"""Endpoint selection, case by case (SEL-*, B-T1 to B-T25) and merging (EPS-*)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.compute import Decision, compute, decide
from proxy.objects import HEADLESS_LABEL, EndpointSlice, Hint
from proxy.selection import Member, Misfit, Reason, Selection, Topology, members, merge, select, verdict
from rules.forwarding import Backend, Family, Kind, Refusal
from tests.builders import NODE, OTHER, at, backends, endpoint, endpoint_slice, service, view

HERE = "zone-a"


def address(index: int) -> str:
    return f"10.1.2.{index}"


class Case(NamedTuple):
    """A case of TestCategorizeEndpoints: endpoints .1, .2, ... and which of them each list has."""

    id: str
    endpoints: Sequence[dict[str, object]]
    cluster: Sequence[int] | None
    """None: no path uses the list."""
    local: Sequence[int] | None
    has_any: bool = True
    itp: str = "Cluster"
    etp: str = "Cluster"
    node_port: int = 0
    zone: str = HERE


def eps(*descriptions: str) -> list[dict[str, object]]:
    """Endpoints from words: a condition (default R), `here`, `z:a+b` zone hints, `n:x+y` node hints."""
    made = []
    for index, description in enumerate(descriptions, start=1):
        where, condition, zones, nodes = OTHER, "R", [], []
        for word in description.split():
            if word == "here":
                where = NODE
            elif word.startswith("z:"):
                zones = [f"zone-{name}" for name in word[2:].split("+")]
            elif word.startswith("n:"):
                nodes = [NODE if name == "here" else name for name in word[2:].split("+")]
            else:
                condition = word
        made.append(endpoint(address(index), where, condition, zones=zones, nodes=nodes))
    return made


ZONES = eps("z:a here", "z:b here", "z:c", "z:a")

CASES = [
    Case("B-T1", ZONES, [1, 4], None),
    Case("B-T2", ZONES, [1, 4], [1, 2], etp="Local", node_port=3000),
    Case("B-T3", ZONES, None, [1, 2], itp="Local"),
    Case("B-T3 with node port", ZONES, [1, 4], [1, 2], itp="Local", node_port=3000),
    Case("B-T4 no zone", ZONES, [1, 2, 3, 4], None, zone=""),
    Case("B-T4 other zone", ZONES, [1, 2, 3, 4], None, zone="zone-x"),
    Case("B-T5", eps("z:a N", "z:b", "z:c", "z:a"), [4], None),
    Case("B-T6", eps("z:a N", "z:b", "z:c"), [2, 3], None),
    Case("B-T7", eps("z:a", "z:b", "z:c", ""), [1, 2, 3, 4], None),
    Case("B-T8", eps("z:a+b+c", "z:b+c", "z:b+d", "z:c+a"), [1, 4], None),
    Case("B-T10", eps("z:a n:here", "z:b n:node-2", "z:a n:node-3"), [1], None),
    Case("B-T11", eps("z:a n:here", "z:b n:node-2", ""), [1, 2, 3], None),
    Case("B-T11 zones whole", eps("z:a n:here", "z:b n:node-2", "z:a"), [1, 3], None),
    Case("B-T12", eps("z:a n:node-2", "z:b n:node-3", "z:a n:node-4"), [1, 3], None),
    Case("B-T13", eps("z:a", "z:b here", "z:c"), [1], [2], etp="Local", node_port=3000),
    Case("B-T14", [], None, [], has_any=False, itp="Local"),
    Case("B-T15", eps("", ""), None, [], itp="Local"),
    Case("B-T16", eps("here", "", "here"), None, [1, 3], itp="Local"),
    Case("B-T17", eps("N", "N"), [], None, has_any=False),
    Case("B-T18", eps("ST", "ST"), [1, 2], None),
    Case("B-T19", eps("here", ""), [1, 2], [1], itp="Local", node_port=3000),
    Case("B-T20", eps("", ""), [1, 2], [], itp="Local", etp="Local", node_port=3000),
    Case("B-T21", eps("ST", "ST"), [1, 2], [], itp="Local", etp="Local", node_port=3000),
    Case("B-T22", eps("", "ST here"), [1], [2], etp="Local", node_port=3000),
    Case("B-T23", eps("", "here"), [1, 2], None, etp="Local"),
    Case("B-T24", eps("", "here"), None, [2], itp="Local"),
    Case("B-T25", eps("T"), [], None, has_any=False),
    Case("SEL-3 topology ignored in the fallback", eps("ST z:b", "ST z:a"), [1, 2], None),
    Case("SEL-8 local list ignores hints", eps("here z:b", "z:a"), [2], [1], etp="Local", node_port=3000),
    Case("SEL-15 serving but neither ready nor terminating", eps("N"), [], None, has_any=False),
    Case("SEL-15 terminating and not serving", eps("T", "ST"), [2], None),
    Case("EPS-8 ready while terminating", eps("P", "ST"), [1], None),
    Case("EPS-8 unknown conditions", [endpoint(address(1), condition="")], [1], None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_lists_of_the_behaviour_table(case: Case) -> None:
    svc = service(
        type="NodePort" if case.node_port else "ClusterIP",
        ports=[{"port": 80, "nodePort": case.node_port}],
        internalTrafficPolicy=case.itp,
        externalTrafficPolicy=case.etp,
    )
    slices, here = [endpoint_slice(case.endpoints)], view(zone=case.zone)
    by_list: dict[str, set[str] | None] = {"cluster": set(), "local": set()}
    decisions = decide(svc, slices, here, Family.IPV4)
    for decision in decisions:
        for name, reason in (("cluster", decision.cluster), ("local", decision.local)):
            if reason is None:
                by_list[name] = None
            elif reason is Reason.USED and (found := by_list[name]) is not None:
                found.add(decision.endpoint)
    expected = {
        name: None if indexes is None else {f"{address(index)}:80" for index in indexes}
        for name, indexes in (("cluster", case.cluster), ("local", case.local))
    }
    if case.endpoints:
        assert by_list == expected
    routes = compute(svc, slices, here, Family.IPV4).routes
    cluster_ip = routes[at("172.30.0.41:80")]
    used = case.local if case.itp == "Local" else case.cluster
    assert cluster_ip.backends == backends(*map(address, used or ()))
    no_list = None if used else Refusal.DROP if case.has_any else Refusal.REJECT
    assert cluster_ip.refusal == no_list
    if case.node_port:
        node_port = routes[at(f"*:{case.node_port}")]
        assert node_port.kind is Kind.NODE_PORT
        assert node_port.backends == backends(*map(address, case.cluster or ()))
        assert node_port.local_backends == (backends(*map(address, case.local or ())) if case.etp == "Local" else None)


def found_in(slices: Iterable[EndpointSlice], family: Family = Family.IPV4) -> list[tuple[tuple[str, str], str]]:
    return [(each[0], str(each[1].backend)) for each in members(slices, family, NODE) if not isinstance(each, Misfit)]


def misfits_in(*slices: EndpointSlice) -> list[tuple[str, Reason]]:
    return [(each.text, each.reason) for each in members(slices, Family.IPV4, NODE) if isinstance(each, Misfit)]


def test_eps6_every_port_of_a_slice_makes_an_endpoint_of_its_name_and_protocol() -> None:
    ports = [{"name": "", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    assert found_in([endpoint_slice([endpoint("10.0.0.1")], ports=ports)]) == [
        (("", "TCP"), "10.0.0.1:80"),
        (("dns", "UDP"), "10.0.0.1:53"),
    ]


def test_eps6_ports_without_name_or_number_are_passed_over() -> None:
    ports: list[dict[str, Any]] = [{"port": 80}, {"name": "a"}, {"name": "b", "port": 0}, {"name": "c", "port": 1}]
    each = endpoint_slice([endpoint("10.0.0.1")], ports=ports)
    assert found_in([each]) == [(("c", "TCP"), "10.0.0.1:1")]
    assert misfits_in(each) == [
        ("ports[0]", Reason.NO_PORT_NAME),
        ("ports[1]", Reason.NO_PORT_NUMBER),
        ("ports[2]", Reason.NO_PORT_NUMBER),
    ]


def test_eps7_only_the_first_address_counts_and_bad_ones_stay_alone() -> None:
    several = endpoint("010.0.0.001") | {"addresses": ["010.0.0.001", "10.0.0.2"]}
    none = endpoint("x") | {"addresses": []}
    each = endpoint_slice([several, none, endpoint("10.0.0"), endpoint("fd00::1"), endpoint("10.0.0.9")])
    assert [found for _, found in found_in([each])] == ["10.0.0.1:80", "10.0.0.9:80"]
    assert misfits_in(each) == [
        ("endpoints[1]", Reason.NO_ADDRESS),
        ("'10.0.0'", Reason.BAD_ADDRESS),
        ("'fd00::1'", Reason.BAD_ADDRESS),
    ]


@pytest.mark.parametrize(
    ("node_name", "endpoint_node", "local"),
    [(NODE, NODE, True), (NODE, OTHER, False), (NODE, None, False), (NODE, NODE.upper(), False), ("", "", False)],
)
def test_eps7_local_is_what_names_this_node(node_name: str, endpoint_node: str | None, local: bool) -> None:
    each = endpoint_slice([endpoint("10.0.0.1", endpoint_node)])
    found = [item for item in members([each], Family.IPV4, node_name) if not isinstance(item, Misfit)]
    assert [member.local for _, member in found] == [local]


def test_eps3_slices_of_the_other_family_are_none_and_fqdn_is_told() -> None:
    six = endpoint_slice([endpoint("fd00::1")], address_type="IPv6")
    fqdn = endpoint_slice([endpoint("a.example")], address_type="FQDN")
    assert found_in([six, fqdn]) == []
    assert found_in([six, fqdn], Family.IPV6) == [(("", "TCP"), "[fd00::1]:80")]
    assert misfits_in(six, fqdn) == [("FQDN", Reason.BAD_ADDRESS_TYPE)]


def test_eps1_slices_of_headless_services_are_none() -> None:
    assert found_in([endpoint_slice([endpoint("10.0.0.1")], labels={HEADLESS_LABEL: ""})]) == []


def test_b235_slices_with_overlapping_endpoints_merge() -> None:
    one = endpoint_slice([endpoint("10.0.1.1"), endpoint("10.0.1.2")], name="one")
    two = endpoint_slice([endpoint("10.0.1.2"), endpoint("10.0.1.3")], name="two")
    routes = compute(service(), [two, one], view(), Family.IPV4).routes
    assert routes[at("172.30.0.41:80")].backends == backends("10.0.1.1", "10.0.1.2", "10.0.1.3")


def test_b235_one_service_port_may_have_several_target_ports() -> None:
    one = endpoint_slice([endpoint("10.0.1.1")], name="one", ports=[{"name": "", "port": 8080}])
    two = endpoint_slice([endpoint("10.0.1.1")], name="two", ports=[{"name": "", "port": 8081}])
    routes = compute(service(), [one, two], view(), Family.IPV4).routes
    assert routes[at("172.30.0.41:80")].backends == backends("10.0.1.1 8080", "10.0.1.1 8081")


@pytest.mark.parametrize(
    ("first", "second", "survivor"),
    [("ST", "R", 1), ("R", "ST", 0), ("R", "N", 1), ("ST", "T", 0), ("T", "ST", 0), ("N", "P", 0)],
)
def test_eps10_a_terminating_duplicate_never_replaces_another(first: str, second: str, survivor: int) -> None:
    """The address of a pod that goes may already be a new pod's; slices are taken by name, however they come."""
    one = endpoint_slice([endpoint("10.0.1.1", condition=first)], name="one")
    two = endpoint_slice([endpoint("10.0.1.1", condition=second)], name="two")
    for slices in ([one, two], [two, one]):
        found = [item[1] for item in members(slices, Family.IPV4, NODE) if not isinstance(item, Misfit)]
        assert [member.slice for member in merge(found)] == [["one", "two"][survivor]]


def test_decisions_tell_why_each_entry_is_not_used() -> None:
    svc = service(type="NodePort", ports=[{"port": 80, "nodePort": 3000}], externalTrafficPolicy="Local")
    ports: list[dict[str, Any]] = [{"name": "", "port": 80}, {"name": "metrics", "port": 9090}]
    one = endpoint_slice(eps("here z:a", "z:b", "N", "ST here", "T"), name="one", ports=ports[:1])
    broken_ports: list[dict[str, Any]] = [{"port": 1}, ports[1]]
    two = endpoint_slice(
        [endpoint(address(1)), endpoint("nonsense"), endpoint(address(7))], name="two", ports=broken_ports
    )
    three = endpoint_slice([endpoint(address(2), condition="ST")], name="three", ports=ports[:1])
    assert [
        (decision.slice, decision.endpoint, decision.cluster, decision.local)
        for decision in decide(svc, [two, one, three], view(zone=HERE), Family.IPV4)
    ] == [
        ("one", "10.1.2.1:80", Reason.USED, Reason.USED),
        ("one", "10.1.2.2:80", Reason.OTHER_ZONE, Reason.NOT_LOCAL),
        ("one", "10.1.2.3:80", Reason.NOT_READY, Reason.NOT_LOCAL),
        ("one", "10.1.2.4:80", Reason.TERMINATING, Reason.TERMINATING),
        ("one", "10.1.2.5:80", Reason.NOT_SERVING, Reason.NOT_LOCAL),
        ("three", "10.1.2.2:80", Reason.DUPLICATE, Reason.DUPLICATE),
        ("two", "ports[0]", Reason.NO_PORT_NAME, Reason.NO_PORT_NAME),
        ("two", "10.1.2.1:9090", Reason.NOT_A_SERVICE_PORT, Reason.NOT_A_SERVICE_PORT),
        ("two", "'nonsense'", Reason.BAD_ADDRESS, Reason.BAD_ADDRESS),
        ("two", "10.1.2.7:9090", Reason.NOT_A_SERVICE_PORT, Reason.NOT_A_SERVICE_PORT),
    ]


def test_decisions_name_the_hint_that_counted_and_the_port() -> None:
    slices = [endpoint_slice(eps("n:here", "n:elsewhere"))]
    decisions = decide(service(), slices, view(), Family.IPV4)
    assert decisions[1] == Decision(
        port="ns/svc/TCP", endpoint="10.1.2.2:80", slice="svc-1", node=OTHER, cluster=Reason.OTHER_NODE, local=None
    )
    assert decisions[0].used
    assert not decisions[1].used


def test_a_service_without_rules_has_no_decisions() -> None:
    slices = [endpoint_slice(eps("here"))]
    assert decide(service(cluster_ip="None"), slices, view(), Family.IPV4) == ()
    assert decide(service(), slices, view(), Family.IPV6) == ()


def test_every_reason_has_words_and_a_clause() -> None:
    assert all(reason.text and reason.clause[:4] in ("SEL-", "EPS-") for reason in Reason)


_MEMBERS = st.builds(
    Member,
    backend=st.builds(Backend, st.integers(1, 6).map(lambda host: bytes([10, 0, 0, host])), st.just(80)),
    node=st.just(""),
    local=st.booleans(),
    ready=st.booleans(),
    serving=st.booleans(),
    terminating=st.booleans(),
    zones=st.lists(st.sampled_from("ab").map(Hint), max_size=2).map(tuple),
    nodes=st.lists(st.sampled_from([NODE, OTHER]).map(Hint), max_size=2).map(tuple),
    slice=st.just("s"),
)


def naive(endpoints: Sequence[Member], node_name: str, zone: str) -> tuple[set[Backend], set[Backend], bool]:
    """Selection in the words of SEL-3 to SEL-6."""
    ready = [each for each in endpoints if each.ready]
    kept = ready
    if ready and all(each.nodes for each in ready) and any(Hint(node_name) in each.nodes for each in ready):
        kept = [each for each in ready if Hint(node_name) in each.nodes]
    elif ready and all(each.zones for each in ready) and any(Hint(zone) in each.zones for each in ready):
        kept = [each for each in ready if Hint(zone) in each.zones]
    leaving = [each for each in endpoints if each.serving and each.terminating]
    local = [each for each in ready if each.local] or [each for each in leaving if each.local]
    return {each.backend for each in kept or leaving}, {each.backend for each in local}, bool(ready or leaving)


@given(st.lists(_MEMBERS, max_size=8).map(merge), st.sampled_from(["", "a", "c"]))
def test_selection_is_what_the_clauses_say(endpoints: tuple[Member, ...], zone: str) -> None:
    selection = select(endpoints, NODE, zone)
    assert (set(selection.cluster), set(selection.local), selection.has_any) == naive(endpoints, NODE, zone)
    assert bool(selection.cluster) == selection.has_any
    if not any(member.ready for member in endpoints):
        assert selection.topology is Topology.NONE
    for member in endpoints:
        check_verdict(member, selection)


def check_verdict(member: Member, selection: Selection) -> None:
    cluster, local = verdict(member, selection)
    assert (cluster is Reason.USED) == (member.backend in selection.cluster)
    assert (local is Reason.USED) == (member.backend in selection.local)
    if cluster in (Reason.OTHER_NODE, Reason.OTHER_ZONE):
        assert member.ready
        assert selection.topology is not Topology.NONE
    for reason in (cluster, local):
        assert (reason is Reason.TERMINATING) <= (member.terminating and member.serving)
    if local is Reason.NOT_LOCAL:
        assert not member.local
