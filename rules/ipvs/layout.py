"""What mode ipvs keeps in the kernel, and why it looks so.  Pure: from a table to sets, servers and addresses.

Theory of operation
-------------------
A frontend with an address is a virtual server by address, protocol and port.  It has the backends of whoever comes from
outside: under policy Local the local ones.  The address is bound to a dummy device, unless it is one of the node's own;
so packets to it come in, and pass LOCAL_IN, where IPVS takes them.

A node port is a virtual server by mark: every address of the node answers it, and none is enumerated, so that an
address that comes or goes changes nothing here.

Under external policy Local there is a second virtual server, by mark, for local pods and for the node itself, with the
backends of the cluster (TRF-4).  kube-proxy's ipvs mode has none, and so departs from its other modes (IPVS-20, 21).

Packets get these marks from elements of sets (`rules.ipvs.sets`) by constant rules (`rules.ipvs.chains`).  Elements
keep labels as comments.

A client keeps its backend (affinity) at a server by address by IPVS' persistence.  A server by mark forgets the ports
of its real servers when it is persistent: there the scheduler `mh` picks by the client's address, and passes over real
servers without weight.  How long a client would keep its backend stands in the server all the same.

A virtual server without real servers answers "port unreachable", which is what a rejected frontend needs; one that
drops has an element that says so.

    State    what the kernel holds or should hold of one family: elements of sets, servers, addresses
    Layout   makes a table, or some of its routes, into a `State`

A backend's weight is 1, or 0 while it drains: then it counts as gone, here and for `read` (IPVS-6, 23).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.dataplane import Capabilities
from rules.forwarding import (
    KERNEL_SCHEDULERS,
    Address,
    Backend,
    Endpoint,
    Family,
    Frontend,
    Kind,
    NodeFacts,
    Protocol,
    Refusal,
    Route,
)
from rules.ipvs import sets
from rules.ipvs.marks import ALL_BITS, Numbers, Owner, Role, Scheme, scheme
from rules.ipvs.messages import PERSISTENT, SCHEDULER_1, SCHEDULER_2, Key, Target, VirtualServer
from rules.ipvs.sets import KINDS, Set
from rules.netlink.ipset import NOTHING, Element, Extra
from rules.node_ports import is_loopback

STICKY_SCHEDULER = "mh"
"""Of servers by mark whose clients keep their backends."""
SCHEDULERS = {"round-robin": "rr", "least-connections": "lc"}
"""What the kernel calls schedulers that have a name of ours; others are called by the kernel's (IPVS-5)."""
DEFAULT_SCHEDULER = "rr"
_NAMES = {kernel: name for name, kernel in SCHEDULERS.items()}


class Server(NamedTuple):
    """A virtual server with its real ones, those that drain aside."""

    server: VirtualServer
    reals: frozenset[Target]
    protocol: Protocol | None
    """Of its connections; None where nobody knows any more: of a server by mark that nothing leads to."""


class State(NamedTuple):
    """What a kernel holds of one family, or a part of that."""

    elements: Mapping[Set, Mapping[Element, Extra]]
    servers: Mapping[Key, Server]
    addresses: frozenset[Address]
    """Those on the device."""

    def of(self, which: Set) -> Mapping[Element, Extra]:
        return self.elements.get(which, {})


NO_STATE = State({}, {}, frozenset())


def kernel_scheduler(scheduler: str) -> str:
    """A scheduler as the kernel calls it."""
    return SCHEDULERS.get(scheduler, scheduler)


def own_scheduler(scheduler: str) -> str:
    """A scheduler as a route calls it."""
    return _NAMES.get(scheduler, scheduler)


def capabilities(scheduler: str) -> Capabilities:
    """What mode ipvs can store, where a scheduler of the kernel is the usual one."""
    return Capabilities(
        health_check_ports=True,
        unbound=False,
        schedulers=KERNEL_SCHEDULERS | SCHEDULERS.keys(),
        usual_scheduler=own_scheduler(scheduler),
        sticky_schedulers=False,
    )


class Layout:
    """Where the routes of one family go, on a node of which certain facts hold."""

    def __init__(
        self, family: Family, facts: NodeFacts, numbers: Numbers, own: frozenset[Address], scheduler: str
    ) -> None:
        """Of a family.

        Args:
            family: the family.
            facts: the node's.
            numbers: whose mark has which number; those that have none yet are given one.
            own: addresses of other devices than ours, which need not be bound.
            scheduler: how routes that ask for none pick, as the kernel calls it.

        Raises:
            ValueError: the facts' mark is not one bit.
        """
        self._family = family
        self._scheme: Scheme = scheme(facts.mark)
        self._facts = facts
        self._numbers = numbers
        self._own = own
        self._scheduler = scheduler

    def state(self, routes: Mapping[Frontend, Route], hairpins: Iterable[Endpoint] = ()) -> State:
        """What routes and hairpins come to, without the node's facts and what the addresses of routes need."""
        elements: dict[Set, dict[Element, Extra]] = {}
        servers: dict[Key, Server] = {}
        for frontend, route in routes.items():
            placed = self._node_port if frontend.is_node_port else self._addressed
            for each in placed(frontend, route):
                if isinstance(each, Server):
                    servers[each.server.key] = each
                else:
                    which, element, extra = each
                    elements.setdefault(which, {})[element] = extra
        if hairpin := {Element(each.address, each.protocol, each.port, each.address): NOTHING for each in hairpins}:
            elements[Set.HAIRPIN] = hairpin
        return State(elements, servers, frozenset())

    def node(self) -> State:
        """What the node's facts come to, as far as sets hold them."""
        facts = self._facts
        addresses = facts.node_port_addresses or frozenset()
        return State(
            {
                Set.NODE_ADDRESS: {Element(address): NOTHING for address in addresses},
                Set.SERVICE_CIDR: dict.fromkeys(sets.networks(facts.service_cidrs), NOTHING),
                Set.HEALTH_CHECK: {Element(port=port): NOTHING for port in facts.health_check_ports},
            },
            {},
            frozenset(),
        )

    def bound(self, addresses: Iterable[Address]) -> State:
        """What frontends' addresses need, whoever has them: none that is the node's own, or loopback."""
        bound = frozenset(each for each in addresses if each not in self._own and not is_loopback(each))
        return State({Set.BOUND: {Element(address): NOTHING for address in bound}}, {}, bound)

    def owners_of(self, routes: Mapping[Frontend, Route]) -> Iterator[Owner]:
        """Whose numbers routes need."""
        for frontend, route in routes.items():
            if frontend.is_node_port and (outside(route) or route.refusal is not Refusal.DROP):
                yield frontend, Role.OUTSIDE if route.policy_local else Role.EVERYBODY
            if route.policy_local:
                yield frontend, Role.INSIDE

    # --- one frontend ----------------------------------------------------------------------------------------------

    def _addressed(self, frontend: Frontend, route: Route) -> Iterator[tuple[Set, Element, Extra] | Server]:
        address, protocol, port = frontend
        element = Element(address, protocol, port)
        given = outside(route)
        yield KINDS[route.kind], element, Extra(comment=route.label)
        if not route.backends:
            yield Set.EMPTY, element, NOTHING
        if not given and route.refusal is Refusal.DROP:
            yield Set.REFUSED, element, NOTHING
        if route.source_ranges:
            yield Set.RANGED, element, NOTHING
            for network in sets.networks(route.source_ranges):
                yield Set.SOURCES, Element(address, protocol, port, network.address, network.length), NOTHING
        yield Set.OPEN, element, NOTHING
        name = self._named(route)
        flags = _flags(name) | (PERSISTENT if route.affinity else 0)  # IPVS-10
        server = VirtualServer(Key(self._family, protocol, address, port), name, route.affinity, flags)
        yield Server(server, _targets(given), protocol)
        if route.policy_local:
            mark, inside = self._by_mark(frontend, Role.INSIDE, route, route.backends)
            yield Set.LOCAL, element, mark
            yield inside

    def _node_port(self, frontend: Frontend, route: Route) -> Iterator[tuple[Set, Element, Extra] | Server]:
        given = outside(route)
        halves = [
            Element(each.address, frontend.protocol, frontend.port, length=each.length)
            for each in sets.everywhere(self._family)
        ]
        if not given and route.refusal is Refusal.DROP:
            mark = Extra(self._scheme.drop, ALL_BITS)
        else:
            role = Role.OUTSIDE if route.policy_local else Role.EVERYBODY
            mark, server = self._by_mark(frontend, role, route, given)
            yield server
        for half in halves:
            yield Set.NODE_PORT, half, mark._replace(comment=route.label)
        if route.policy_local:
            mark, server = self._by_mark(frontend, Role.INSIDE, route, route.backends)
            yield server
            for half in halves:
                yield Set.NODE_PORT_LOCAL, half, mark

    def _by_mark(
        self, frontend: Frontend, role: Role, route: Route, backends: frozenset[Backend]
    ) -> tuple[Extra, Server]:
        mark = self._scheme.mark(self._numbers[frontend, role], role)
        name = self._named(route)
        key = Key(self._family, mark=mark)
        if route.affinity:
            server = VirtualServer(key, STICKY_SCHEDULER, route.affinity, SCHEDULER_1)
        else:
            server = VirtualServer(key, name, 0, _flags(name))
        return Extra(mark, ALL_BITS), Server(server, _targets(backends), frontend.protocol)

    def _named(self, route: Route) -> str:
        return kernel_scheduler(route.scheduler) or self._scheduler


def outside(route: Route) -> frozenset[Backend]:
    """The backends of those who are neither local pods nor the node."""
    return route.backends if route.local_backends is None else route.local_backends


def addresses_of(frontends: Iterable[Frontend]) -> Iterator[Address]:
    """The addresses that frontends have, one for each."""
    return (frontend.address for frontend in frontends if not frontend.is_node_port)


def joined(*parts: State) -> State:
    """States of different parts of a family's as one."""
    elements: dict[Set, dict[Element, Extra]] = {}
    servers: dict[Key, Server] = {}
    for part in parts:
        for which, own in part.elements.items():
            elements.setdefault(which, {}).update(own)
        servers.update(part.servers)
    return State(elements, servers, frozenset().union(*(part.addresses for part in parts)))


def _flags(scheduler: str) -> int:
    """What a scheduler is told: `mh` counts ports too (IPVS-5)."""
    return SCHEDULER_2 if scheduler == "mh" else 0


def _targets(backends: Iterable[Backend]) -> frozenset[Target]:
    return frozenset(Target(*each) for each in backends)


KIND_OF = {which: kind for kind, which in KINDS.items()} | {Set.NODE_PORT: Kind.NODE_PORT}
"""Of the sets that hold frontends."""
