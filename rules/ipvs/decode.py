"""From what a kernel holds of mode ipvs back to a table.  Pure.

Sets tell which frontends there are, virtual servers which backends they have; an element's mark leads from one to the
other.  Then the found table is laid out again, with the marks that were read, and compared with what is there: an
element more or less, a server without its element, an address that nobody has is damage, so that nothing is overlooked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from rules.forwarding import (
    Address,
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    NodeFacts,
    Protocol,
    Refusal,
    Route,
    check_route,
    format_address,
)
from rules.iptables.text import Saved
from rules.ipvs import chains, sets
from rules.ipvs.chains import Wanted
from rules.ipvs.layout import (
    DEFAULT_SCHEDULER,
    KIND_OF,
    Layout,
    Server,
    State,
    addresses_of,
    joined,
    own_scheduler,
)
from rules.ipvs.marks import Numbers, Owner, Role, Scheme, scheme
from rules.ipvs.messages import Key
from rules.ipvs.sets import Set
from rules.netlink.ipset import Element

_SENTENCES = 100
"""Of damage, beyond which the rest is counted."""


class Context(NamedTuple):
    """What a kernel's state is read with."""

    family: Family
    scheduler: str | None
    """How servers pick whose route asks for nothing else, as the kernel calls it; None: as most of them do."""
    own: frozenset[Address]
    """Addresses of other devices than ours."""


class Reading(NamedTuple):
    """What a kernel holds."""

    table: ForwardingTable
    wanted: Wanted
    """What its rules were made of."""
    numbers: Mapping[Owner, int]
    """Whose mark has which number."""


def decode(saved: Saved, state: State, context: Context, damage: Iterable[str] = ()) -> Reading:
    """The table that rules, sets and servers make; `damage`: what was found wrong with them before."""
    if context.scheduler is None:
        context = context._replace(scheduler=_usual_scheduler(state))
    rules = chains.read(saved, context.family)
    facts = _facts(rules.facts, state)
    found = _Decoder(state, context, scheme(facts.mark))
    routes: dict[Frontend, Route] = {}
    wrong = list(damage)
    for frontend, route in found.routes():
        fault = check_route(context.family, frontend, route)
        if fault:
            wrong.append(f"the elements and servers of {frontend} make no sense: {fault}")
        else:
            routes[frontend] = route
    hairpins = frozenset(_hairpins(state))
    wrong += chains.damage(saved, rules._replace(facts=facts), context.family)
    usual = context.scheduler or DEFAULT_SCHEDULER
    layout = Layout(context.family, facts, Numbers(found.numbers, found.all_numbers), context.own, usual)
    expected = joined(layout.state(routes, hairpins), layout.node(), layout.bound(addresses_of(routes)))
    wrong += _odd_elements(expected, state)
    wrong += _odd_servers(expected, state)
    if len(wrong) > _SENTENCES:
        wrong[_SENTENCES:] = [f"and {len(wrong) - _SENTENCES} things more are not as they should be"]
    table = ForwardingTable(
        family=context.family, node=facts, routes=routes, hairpins=hairpins, damage=frozenset(wrong)
    )
    return Reading(table, Wanted(facts, rules.random_fully), found.numbers)


def _usual_scheduler(state: State) -> str:
    """How most servers pick, those aside whose clients keep their backends by a scheduler of its own."""
    picks = Counter(
        each.server.scheduler for each in state.servers.values() if not (each.server.key.mark and each.server.timeout)
    )
    return max(picks, key=lambda name: (picks[name], name == DEFAULT_SCHEDULER), default=DEFAULT_SCHEDULER)


def _facts(facts: NodeFacts, state: State) -> NodeFacts:
    """Those of the rules, and those that stand in sets."""
    addresses = frozenset(each.address for each in state.of(Set.NODE_ADDRESS))
    return msgspec.structs.replace(
        facts,
        node_port_addresses=None if facts.node_port_addresses is None else addresses,
        service_cidrs=sets.merged((each.address, each.length) for each in state.of(Set.SERVICE_CIDR)),
        health_check_ports=frozenset(each.port for each in state.of(Set.HEALTH_CHECK)),
    )


def _hairpins(state: State) -> Iterator[Endpoint]:
    for each in state.of(Set.HAIRPIN):
        if each.address == each.other and (protocol := protocol_of(each.protocol)) is not None and each.port:
            yield Endpoint(each.address, protocol, each.port)


class _Decoder:
    """Reads frontend by frontend."""

    def __init__(self, state: State, context: Context, marks: Scheme) -> None:
        self._state = state
        self._context = context
        self.scheme = marks
        self.numbers: dict[Owner, int] = {}
        """Whose mark has which number."""
        self._taken: set[int] = set()
        self._ranges: defaultdict[tuple[Address, int, int], list[tuple[Address, int]]] = defaultdict(list)
        for each in state.of(Set.SOURCES):
            self._ranges[each.address, each.protocol, each.port].append((each.other, each.length))

    @property
    def all_numbers(self) -> Iterator[int]:
        """Of all marks of ours that servers or elements have."""
        marks = {key.mark for key in self._state.servers}
        for which in (Set.LOCAL, Set.NODE_PORT, Set.NODE_PORT_LOCAL):
            marks.update(extra.mark for extra in self._state.of(which).values())
        return (self.scheme.number(mark) for mark in marks if mark and self.scheme.is_ours(mark))

    def routes(self) -> Iterator[tuple[Frontend, Route]]:
        """In the order in which packets would meet the sets: a frontend that two of them have is the first one's."""
        met = set()
        for which in (Set.EXTERNAL_IP, Set.LOAD_BALANCER, Set.CLUSTER_IP, Set.NODE_PORT):
            for element in self._state.of(which):
                frontend = self._frontend(element)
                if frontend is not None and frontend not in met:
                    met.add(frontend)
                    yield frontend, self._route(frontend, element, which)

    def _frontend(self, element: Element) -> Frontend | None:
        protocol = protocol_of(element.protocol)
        if protocol is None or not 0 < element.port < 65536:
            return None
        # A network is half of all addresses: a node port.
        return Frontend(b"" if element.length else element.address, protocol, element.port)

    def _route(self, frontend: Frontend, element: Element, which: Set) -> Route:
        state = self._state
        extra = state.of(which)[element]
        inside = state.of(Set.NODE_PORT_LOCAL if frontend.is_node_port else Set.LOCAL).get(element)
        if frontend.is_node_port:
            given = self._by_mark(frontend, Role.EVERYBODY if inside is None else Role.OUTSIDE, extra.mark)
            dropped = extra.mark == self.scheme.drop
        else:
            given = state.servers.get(Key(self._context.family, frontend.protocol, frontend.address, frontend.port))
            dropped = element in state.of(Set.REFUSED)
        cluster = given if inside is None else self._by_mark(frontend, Role.INSIDE, inside.mark)
        backends = _backends(cluster)
        local = None if inside is None else _backends(given)
        refusal = None
        if not backends or (local is not None and not local):
            refusal = Refusal.DROP if dropped else Refusal.REJECT
        ranged = element in state.of(Set.RANGED)
        asked = cluster if backends else None
        return Route(
            kind=KIND_OF[which],
            backends=backends,
            local_backends=local,
            refusal=refusal,
            affinity=asked.server.timeout if asked is not None else 0,
            source_ranges=sets.merged(self._ranges.get(element[:3], ())) if ranged else (),
            scheduler=self._scheduler(asked),
            label=extra.comment,
        )

    def _by_mark(self, frontend: Frontend, role: Role, mark: int) -> Server | None:
        if not self.scheme.is_ours(mark) or mark == self.scheme.drop:
            return None
        number = self.scheme.number(mark)
        if number and self.scheme.mark(number, role) == mark and number not in self._taken:
            self.numbers[frontend, role] = number
            self._taken.add(number)
        return self._state.servers.get(Key(self._context.family, mark=mark))

    def _scheduler(self, server: Server | None) -> str:
        # A client that keeps its backend was given it once: what picked it then, nobody asks for.
        if server is None or server.server.timeout or server.server.scheduler == self._context.scheduler:
            return ""
        return own_scheduler(server.server.scheduler)


def _backends(server: Server | None) -> frozenset[Backend]:
    return frozenset(Backend(*each) for each in server.reals) if server is not None else frozenset()


def protocol_of(number: int) -> Protocol | None:
    """A protocol that Services balance, by its number; None: another."""
    try:
        return Protocol(number)
    except ValueError:
        return None


# --- what is not as it should be -----------------------------------------------------------------------------------


def _odd_elements(expected: State, found: State) -> Iterator[str]:
    for which in Set:
        wanted, there = expected.of(which), found.of(which)
        for element in there.keys() - wanted.keys():
            yield f"set {which.value} has {element_words(element)}, which nothing needs"
        for element in wanted.keys() - there.keys():
            yield f"set {which.value} lacks {element_words(element)}"
        for element in wanted.keys() & there.keys():
            if wanted[element][:2] != there[element][:2]:
                yield f"{element_words(element)} of set {which.value} carries another mark than it needs"


def _odd_servers(expected: State, found: State) -> Iterator[str]:
    for key in found.servers.keys() - expected.servers.keys():
        yield f"the virtual server {server_words(key)} serves nothing"
    for key, server in expected.servers.items():
        held = found.servers.get(key)
        if held is None:
            yield f"the virtual server {server_words(key)} is missing"
        elif held.server != server.server:
            yield f"the virtual server {server_words(key)} picks otherwise than its frontend needs"
        elif held.reals != server.reals:
            yield f"the virtual server {server_words(key)} has other real servers than its frontend needs"
    for address in sorted(found.addresses - expected.addresses):
        yield f"the device holds {format_address(address)}, which no frontend has"
    for address in sorted(expected.addresses - found.addresses):
        yield f"the device lacks {format_address(address)}"


def element_words(element: Element) -> str:
    """An element as ipset prints it."""
    parts = []
    if element.address:
        text = format_address(element.address)
        parts.append(f"{text}/{element.length}" if element.length and not element.other else text)
    if element.port:
        protocol = protocol_of(element.protocol)
        parts.append(f"{protocol.name.lower()}:{element.port}" if protocol is not None else str(element.port))
    if element.other:
        text = format_address(element.other)
        parts.append(f"{text}/{element.length}" if element.length else text)
    return ",".join(parts)


def server_words(key: Key) -> str:
    """A virtual server as people call it."""
    if key.mark:
        return f"for mark {key.mark:#x}"
    protocol = protocol_of(key.protocol)
    return str(Frontend(key.address, protocol, key.port)) if protocol is not None else format_address(key.address)
