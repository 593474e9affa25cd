"""A kernel of mode ipvs as a value: steps carried out on it one by one, and packets led through it.

`Model.meets` says what the rules of `rules.ipvs.chains` and IPVS make of a connection's first packet, by the sets,
servers and addresses that there are; `expected` says it of a table.  The first is the rules written down a second time,
so that the order of steps is judged by what packets meet at every point in between.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
from hypothesis import strategies as st

from rules.diff import fit
from rules.forwarding import (
    Address,
    Backend,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Refusal,
    Route,
    SourcePrefix,
)
from rules.ipvs.layout import Layout, Server, State, addresses_of, capabilities, joined, outside
from rules.ipvs.marks import Numbers, scheme
from rules.ipvs.messages import Key, Target, VirtualServer
from rules.ipvs.plan import (
    Add,
    Bind,
    ChangeServer,
    Delete,
    NewReal,
    NewServer,
    RemoveReal,
    RemoveServer,
    Serve,
    Step,
    Unbind,
    Weigh,
)
from rules.ipvs.sets import Set
from rules.netlink.ipset import Element, Extra
from tests import iptables_tables

OWN = {
    Family.IPV4: frozenset({bytes([192, 168, 50, 11]), bytes([203, 0, 113, 1])}),
    Family.IPV6: frozenset({bytes([0xFD, 0, 0, 0x10, 0, 0x96] + [0] * 9 + [1]), bytes([0xFD, 0, 0, 0x50] + [0] * 12)}),
}
"""The node's addresses, one of a frontend among them."""
CAPABILITIES = capabilities("rr")


@st.composite
def tables(draw: st.DrawFn, family: Family, *, with_node: bool = True) -> ForwardingTable:
    """Tables that mode ipvs can hold, schedulers among them."""
    table = draw(iptables_tables.tables(family, with_node=with_node))
    names = st.sampled_from(["", "", "round-robin", "least-connections", "wlc", "mh", "sh"])
    routes = {
        frontend: msgspec.structs.replace(route, scheduler=draw(names)) if route.backends else route
        for frontend, route in table.routes.items()
    }
    return fit(msgspec.structs.replace(table, routes=routes), CAPABILITIES)


def wanted(table: ForwardingTable, numbers: Numbers | None = None) -> State:
    """What a table comes to."""
    layout = Layout(table.family, table.node, numbers or Numbers({}), OWN[table.family], "rr")
    bound = layout.bound(addresses_of(table.routes))
    return joined(layout.state(table.routes, table.hairpins), layout.node(), bound)


class Source(NamedTuple):
    """Where a packet comes from."""

    address: Address
    pod: bool = False
    """By a detector of interfaces."""
    node: bool = False


class Met(NamedTuple):
    """What became of a connection."""

    how: Literal["answered", "rejected", "dropped", "elsewhere"]
    backends: frozenset[Backend] = frozenset()
    masqueraded: bool = False


DROPPED, REJECTED, ELSEWHERE = Met("dropped"), Met("rejected"), Met("elsewhere")


class Model:
    """The sets, servers and addresses of one family."""

    def __init__(self, family: Family, facts: NodeFacts) -> None:
        self.family = family
        self.facts = facts
        self.elements: dict[Set, dict[Element, Extra]] = {which: {} for which in Set}
        self.servers: dict[Key, VirtualServer] = {}
        self.reals: dict[Key, dict[Target, int]] = {}
        self.addresses: set[Address] = set()

    def state(self) -> State:
        """Without what drains."""
        servers = {
            key: Server(server, frozenset(target for target, weight in self.reals[key].items() if weight), None)
            for key, server in self.servers.items()
        }
        elements = {which: dict(own) for which, own in self.elements.items() if own}
        return State(elements, servers, frozenset(self.addresses))

    def carry_out(self, step: Step) -> None:
        """As the kernel would; what it would refuse fails."""
        match step:
            case Add(which, elements):
                self.elements[which].update(elements)
            case Delete(which, gone):
                for element in gone:
                    del self.elements[which][element]
            case Bind(addresses):
                assert not self.addresses & addresses
                self.addresses |= addresses
            case Unbind(addresses):
                assert self.addresses >= addresses
                self.addresses -= addresses
            case Serve(changes):
                for change in changes:
                    self._serve(change)

    def _serve(self, change: object) -> None:
        match change:
            case NewServer(server):
                assert server.key not in self.servers
                self.servers[server.key], self.reals[server.key] = server, {}
            case ChangeServer(server):
                assert server.key in self.servers
                self.servers[server.key] = server
            case RemoveServer(key):
                del self.servers[key], self.reals[key]
            case NewReal(key, target):
                assert target not in self.reals[key]
                self.reals[key][target] = 1
            case Weigh(key, target, weight):
                assert target in self.reals[key]
                self.reals[key][target] = weight
            case RemoveReal(key, target):
                del self.reals[key][target]

    # --- packets -----------------------------------------------------------------------------------------------

    def meets(self, destination: Frontend, source: Source) -> Met:
        """What becomes of a connection to an address."""
        element = Element(*destination)
        ranges = [Prefix(each.other, each.length) for each in self.elements[Set.SOURCES] if each[:3] == element[:3]]
        if self._has(Set.RANGED, element) and not any(source.address in each for each in ranges):
            return DROPPED
        mark, masqueraded, refused = self._marked(destination, source)
        if mark == scheme(self.facts.mark).drop or (not mark and refused):
            return DROPPED
        return self._balanced(destination, source, mark, masqueraded=masqueraded)

    def _marked(self, destination: Frontend, source: Source) -> tuple[int, bool, bool]:
        """The mark that leads to a server; whether the connection is masqueraded, or dropped, where there is none."""
        element = Element(*destination)
        refused = self._has(Set.REFUSED, element)
        if self._has(Set.EMPTY, element):
            return self._node_port(destination, source), False, refused
        if self._has(Set.LOCAL, element):
            inside = source.node or self._is_pod(source)
            return self.elements[Set.LOCAL][element].mark if inside else 0, False, refused
        if self._has(Set.EXTERNAL_IP, element) or self._has(Set.LOAD_BALANCER, element):
            return 0, True, False
        if self._has(Set.CLUSTER_IP, element):
            told = self.facts.detector is not None and not self._is_pod(source)
            return 0, self.facts.masquerade_all or told, False
        return self._node_port(destination, source), False, self._is_unallocated(destination.address)

    def _has(self, which: Set, element: Element) -> bool:
        return element in self.elements[which]

    def _balanced(self, destination: Frontend, source: Source, mark: int, *, masqueraded: bool) -> Met:
        element = Element(*destination)
        bound = Element(destination.address) in self.elements[Set.BOUND]
        if not source.node:
            if destination.address not in self.addresses | OWN[self.family]:
                return ELSEWHERE
            if bound and element not in self.elements[Set.OPEN]:
                return REJECTED
        key = Key(self.family, *destination[1::-1], destination.port)
        server = self.servers.get(Key(self.family, mark=mark)) if mark else None
        server = server or self.servers.get(key)
        if server is None:
            return ELSEWHERE
        if mark:
            marks = scheme(self.facts.mark)
            kept = isinstance(self.facts.detector, SourcePrefix) and self._is_pod(source)
            masqueraded = bool(mark & marks.always) or (source.node and not kept)
        given = frozenset(Backend(*target) for target, weight in self.reals[server.key].items() if weight)
        return Met("answered", given, masqueraded) if given else REJECTED

    def _is_pod(self, source: Source) -> bool:
        match self.facts.detector:
            case None:
                return False
            case SourcePrefix(prefix=prefix):
                return source.address in prefix
        return source.pod

    def _node_port(self, destination: Frontend, source: Source) -> int:
        """The mark that a node port gives; 0: it is none."""
        address = destination.address
        if self.facts.node_port_addresses is None:
            answers = address in OWN[self.family] and Element(address) not in self.elements[Set.BOUND]
        else:
            answers = Element(address) in self.elements[Set.NODE_ADDRESS]
        high = bytes([address[0] & 0x80]) + bytes(len(address) - 1)
        element = Element(high, destination.protocol, destination.port, length=1)
        inside = self.elements[Set.NODE_PORT_LOCAL].get(element)
        extra = self.elements[Set.NODE_PORT].get(element)
        if inside is not None and (source.node or self._is_pod(source)):
            extra = inside
        return extra.mark if answers and extra is not None else 0

    def _is_unallocated(self, address: Address) -> bool:
        networks = [Prefix(each.address, each.length) for each in self.elements[Set.SERVICE_CIDR]]
        return any(address in each for each in networks) and Element(address) not in self.elements[Set.BOUND]


def expected(table: ForwardingTable, destination: Frontend, source: Source) -> Met:
    """What a table says of a connection to an address; ELSEWHERE: nothing."""
    route = table.routes.get(destination)
    if route is not None and route.source_ranges and not any(source.address in each for each in route.source_ranges):
        return DROPPED
    facts = table.node
    candidates = [] if route is None else [route]
    addresses = facts.node_port_addresses
    if destination.address in (OWN[table.family] if addresses is None else addresses):
        behind = table.routes.get(Frontend(b"", destination.protocol, destination.port))
        candidates += [] if behind is None else [behind]
    for each in candidates:
        if each.backends:
            return _offered(each, facts, source)
    if candidates:
        return DROPPED if candidates[0].refusal is Refusal.DROP else REJECTED
    return ELSEWHERE


def offered(table: ForwardingTable, destination: Frontend, source: Source) -> Met:
    """The same, with the backends of outsiders beside those of local pods and the node."""
    met = expected(table, destination, source)
    if met.how != "answered":
        return met
    ports = Frontend(b"", destination.protocol, destination.port)
    for each in (table.routes.get(destination), table.routes.get(ports)):
        if each is not None and each.backends:
            return met._replace(backends=met.backends | outside(each)) if met.backends == each.backends else met
    return met


def _offered(route: Route, facts: NodeFacts, source: Source) -> Met:
    by_address = isinstance(facts.detector, SourcePrefix) and source.address in facts.detector.prefix
    pod = by_address or (isinstance(facts.detector, InputInterface) and source.pod)
    if route.kind is Kind.CLUSTER_IP:
        masqueraded = facts.masquerade_all or (facts.detector is not None and not pod)
        return Met("answered", route.backends, masqueraded)
    if not route.policy_local:
        return Met("answered", route.backends, True)
    if pod or source.node:
        return Met("answered", route.backends, source.node and not by_address)
    given = outside(route)
    if given:
        return Met("answered", given, False)
    return DROPPED if route.refusal is Refusal.DROP else REJECTED


def sources(family: Family) -> list[Source]:
    """A local pod, the node, and two from outside."""
    if family is Family.IPV4:
        pod, own, one, other = (
            bytes(each) for each in ([10, 244, 1, 8], [192, 168, 50, 11], [9, 9, 9, 9], [200, 0, 0, 1])
        )
    else:
        pod, own, one, other = (
            bytes([0xFD, 0, 2, 0x44] + [0] * 11 + [8]),
            bytes([0xFD, 0, 0, 0x50] + [0] * 12),
            bytes([0x20, 1] + [0] * 14),
            bytes([0xFD, 9] + [0] * 14),
        )
    return [Source(pod, pod=True), Source(own, node=True), Source(one), Source(other)]


def destinations(*some: ForwardingTable) -> list[Frontend]:
    """Where the frontends of tables are, node ports at each of the node's addresses."""
    found: set[Frontend] = set()
    for table in some:
        for frontend in table.routes:
            addresses = OWN[table.family] if frontend.is_node_port else [frontend.address]
            found.update(Frontend(address, Protocol(frontend.protocol), frontend.port) for address in addresses)
    return sorted(found)
