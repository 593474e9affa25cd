"""Section 11.14 of the behaviour document: what kube-proxy's own tests of its ipvs mode ask for, in our layout.

Where kube-proxy has a virtual server for each address of the node, we have one by mark, and an element that leads
there.  Packets through all of these are in tests/scenarios.
"""

from __future__ import annotations

from typing import Any

import pytest

from proxy.compute import Outcome, compute
from rules.forwarding import Address, Family, NodeFacts, Protocol, parse_address
from rules.ipvs.layout import Layout, State, addresses_of, joined
from rules.ipvs.marks import Numbers, scheme
from rules.ipvs.messages import PERSISTENT, Key
from rules.ipvs.plan import Delete, Unbind, steps
from rules.ipvs.sets import Set
from rules.netlink.ipset import Element
from tests.builders import NODE, at, endpoint, endpoint_slice, service, view

LOCAL, REMOTE = "10.180.0.1", "10.180.2.1"
BOTH = (endpoint(LOCAL, NODE), endpoint(REMOTE))
NODE_PORT = {"port": 80, "nodePort": 3001}


def of(*objects: Any, slices: Any = (), own: frozenset[Address] = frozenset()) -> State:
    """What Services come to in IPv4, on a node with addresses of its own."""
    outcomes: list[Outcome] = [compute(each, slices, view("ipvs"), Family.IPV4) for each in objects]
    routes = {frontend: route for outcome in outcomes for frontend, route in outcome.routes.items()}
    hairpins = frozenset[Any]().union(*(outcome.hairpins for outcome in outcomes))
    layout = Layout(Family.IPV4, NodeFacts(), Numbers({}), own, "rr")
    return joined(layout.state(routes, hairpins), layout.bound(addresses_of(routes)))


def given(state: State, where: str, protocol: Protocol = Protocol.TCP) -> set[str] | None:
    """The backends of a virtual server by address; None: there is none."""
    frontend = at(where, protocol)
    server = state.servers.get(Key(Family.IPV4, protocol, frontend.address, frontend.port))
    return None if server is None else {str_of(target.address) for target in server.reals}


def by_mark(state: State, which: Set, port: int, protocol: Protocol = Protocol.TCP) -> set[str] | None:
    """Those of the virtual server to which both elements of a node port lead."""
    marks = {
        extra.mark for element, extra in state.of(which).items() if (element.protocol, element.port) == (protocol, port)
    }
    if not marks:
        return None
    [mark] = marks
    return {str_of(target.address) for target in state.servers[Key(Family.IPV4, mark=mark)].reals}


def str_of(address: Address) -> str:
    return ".".join(map(str, address))


def slices(*endpoints: Any, **fields: Any) -> tuple[Any, ...]:
    return (endpoint_slice(endpoints or BOTH, **fields),)


def test_b_200_a_node_port_is_one_server_for_all_addresses() -> None:
    """B-200."""
    state = of(service(ports=[NODE_PORT], type="NodePort"), slices=slices(endpoint(LOCAL, NODE)))
    assert given(state, "172.30.0.41:80") == {LOCAL}
    assert by_mark(state, Set.NODE_PORT, 3001) == {LOCAL}
    assert len(state.servers) == 2


@pytest.mark.parametrize("protocol", list(Protocol))
def test_b_201_b_203_node_ports_of_every_protocol_are_masqueraded_by_their_mark(protocol: Protocol) -> None:
    """B-201, B-203."""
    port = NODE_PORT | {"protocol": protocol.name}
    ours = slices(*BOTH, ports=[{"name": "", "port": 80, "protocol": protocol.name}])
    state = of(service(ports=[port], type="NodePort"), slices=ours)
    assert by_mark(state, Set.NODE_PORT, 3001, protocol) == {LOCAL, REMOTE}
    marks = scheme(NodeFacts().mark)
    assert all(extra.mark & marks.always for extra in state.of(Set.NODE_PORT).values())
    assert not state.of(Set.NODE_PORT_LOCAL)


def test_b_202_b_205_without_endpoints_servers_are_there_and_empty() -> None:
    """B-202, B-205."""
    state = of(service(ports=[NODE_PORT], type="NodePort", externalIPs=["50.60.70.81"]))
    assert given(state, "172.30.0.41:80") == given(state, "50.60.70.81:80") == set()
    assert by_mark(state, Set.NODE_PORT, 3001) == set()


@pytest.mark.parametrize("protocol", list(Protocol))
def test_b_204_policy_local_has_a_server_for_those_outside_and_one_for_those_inside(protocol: Protocol) -> None:
    """B-204."""
    port = NODE_PORT | {"protocol": protocol.name}
    ours = slices(*BOTH, ports=[{"name": "", "port": 80, "protocol": protocol.name}])
    state = of(service(ports=[port], type="NodePort", externalTrafficPolicy="Local"), slices=ours)
    assert given(state, "172.30.0.41:80", protocol) == {LOCAL, REMOTE}
    assert by_mark(state, Set.NODE_PORT, 3001, protocol) == {LOCAL}
    assert by_mark(state, Set.NODE_PORT_LOCAL, 3001, protocol) == {LOCAL, REMOTE}


def test_b_206_external_ips_are_those_of_the_family_and_loopback_is_never_bound() -> None:
    """B-206."""
    some = service(externalIPs=["50.60.70.81", "2012::51", "127.0.0.1"])
    state = of(some, slices=slices())
    assert given(state, "50.60.70.81:80") == {LOCAL, REMOTE}
    assert state.addresses == {parse_address("172.30.0.41"), parse_address("50.60.70.81")}
    assert {element.address for element in state.of(Set.EXTERNAL_IP)} <= {
        parse_address("50.60.70.81"),
        parse_address("127.0.0.1"),
    }


def test_b_207_an_external_ip_under_policy_local_has_the_local_endpoint() -> None:
    """B-207."""
    some = service(ports=[NODE_PORT], type="NodePort", externalIPs=["50.60.70.81"], externalTrafficPolicy="Local")
    state = of(some, slices=slices())
    assert given(state, "50.60.70.81:80") == {LOCAL}
    assert Element(*at("50.60.70.81:80")) in state.of(Set.LOCAL)


def balancer(**spec: Any) -> Any:
    return service(ports=[NODE_PORT], type="LoadBalancer", vips=["1.2.3.4"], **spec)


def test_b_208_b_209_load_balancer_addresses_and_those_under_policy_local() -> None:
    """B-208, B-209."""
    vip = Element(*at("1.2.3.4:80"))
    plain, local = of(balancer(), slices=slices()), of(balancer(externalTrafficPolicy="Local"), slices=slices())
    assert vip in plain.of(Set.LOAD_BALANCER)
    assert vip not in plain.of(Set.LOCAL)
    assert vip in local.of(Set.LOAD_BALANCER)
    assert vip in local.of(Set.LOCAL)
    assert given(plain, "1.2.3.4:80") == {LOCAL, REMOTE}
    assert given(local, "1.2.3.4:80") == {LOCAL}


def test_b_210_source_ranges_are_elements_of_two_sets() -> None:
    """B-210."""
    state = of(balancer(loadBalancerSourceRanges=["10.0.0.0/8"]), slices=slices())
    vip = at("1.2.3.4:80")
    assert set(state.of(Set.RANGED)) == {Element(*vip)}
    assert set(state.of(Set.SOURCES)) == {Element(*vip, bytes([10, 0, 0, 0]), 8)}


def test_b_211_health_check_ports_are_those_of_policy_local() -> None:
    """B-211."""
    local = compute(
        balancer(externalTrafficPolicy="Local", healthCheckNodePort=30000), slices(), view("ipvs"), Family.IPV4
    )
    other = compute(balancer(healthCheckNodePort=30001), slices(), view("ipvs"), Family.IPV4)
    assert (local.let_in, other.let_in) == (30000, 0)
    facts = NodeFacts(health_check_ports=frozenset({30000}))
    held = Layout(Family.IPV4, facts, Numbers({}), frozenset(), "rr").node()
    assert set(held.of(Set.HEALTH_CHECK)) == {Element(port=30000)}


def test_b_212_affinity_is_persistence_at_addresses_and_a_hash_by_marks() -> None:
    """B-212."""
    affinity = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    state = of(balancer(**affinity), slices=slices())
    for server, _, _ in state.servers.values():
        assert server.timeout == 600
        assert (server.scheduler, bool(server.flags & PERSISTENT)) == (
            ("mh", False) if server.key.mark else ("rr", True)
        )


def test_b_213_internal_policy_and_hairpins() -> None:
    """B-213."""
    two_here = slices(endpoint(LOCAL, NODE), endpoint(REMOTE), endpoint("10.180.2.2"))
    cluster = of(service(), slices=two_here)
    assert given(cluster, "172.30.0.41:80") == {LOCAL, REMOTE, "10.180.2.2"}
    hairpin = Element(parse_address(LOCAL), Protocol.TCP, 80, parse_address(LOCAL))
    assert set(cluster.of(Set.HAIRPIN)) == {hairpin}
    assert given(of(service(internalTrafficPolicy="Local"), slices=two_here), "172.30.0.41:80") == {LOCAL}
    none_here = of(service(internalTrafficPolicy="Local"), slices=slices(endpoint(REMOTE)))
    assert given(none_here, "172.30.0.41:80") == set()
    assert Element(*at("172.30.0.41:80")) in none_here.of(Set.REFUSED), "SEL-14: silence, as in the other modes"
    assert given(of(service(internalTrafficPolicy="Local")), "172.30.0.41:80") == set()


def test_b_214_terminating_endpoints() -> None:
    """B-214."""
    ready, ending = endpoint(LOCAL, NODE), endpoint(REMOTE, NODE, "ST")
    assert given(of(service(), slices=slices(ready, ending)), "172.30.0.41:80") == {LOCAL}
    assert given(of(service(), slices=slices(ending)), "172.30.0.41:80") == {REMOTE}
    assert given(of(service(), slices=slices(endpoint(LOCAL, NODE, "T"))), "172.30.0.41:80") == set()


def test_b_216_an_address_is_bound_once_and_goes_with_its_last_port() -> None:
    """B-216."""
    two, one = ([{"port": 80, "name": "a"}, {"port": 81, "name": "b"}][:count] for count in (2, 1))
    before, after = of(service(ports=two)), of(service(ports=one))
    assert before.addresses == after.addresses == {parse_address("172.30.0.41")}
    assert not any(isinstance(step, Unbind) for step in steps(before, after))
    gone = steps(after, State({}, {}, frozenset()))
    assert isinstance(gone[0], Unbind)
    assert isinstance(gone[-1], Delete)
    assert gone[-1].which is Set.BOUND


def test_b_219_an_address_of_the_node_is_not_bound() -> None:
    """B-219."""
    own = frozenset({parse_address("50.60.70.81")})
    state = of(service(externalIPs=["50.60.70.81"]), slices=slices(), own=own)
    assert state.addresses == {parse_address("172.30.0.41")}
    assert given(state, "50.60.70.81:80") == {LOCAL, REMOTE}
