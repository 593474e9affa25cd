"""What userspace mode holds, as a forwarding table: from workers' answers, and from what the kernel knows.  Pure.

Theory of operation
-------------------
A frontend is there if a client can use it: every worker says that it serves it, a socket of each of them waits at each
of its addresses, and packets to these are delivered to the node.  A listener that somebody closed and a route that
somebody deleted are therefore missing frontends, whatever the workers believe.  Where workers differ, the table is what
the first of them does, and the difference is damage.

The node's facts are those that workers go by, and for the networks of ClusterIPs the routes.  What a relayed connection
cannot show (the mark, masquerading) is not there to be read: `Capabilities.source_address` says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from proxy.userspace.anyip import LocalRoutes, needed
from proxy.userspace.control import TableAnswer, WireNode
from proxy.userspace.sockdiag import Listener
from rules.dataplane import RawItem
from rules.forwarding import (
    Address,
    Family,
    ForwardingTable,
    Frontend,
    NodeFacts,
    Prefix,
    Refusal,
    Route,
    format_host,
)
from rules.node_ports import LOOPBACK, is_loopback

MOST_SENTENCES = 20
"""Of damage of one kind."""

_LINK_LOCAL = Prefix(bytes((0xFE, 0x80)) + bytes(14), 10)


class Worker(NamedTuple):
    """What is known of one worker."""

    number: int
    pid: int
    answer: TableAnswer
    inodes: frozenset[int] | None
    """The sockets that it has open; None: /proc doesn't tell."""

    @property
    def serves(self) -> bool:
        """Whether it has been given a table of this family."""
        return bool(self.answer.serial)


class Kernel(NamedTuple):
    """What the kernel knows."""

    listeners: Mapping[Listener, frozenset[int]]
    routes: LocalRoutes


def wire_node(facts: NodeFacts, family: Family, own: Collection[Address], workers: int, drain: float) -> WireNode:
    """The node as workers need it: which of its own addresses (`own`) answer node ports, and so on.

    `workers` is how many there are to be, `drain` the seconds that flows may go on when they are told to end.
    """
    addresses = facts.node_port_addresses
    if addresses is None:
        # A link-local address belongs to an interface, which a frontend cannot say.
        addresses = frozenset(each for each in own if not is_loopback(each) and each not in _LINK_LOCAL)
    if facts.loopback_node_ports and family is Family.IPV4:
        addresses |= {LOOPBACK}
    return WireNode(
        node_port_addresses=addresses,
        local_addresses=frozenset(own),
        detector=facts.detector,
        every_address=facts.node_port_addresses is None,
        workers=workers,
        networks=facts.service_cidrs,
        drain=drain,
    )


def own_addresses(routes: LocalRoutes) -> frozenset[Address]:
    """The addresses that the node has without us."""
    return frozenset(each.address for each in routes.others if each.length == len(each.address) * 8)


def listens(route: Route) -> bool:
    """Whether workers listen for a route; where they don't, the kernel refuses (`proxy.userspace.admission`)."""
    return bool(route.backends) or route.refusal is Refusal.DROP


def places(frontend: Frontend, node: WireNode) -> Iterator[Listener]:
    """Where workers listen for a frontend."""
    for address in node.node_port_addresses if frontend.is_node_port else (frontend.address,):
        yield Listener(frontend.protocol, address, frontend.port)


def missing(workers: Iterable[Worker], kernel: Kernel) -> Mapping[int, frozenset[Frontend]]:
    """By worker, the frontends without a socket of it at one of their addresses, for no reason that it knows of."""
    found = {}
    for worker in workers:
        node = worker.answer.node
        known = {frontend for frontend, _ in worker.answer.trouble}
        found[worker.number] = frozenset(
            frontend
            for frontend, route in worker.answer.routes
            if frontend not in known
            and listens(route)
            and not all(_is_there(place, worker, kernel) for place in places(frontend, node))
        )
    return found


def decode(
    family: Family, workers: Sequence[Worker], kernel: Kernel, lingering: Collection[Address] = ()
) -> ForwardingTable | None:
    """The table that clients meet; None: nothing of ours is there.

    `lingering` are addresses that open flows still use though no frontend has them.
    """
    serving = [worker for worker in workers if worker.serves]
    if not serving and not kernel.routes.ours:
        return None
    damage = list(_workforce(workers, serving))
    first = serving[0].answer if serving else TableAnswer()
    absent = missing(serving, kernel)
    troubled = {frontend for worker in serving for frontend, _ in worker.answer.trouble}
    everywhere = frozenset.intersection(*absent.values()) if absent else frozenset[Frontend]()
    is_local = kernel.routes.covering()
    routes = {
        frontend: route
        for frontend, route in first.routes
        if frontend not in troubled
        and frontend not in everywhere
        and (frontend.is_node_port or is_local(frontend.address))
    }
    damage += _differences(serving, absent, everywhere)
    damage += _strange_routes(first, kernel.routes, lingering)
    return ForwardingTable(
        family=family,
        node=_facts(first.node, kernel.routes),
        routes=routes,
        hairpins=frozenset(first.hairpins),
        damage=frozenset(damage),
    )


def raw_items(workers: Sequence[Worker], kernel: Kernel, table: ForwardingTable) -> Iterator[RawItem]:
    """The processes, sockets and routes themselves; those that serve a frontend of the table say which."""
    for worker in workers:
        node = worker.answer.node
        yield RawItem(0, f"worker {worker.number}, process {worker.pid}")
        trouble = dict(worker.answer.trouble)
        for frontend, route in sorted(worker.answer.routes, key=lambda item: item[0]):
            if frontend in trouble:
                yield RawItem(1, f"{frontend}: {trouble[frontend]}")
                continue
            serves = (frontend,) if frontend in table.routes else ()
            if not listens(route):
                yield RawItem(1, f"{frontend}: no listener, so that the kernel refuses", serves)
                continue
            for place in sorted(places(frontend, node)):
                there = _is_there(place, worker, kernel)
                name = f"{format_host(place.address)}:{place.port}/{place.protocol.name}"
                yield RawItem(1, f"{'listens' if there else 'does not listen'} at {name}", serves)
    by_address: dict[Address, list[Frontend]] = {}
    for frontend in table.routes:
        by_address.setdefault(frontend.address, []).append(frontend)
    for prefix in sorted(kernel.routes.ours):
        alone = prefix.length == len(prefix.address) * 8
        yield RawItem(0, f"route local {prefix} dev lo", tuple(by_address.get(prefix.address, ())) if alone else ())


def _is_there(place: Listener, worker: Worker, kernel: Kernel) -> bool:
    inodes = kernel.listeners.get(place, frozenset())
    return bool(inodes) if worker.inodes is None else not inodes.isdisjoint(worker.inodes)


def _facts(node: WireNode, routes: LocalRoutes) -> NodeFacts:
    return NodeFacts(
        detector=node.detector,
        node_port_addresses=None if node.every_address else node.node_port_addresses - {LOOPBACK},
        loopback_node_ports=LOOPBACK in node.node_port_addresses,
        service_cidrs=tuple(each for each in node.networks if each in routes.ours or each in routes.others),
        relayed=True,
    )


def _workforce(workers: Sequence[Worker], serving: Sequence[Worker]) -> Iterator[str]:
    wanted = max((worker.answer.node.workers for worker in serving), default=0)
    if not workers:
        yield "no worker runs"
    elif len(workers) < wanted:
        yield f"{len(workers)} of {wanted} workers run"
    for worker in workers:
        if not worker.serves:
            yield f"worker {worker.number} serves nothing"


def _differences(
    serving: Sequence[Worker], absent: Mapping[int, frozenset[Frontend]], everywhere: frozenset[Frontend]
) -> Iterator[str]:
    for other in serving[1:]:
        one = serving[0]
        both = f"workers {one.number} and {other.number}"
        if other.answer.node != one.answer.node:
            yield f"{both} differ in the facts of the node"
        ours, theirs = dict(one.answer.routes), dict(other.answer.routes)
        if ours != theirs:
            different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            for frontend in different[:MOST_SENTENCES]:
                yield f"{both} differ in what they do at {frontend}"
        if frozenset(other.answer.hairpins) != frozenset(one.answer.hairpins):
            yield f"{both} differ in hairpins"
    for index, frontends in absent.items():
        for frontend in sorted(frontends - everywhere)[:MOST_SENTENCES]:
            yield f"worker {index} does not listen at {frontend}"


def _strange_routes(answer: TableAnswer, routes: LocalRoutes, lingering: Collection[Address]) -> Iterator[str]:
    wanted = needed({frontend.address for frontend, _ in answer.routes}, answer.node.networks, routes.others)
    for prefix in sorted(routes.ours - wanted)[:MOST_SENTENCES]:
        if not any(address in prefix for address in lingering):
            what = "an address" if prefix.length == len(prefix.address) * 8 else "a network of addresses"
            yield f"{prefix} is {what} of the node, and no Service has it"
