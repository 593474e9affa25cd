"""What a worker listens on and for whom, and who is let in."""

from __future__ import annotations

import errno
import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from proxy.userspace.admission import Admission, Sources, admission, admitted
from proxy.userspace.choose import Memory
from proxy.userspace.control import Apply, WireNode
from proxy.userspace.filters import Stage
from proxy.userspace.table import Bind, Table
from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    Frontend,
    InputInterfacePrefix,
    Kind,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
    parse_address,
    parse_prefix,
)

VIP, NODE1, NODE2 = (parse_address(each) for each in ("10.96.0.1", "192.168.1.1", "192.168.1.2"))
ONE, TWO = (Backend(parse_address(each), 8080) for each in ("10.244.1.1", "10.244.2.1"))
TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
EMPTY = Route(kind=Kind.EXTERNAL_IP, refusal=Refusal.REJECT)
DROPS = Route(kind=Kind.EXTERNAL_IP, refusal=Refusal.DROP)
PLAIN = Route(kind=Kind.EXTERNAL_IP, backends=frozenset({ONE}), label="a/b:c")
NODE_PORT = Route(kind=Kind.NODE_PORT, backends=frozenset({TWO}), label="a/b:c")
NO_LOCAL = Route(
    kind=Kind.LOAD_BALANCER, backends=frozenset({ONE}), local_backends=frozenset(), refusal=Refusal.DROP, label="d"
)
NODE = WireNode(node_port_addresses=frozenset({NODE1, NODE2}), local_addresses=frozenset({NODE1}))


def table(interfaces: dict[int, str] | None = None) -> Table:
    found = {} if interfaces is None else interfaces
    return Table(Family.IPV4, memory=Memory(), chance=random.Random(1), interfaces=lambda: found)


def put(*routes: tuple[Frontend, Route], **fields: object) -> Apply:
    return Apply(family=Family.IPV4, put=list(routes), **fields)  # type: ignore[arg-type]


def test_a_node_port_is_at_every_node_port_address() -> None:
    some = table()
    touched = some.change(put((Frontend(b"", TCP, 30000), NODE_PORT), node=NODE))
    assert touched == {Bind(NODE1, TCP, 30000), Bind(NODE2, TCP, 30000)}
    touched = some.change(put(node=WireNode(node_port_addresses=frozenset({NODE2}))))
    assert Bind(NODE1, TCP, 30000) in touched
    assert some.owner(Bind(NODE1, TCP, 30000)) is None
    assert some.owner(Bind(NODE2, TCP, 30000)) is not None


def test_an_address_of_its_own_goes_before_a_node_port_unless_it_has_no_backend() -> None:
    own, any_ = Frontend(NODE1, TCP, 30000), Frontend(b"", TCP, 30000)
    some = table()
    some.change(put((own, PLAIN), (any_, NODE_PORT), node=NODE))

    def route_at(address: bytes) -> Route | None:
        owner = some.owner(Bind(address, TCP, 30000))
        return owner.route if owner else None

    assert route_at(NODE1) == PLAIN
    assert route_at(NODE2) == NODE_PORT
    some.change(put((own, EMPTY)))
    assert route_at(NODE1) == NODE_PORT
    some.change(put((any_, Route(kind=Kind.NODE_PORT, refusal=Refusal.REJECT))))
    assert route_at(NODE1) == EMPTY
    assert some.change(put(removed=[own])) == {Bind(NODE1, TCP, 30000)}


def test_sctp_is_kept_and_has_no_listener() -> None:
    some = table()
    frontend = Frontend(VIP, SCTP, 80)
    assert some.change(put((frontend, PLAIN))) == set()
    assert dict(some.answer([]).routes) == {frontend: PLAIN}


def test_a_reset_touches_only_what_differs_and_goes_on_with_the_rest() -> None:
    kept, gone, new = (Frontend(VIP, TCP, port) for port in (80, 81, 82))
    some = table()
    some.change(put((kept, PLAIN), (gone, PLAIN), hairpins_added=[Endpoint(VIP, TCP, 1)]))
    before = some.served[kept]
    assert some.change(put((kept, PLAIN), (new, PLAIN), reset=True)) == {Bind(*gone), Bind(*new)}
    assert some.served[kept] is before
    assert some.answer([]).hairpins == []


def test_counters_outlive_a_change_of_the_route_and_end_with_the_last_flow() -> None:
    frontend = Frontend(VIP, TCP, 80)
    some = table()
    some.change(put((frontend, PLAIN)))
    some.served[frontend].counters.begin()
    some.change(put((frontend, DROPS)))
    assert [each.total for each in some.statistics()] == [1]
    some.change(put(removed=[frontend]))
    counters = some._counters[frontend]
    assert [each.open for each in some.statistics()] == [1]
    counters.end()
    assert [each.open for each in some.statistics()] == [0]
    assert some.statistics() == []


def test_frontends_that_nobody_uses_have_no_figures_and_cost_nothing_to_ask() -> None:
    some = table()
    some.change(put((Frontend(VIP, TCP, 80), PLAIN), (Frontend(VIP, TCP, 81), PLAIN)))
    assert some.statistics() == []
    some.served[Frontend(VIP, TCP, 81)].counters.begin()
    assert [each.frontend.port for each in some.statistics()] == [81]


# --- admission -------------------------------------------------------------------------------------------------------

SOURCES = Sources(
    WireNode(local_addresses=frozenset({NODE1}), detector=SourcePrefix(parse_prefix("10.244.1.0/24"))), {}
)


def test_what_the_kernel_does_for_each_kind_of_route() -> None:
    ranges = (parse_prefix("192.168.0.0/16"),)
    ranged = Route(kind=Kind.LOAD_BALANCER, backends=frozenset({ONE}), source_ranges=ranges)
    assert admission(PLAIN, SOURCES, VIP) == Admission(listens=True)
    assert not admission(EMPTY, SOURCES, VIP).listens
    assert admission(DROPS, SOURCES, VIP) == Admission(listens=True, stages=(Stage(),))
    assert admission(ranged, SOURCES, VIP) == Admission(listens=True, stages=(Stage(ranges),))
    (inside,) = admission(NO_LOCAL, SOURCES, VIP).stages
    expected = {parse_prefix(each) for each in ("10.96.0.1/32", "192.168.1.1/32", "10.244.1.0/24", "127.0.0.0/8")}
    assert set(inside.prefixes) == expected


@given(st.sampled_from(["10.244.1.9", "10.244.2.9", "192.168.1.1", "192.168.1.2", "127.0.0.9", "10.96.0.1", "8.8.8.8"]))
def test_the_filter_and_the_look_after_the_handshake_agree(source: str) -> None:
    packed = parse_address(source)
    (inside,) = admission(NO_LOCAL, SOURCES, VIP).stages
    assert SOURCES.are_inside(packed, VIP) == any(packed in each for each in inside.prefixes)


def test_interfaces_tell_pods_by_name_and_are_looked_at_again() -> None:
    interfaces = {1: "lo", 7: "veth7"}
    some = table(interfaces)
    frontend = Frontend(VIP, TCP, 80)
    some.change(put((frontend, NO_LOCAL), node=WireNode(detector=InputInterfacePrefix("veth"))))
    assert some.sources.are_inside(TWO.address, VIP, "veth9")
    assert not some.sources.are_inside(TWO.address, VIP, "eth0")
    assert admission(NO_LOCAL, some.sources, VIP).stages[0].interfaces == (7,)
    assert some.refresh_interfaces() == set()
    interfaces[9] = "veth9"
    assert some.refresh_interfaces() == {Bind(*frontend)}
    assert admission(NO_LOCAL, some.sources, VIP).stages[0].interfaces == (7, 9)


def test_interfaces_that_cannot_be_looked_at_are_those_of_the_last_look() -> None:
    found = [{7: "veth7"}]

    def interfaces() -> dict[int, str]:
        if not found:
            raise OSError(errno.EMFILE, "no descriptor is left")
        return found.pop()

    some = Table(Family.IPV4, memory=Memory(), chance=random.Random(1), interfaces=interfaces)
    frontend = Frontend(VIP, TCP, 80)
    node = WireNode(detector=InputInterfacePrefix("veth"))
    some.change(put((frontend, NO_LOCAL), node=node))
    assert some.refresh_interfaces() == set()
    some.change(put(node=msgspec.structs.replace(node, local_addresses=frozenset({NODE1}))))
    assert admission(NO_LOCAL, some.sources, VIP).stages[0].interfaces == (7,)
    found.append({9: "veth9"})
    assert some.refresh_interfaces() == {Bind(*frontend)}
    assert admission(NO_LOCAL, some.sources, VIP).stages[0].interfaces == (9,)


def test_ranges_admit_their_members_and_none_admits_all() -> None:
    route = Route(kind=Kind.LOAD_BALANCER, backends=frozenset({ONE}), source_ranges=(parse_prefix("10.0.0.0/8"),))
    assert admitted(route, parse_address("10.1.1.1"))
    assert not admitted(route, parse_address("11.1.1.1"))
    assert admitted(PLAIN, parse_address("11.1.1.1"))
