"""The pure parts of the userspace dataplane: what is needed, what is read, what changes, what is counted."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.output import facts_lines
from proxy.userspace.anyip import LocalRoutes, RouteError, needed
from proxy.userspace.control import FrontendStats, StatsAnswer, TableAnswer, WireNode
from proxy.userspace.dataplane import CAPABILITIES
from proxy.userspace.decode import (
    Kernel,
    Worker,
    decode,
    listens,
    missing,
    own_addresses,
    places,
    raw_items,
    wire_node,
)
from proxy.userspace.known import Known, unreachable
from proxy.userspace.totals import OTHERS, ServicePort, Totals
from rules.dataplane import limits
from rules.diff import compare, fit
from rules.forwarding import (
    Backend,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    Route,
    apply_delta,
    difference,
    parse_address,
    parse_prefix,
)
from tests.strategies import deltas, tables

V4, V6 = Family.IPV4, Family.IPV6
OWN = {V4: [parse_prefix("127.0.0.0/8"), parse_prefix("127.0.0.1/32"), parse_prefix("192.168.50.11/32")],
       V6: [parse_prefix("::1/128"), parse_prefix("fe80::1/128"), parse_prefix("fd00:50::11/128")]}  # fmt: skip
VIP = parse_address("10.96.0.1")
WEB = Frontend(VIP, Protocol.TCP, 80)
NODE_PORT = Frontend(b"", Protocol.TCP, 30001)
BACKEND = frozenset({Backend(parse_address("10.244.1.1"), 8080)})


def route(kind: Kind = Kind.CLUSTER_IP, **fields) -> Route:
    return Route(
        kind=kind, backends=fields.pop("backends", BACKEND), label=fields.pop("label", "default/web"), **fields
    )


def table(routes=None, **node) -> ForwardingTable:
    return ForwardingTable(
        family=V4, node=NodeFacts(**node), routes={WEB: route()} if routes is None else routes, hairpins=frozenset()
    )


def held(wanted: ForwardingTable, *, workers: int = 2) -> tuple[list[Worker], Kernel]:
    """Workers and a kernel that hold all that a table takes."""
    others = frozenset(OWN[wanted.family])
    wanted = fit(wanted, CAPABILITIES[wanted.family])
    ours = needed({each.address for each in wanted.routes}, wanted.node.service_cidrs, others)
    routes = LocalRoutes(ours, others)
    node = wire_node(wanted.node, wanted.family, own_addresses(routes), workers, 30.0)
    answer = TableAnswer(serial="1", node=node, routes=list(wanted.routes.items()), hairpins=list(wanted.hairpins))
    here = {place for frontend, each in wanted.routes.items() if listens(each) for place in places(frontend, node)}
    inodes = {
        place: frozenset(1000 * number + worker for worker in range(workers)) for number, place in enumerate(here)
    }
    found = [
        Worker(worker, 100 + worker, answer, frozenset(1000 * number + worker for number in range(len(here))))
        for worker in range(workers)
    ]
    return found, Kernel(inodes, routes)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", Family)
@given(data=st.data())
def test_what_workers_and_kernel_hold_is_read_as_the_table_that_was_wanted(family: Family, data) -> None:
    wanted = data.draw(tables(family))
    workers, kernel = held(wanted)
    found = decode(family, workers, kernel)
    assert found is not None
    assert not compare(wanted, found, CAPABILITIES[family])
    assert found == fit(wanted, CAPABILITIES[family])
    list(raw_items(workers, kernel, found))


def test_nothing_is_read_where_there_are_neither_workers_nor_routes() -> None:
    kernel = Kernel({}, LocalRoutes(frozenset(), frozenset(OWN[V4])))
    assert decode(V4, [], kernel) is None
    assert decode(V4, [Worker(0, 1, TableAnswer(), frozenset())], kernel) is None


def test_a_listener_that_is_closed_is_a_missing_frontend() -> None:
    workers, kernel = held(table())
    found = decode(V4, workers, kernel._replace(listeners={}))
    assert found is not None
    assert not found.routes
    assert missing(workers, kernel._replace(listeners={})) == {0: {WEB}, 1: {WEB}}


def test_a_socket_of_somebody_else_at_the_place_does_not_count() -> None:
    workers, kernel = held(table())
    strange = {place: frozenset({7}) for place in kernel.listeners}
    found = decode(V4, workers, kernel._replace(listeners=strange))
    assert found is not None
    assert not found.routes


def test_a_listener_that_one_worker_lacks_is_damage() -> None:
    workers, kernel = held(table())
    found = decode(V4, [workers[0]._replace(inodes=frozenset()), workers[1]], kernel)
    assert found is not None
    assert found.damage == {"worker 0 does not listen at 10.96.0.1:80/TCP"}
    assert WEB in found.routes


def test_a_node_port_needs_a_listener_at_each_address() -> None:
    workers, kernel = held(table({NODE_PORT: route(Kind.NODE_PORT)}, loopback_node_ports=True))
    assert len(kernel.listeners) == 2
    _, *rest = kernel.listeners
    left = {place: kernel.listeners[place] for place in rest}
    assert missing(workers, kernel._replace(listeners=left)) == {0: {NODE_PORT}, 1: {NODE_PORT}}


def test_a_route_that_is_deleted_is_a_missing_frontend() -> None:
    workers, kernel = held(table())
    gone = kernel._replace(routes=kernel.routes._replace(ours=frozenset()))
    found = decode(V4, workers, gone)
    assert found is not None
    assert not found.routes


def test_a_network_whose_route_is_deleted_is_a_fact_that_differs() -> None:
    wanted = table(service_cidrs=(parse_prefix("10.96.0.0/16"),))
    workers, kernel = held(wanted)
    assert kernel.routes.ours == {parse_prefix("10.96.0.0/16")}
    found = decode(V4, workers, kernel._replace(routes=kernel.routes._replace(ours=frozenset())))
    drift = compare(wanted, found, CAPABILITIES[V4])
    assert [each.what for each in drift.node] == ["service CIDRs"]
    assert len(drift.frontends) == 1


def test_an_address_that_no_frontend_has_is_damage_unless_flows_use_it() -> None:
    workers, kernel = held(table())
    stray = parse_prefix("10.96.0.9/32")
    kernel = kernel._replace(routes=kernel.routes._replace(ours=kernel.routes.ours | {stray}))
    found = decode(V4, workers, kernel)
    assert found is not None
    assert found.damage == {"10.96.0.9/32 is an address of the node, and no Service has it"}
    found = decode(V4, workers, kernel, {stray.address})
    assert found is not None
    assert not found.damage


def test_a_port_that_somebody_else_holds_is_no_frontend_and_no_damage() -> None:
    workers, kernel = held(table())
    troubled = [
        each._replace(answer=msgspec.structs.replace(each.answer, trouble=[(WEB, "address in use")]))
        for each in workers
    ]
    found = decode(V4, troubled, kernel._replace(listeners={}))
    assert found is not None
    assert not found.routes
    assert not found.damage
    assert missing(troubled, kernel._replace(listeners={})) == {0: frozenset(), 1: frozenset()}


def test_workers_that_are_fewer_than_they_should_be_are_damage() -> None:
    workers, kernel = held(table())
    found = decode(V4, workers[:1], kernel)
    assert found is not None
    assert found.damage == {"1 of 2 workers run"}
    found = decode(V4, [], kernel)
    assert found is not None
    assert "no worker runs" in found.damage
    assert not found.routes


def test_a_worker_that_serves_something_else_is_damage() -> None:
    workers, kernel = held(table())
    other = msgspec.structs.replace(workers[1].answer, routes=[(WEB, route(affinity=5))])
    found = decode(V4, [workers[0], workers[1]._replace(answer=other)], kernel)
    assert found is not None
    assert found.damage == {"workers 0 and 1 differ in what they do at 10.96.0.1:80/TCP"}


def test_what_a_frontend_is_served_by_is_listed_for_people() -> None:
    workers, kernel = held(table())
    found = decode(V4, workers, kernel)
    assert found is not None
    items = list(raw_items(workers, kernel, found))
    assert [each.text for each in items] == [
        "worker 0, process 100",
        "listens at 10.96.0.1:80/TCP",
        "worker 1, process 101",
        "listens at 10.96.0.1:80/TCP",
        "route local 10.96.0.1/32 dev lo",
    ]
    assert [each.frontends for each in items] == [(), (WEB,), (), (WEB,), (WEB,)]


# --- the node ----------------------------------------------------------------------------------------------------


def test_node_ports_without_addresses_are_on_all_that_one_can_name() -> None:
    own = {V4: own_addresses(LocalRoutes(frozenset(), frozenset(OWN[V4]))),
           V6: own_addresses(LocalRoutes(frozenset(), frozenset(OWN[V6])))}  # fmt: skip
    node = wire_node(NodeFacts(), V4, own[V4], 2, 30.0)
    assert node.node_port_addresses == {parse_address("192.168.50.11")}
    assert node.local_addresses == own[V4]
    assert wire_node(NodeFacts(), V6, own[V6], 2, 30.0).node_port_addresses == {parse_address("fd00:50::11")}
    loopback = wire_node(NodeFacts(loopback_node_ports=True, node_port_addresses=frozenset()), V4, own[V4], 2, 30.0)
    assert loopback.node_port_addresses == {parse_address("127.0.0.1")}


# --- routes ------------------------------------------------------------------------------------------------------


def test_addresses_of_the_node_and_of_its_networks_take_no_route_of_their_own() -> None:
    network = parse_prefix("10.96.0.0/16")
    addresses = [parse_address(each) for each in ("10.96.0.1", "192.168.50.11", "203.0.113.1", "127.0.0.9")]
    assert needed(addresses, [network], OWN[V4]) == {network, parse_prefix("203.0.113.1/32")}
    assert needed(addresses, [], OWN[V4]) == {parse_prefix("10.96.0.1/32"), parse_prefix("203.0.113.1/32")}


def known(wanted: ForwardingTable) -> Known:
    _, kernel = held(wanted)
    return Known(fit(wanted, CAPABILITIES[wanted.family]), WireNode(), kernel.routes)


@given(several=deltas(V4))
def test_deltas_keep_the_routes_that_the_table_takes_and_no_others(several) -> None:
    now = several[0]
    state = known(now)
    for after in several[1:]:
        delta = state.fitted(difference(now, after), CAPABILITIES[V4])
        add, remove = state.take(delta)
        state.local = state.local._replace(ours=(state.local.ours | add) - remove)
        now = after
        assert state.table() == fit(now, CAPABILITIES[V4])
        wanted = needed({each.address for each in state.routes}, state.facts.service_cidrs, state.local.others)
        assert state.local.ours == wanted
        assert not add & remove


def test_an_address_that_several_ports_share_keeps_its_route_until_the_last_of_them_goes() -> None:
    other = WEB._replace(port=443)
    state = known(table({WEB: route(), other: route()}))
    assert state.take(Delta(removed=frozenset({WEB}))) == (frozenset(), frozenset())
    assert state.take(Delta(removed=frozenset({other}))) == (frozenset(), {Prefix(VIP, 32)})


def test_an_address_that_goes_and_comes_in_one_delta_keeps_its_route() -> None:
    other = WEB._replace(port=443)
    state = known(table())
    assert state.take(Delta(removed=frozenset({WEB}), changed={other: route()})) == (frozenset(), frozenset())


def test_a_route_that_is_refused_is_the_trouble_of_the_frontends_behind_it() -> None:
    error = RouteError(1, Prefix(VIP, 32))
    local = LocalRoutes(frozenset(), frozenset(OWN[V4]))
    wanted = table({WEB: route(), NODE_PORT: route(Kind.NODE_PORT)})
    assert list(unreachable(wanted, [error], local)) == [WEB]
    assert unreachable(wanted, [], local) == {}


# --- what it cannot do -------------------------------------------------------------------------------------------


def test_capabilities_are_told_in_words() -> None:
    told = " ".join(limits(CAPABILITIES[V4]))
    assert "SCTP" in told
    assert "source" in told
    assert not limits(msgspec.structs.replace(CAPABILITIES[V4], source_address=True, sctp=True))


def test_dump_says_of_addresses_what_a_proxy_does_with_them() -> None:
    facts = NodeFacts(loopback_node_ports=True, service_cidrs=(parse_prefix("10.96.0.0/16"),))
    said = "\n".join(facts_lines(fit(ForwardingTable(family=V4, node=facts), CAPABILITIES[V4])))
    assert "127.0.0.1" in said
    assert "unallocated addresses are refused" in said
    assert "mark" not in said


def test_sctp_and_the_mark_are_no_drift_and_a_scheduler_is() -> None:
    sctp = Frontend(VIP, Protocol.SCTP, 80)
    wanted = table({WEB: route(scheduler="round-robin"), sctp: route()}, mark=8, masquerade_all=True)
    workers, kernel = held(wanted)
    assert not compare(wanted, decode(V4, workers, kernel), CAPABILITIES[V4])
    workers, kernel = held(table())
    drift = compare(wanted, decode(V4, workers, kernel), CAPABILITIES[V4])
    [frontend] = drift.frontends
    assert [change.what for change in frontend.changes] == ["scheduler"]


@pytest.mark.parametrize(
    ("each", "listening"),
    [
        (route(), True),
        (route(backends=frozenset(), refusal=Refusal.REJECT), False),
        (route(backends=frozenset(), refusal=Refusal.DROP), True),
    ],
)
def test_there_is_a_listener_unless_the_kernel_is_to_refuse(each: Route, listening: bool) -> None:
    assert listens(each) is listening


# --- figures -----------------------------------------------------------------------------------------------------


def stats(total: int, *, frontend: Frontend = WEB, label: str = "default/web", open_: int = 0) -> FrontendStats:
    return FrontendStats(
        frontend=frontend,
        family=V4,
        label=label,
        open=open_,
        total=total,
        bytes_in=10 * total,
        bytes_out=20 * total,
        failures=0,
        connect_seconds=0.5 * total,
        connects=[total, *[0] * 12],
    )


def test_figures_of_several_workers_and_frontends_are_summed_by_service_port() -> None:
    totals = Totals(V4)
    totals.take([(1, StatsAnswer(frontends=[stats(3, open_=1), stats(2, frontend=NODE_PORT)])),
                 (2, StatsAnswer(frontends=[stats(5, open_=2)]))])  # fmt: skip
    [(port, sums)] = totals.sums().items()
    assert port == ServicePort("default/web", "TCP")
    assert (sums.total, sums.open, sums.bytes_in, sums.connects[0]) == (10, 3, 100, 10)
    assert totals.workers == 2


def test_sums_never_shrink_when_a_worker_dies_or_forgets() -> None:
    totals = Totals(V4)
    totals.take([(1, StatsAnswer(frontends=[stats(3, open_=1)])), (2, StatsAnswer(frontends=[stats(5)]))])
    totals.take([(2, StatsAnswer(frontends=[stats(6)]))])
    [sums] = totals.sums().values()
    assert (sums.total, sums.open) == (9, 0)
    totals.take([])
    totals.take([(3, StatsAnswer(frontends=[stats(1)]))])
    [sums] = totals.sums().values()
    assert sums.total == 10


def test_a_service_that_is_gone_has_no_figures() -> None:
    totals = Totals(V4)
    totals.take([(1, StatsAnswer(frontends=[stats(3)]))])
    totals.take([(1, StatsAnswer(frontends=[stats(1, label="default/other")]))])
    assert [port.label for port in totals.sums()] == ["default/other"]


def test_the_number_of_service_ports_is_bounded() -> None:
    totals = Totals(V4, most=2)
    several = [stats(1, frontend=WEB._replace(port=port), label=f"default/{port}") for port in range(1, 10)]
    totals.take([(1, StatsAnswer(frontends=several))])
    found = totals.sums()
    assert len(found) == 3
    assert found[ServicePort(OTHERS, "")].total == 7
    totals.take([])
    assert sum(each.total for each in totals.sums().values()) == 9


def test_apply_delta_is_what_known_becomes() -> None:
    before, after = table(), table({NODE_PORT: route(Kind.NODE_PORT)})
    state = known(before)
    delta = state.fitted(difference(before, after), CAPABILITIES[V4])
    state.take(delta)
    assert state.table() == fit(apply_delta(before, difference(before, after)), CAPABILITIES[V4])
