"""The table of one family as a worker serves it: which addresses it listens on, and for which route.

A route at an address of its own has one listener; a node port has one on each node-port address.  Where both claim the
same address and port, the route of the address has it, unless it has no backend and the node port has (NFT-28).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from proxy.userspace.admission import Sources, admitted
from proxy.userspace.choose import Chooser, Memory, Pool
from proxy.userspace.control import Apply, FrontendStats, TableAnswer, WireNode
from proxy.userspace.stats import Counters
from rules.forwarding import Address, Backend, Endpoint, Family, Frontend, Protocol, Route

PROTOCOLS = (Protocol.TCP, Protocol.UDP)
"""What userspace can carry; routes of others are kept, and have no listener."""


class Bind(NamedTuple):
    """Where a listener is."""

    address: Address
    protocol: Protocol
    port: int


class Served:
    """A route with what choosing needs.  A change of the route makes a new one; the counters go on."""

    __slots__ = ("counters", "everywhere", "family", "frontend", "local", "route", "sources")

    def __init__(
        self, family: Family, frontend: Frontend, route: Route, *, counters: Counters, memory: Memory, sources: Sources,
        chance: random.Random,
    ) -> None:  # fmt: skip
        self.family = family
        self.frontend = frontend
        self.route = route
        self.counters = counters
        self.sources = sources
        counters.label = route.label

        def chooser(backends: Iterable[Backend]) -> Chooser:
            return Chooser(
                route.label or frontend,
                Pool(backends, chance),
                scheduler=route.scheduler,
                affinity=route.affinity,
                memory=memory,
                load=counters.load,
            )

        self.everywhere = chooser(route.backends)
        self.local = chooser(route.local_backends) if route.local_backends is not None else None

    @property
    def asks_interface(self) -> bool:
        """Whether the interface of a client decides about its backends."""
        return self.local is not None and self.sources.by_interface

    def chooser(self, source: Address, destination: Address, interface: str | None) -> Chooser | None:
        """Who chooses for a client; None: the client gets no backend."""
        if not admitted(self.route, source):
            return None
        chooser = self.everywhere
        if self.local is not None and not self.sources.are_inside(source, destination, interface):
            chooser = self.local
        return chooser if chooser.pool.targets else None

    def has(self, backend: object) -> bool:
        """Whether some client may get a backend."""
        return backend in self.everywhere.pool or (self.local is not None and backend in self.local.pool)


class Table:
    """What one family's frontends are served with."""

    def __init__(
        self, family: Family, *, memory: Memory, chance: random.Random, interfaces: Callable[[], Mapping[int, str]]
    ) -> None:
        self.family = family
        self.serial = ""
        self.applied = False
        """Whether the agent has ever said anything of this family."""
        self.sources = Sources(WireNode(), {})
        self.served: dict[Frontend, Served] = {}
        self._memory = memory
        self._chance = chance
        self._interfaces = interfaces
        self._interfaces_seen: Mapping[int, str] = {}
        self._counters: dict[Frontend, Counters] = {}
        self._hairpins: set[Endpoint] = set()

    def change(self, asked: Apply) -> set[Bind]:
        """Take over what the agent asks; the places where it may make a difference to listeners."""
        before = self.sources
        put, removed = dict(asked.put), set(asked.removed)
        if asked.reset:
            removed |= self.served.keys() - put.keys()
            self._hairpins = set()
        self._hairpins = self._hairpins.difference(asked.hairpins_removed).union(asked.hairpins_added)
        touched = {bind for frontend in removed for bind in self._binds(frontend)}
        for frontend in removed:
            self.served.pop(frontend, None)
        if asked.node is not None:
            touched |= self._node_port_binds()
            self.sources = Sources(asked.node, self._look_at_interfaces())
            touched |= self._node_port_binds()
            touched |= self._resourced()
        for frontend, route in put.items():
            old = self.served.get(frontend)
            # A reset repeats what is there: it must not begin rounds anew or forget anything.
            if old is None or old.route != route:
                self.served[frontend] = self._serve(frontend, route)
            if old is None or old.route != route or self.sources is not before:
                touched.update(self._binds(frontend))
        self.serial = asked.serial
        self.applied = True
        return touched

    def refresh_interfaces(self) -> set[Bind]:
        """Look at the node's interfaces again; the places whose filter names others than before."""
        if not self.sources.by_interface:
            return set()
        found = Sources(self.sources.node, self._look_at_interfaces())
        if found.pod_interfaces == self.sources.pod_interfaces:
            return set()
        self.sources = found
        return self._resourced()

    def _look_at_interfaces(self) -> Mapping[int, str]:
        """The node's interfaces, or those of the last look: it takes a descriptor, and clients may have them all."""
        with contextlib.suppress(OSError):
            self._interfaces_seen = self._interfaces()
        return self._interfaces_seen

    def owner(self, bind: Bind) -> Served | None:
        """Whose listener stands at a place; None: nobody's."""
        own = self.served.get(Frontend(*bind))
        node_port = None
        if bind.address in self.sources.node.node_port_addresses:
            node_port = self.served.get(Frontend(b"", bind.protocol, bind.port))
        if own is not None and not own.route.backends and node_port is not None and node_port.route.backends:
            return node_port
        return own or node_port

    def answer(self, trouble: list[tuple[Frontend, str]]) -> TableAnswer:
        """The table as the agent gets it back."""
        return TableAnswer(
            serial=self.serial,
            node=self.sources.node,
            routes=[(frontend, served.route) for frontend, served in self.served.items()],
            hairpins=sorted(self._hairpins),
            trouble=trouble,
        )

    def statistics(self) -> list[FrontendStats]:
        """The figures of all frontends that have any.

        Those that are gone are told as long as flows of them are left, and once more when they have lost the last.
        """
        found = []
        for frontend, counters in list(self._counters.items()):
            if counters.total or counters.failures:
                found.append(counters.record(self.family, frontend))
            if frontend not in self.served and not counters.open:
                del self._counters[frontend]
        return found

    def _serve(self, frontend: Frontend, route: Route) -> Served:
        return Served(
            self.family,
            frontend,
            route,
            counters=self._counters.setdefault(frontend, Counters()),
            memory=self._memory,
            sources=self.sources,
            chance=self._chance,
        )

    def _resourced(self) -> set[Bind]:
        """Hand the node's sources to all that are served; the places of those to whom it may matter."""
        touched: set[Bind] = set()
        for frontend, served in self.served.items():
            served.sources = self.sources
            if served.local is not None:
                touched.update(self._binds(frontend))
        return touched

    def _binds(self, frontend: Frontend) -> Iterable[Bind]:
        if frontend.protocol not in PROTOCOLS:
            return ()
        if not frontend.is_node_port:
            return (Bind(*frontend),)
        addresses = self.sources.node.node_port_addresses
        return [Bind(address, frontend.protocol, frontend.port) for address in addresses]

    def _node_port_binds(self) -> set[Bind]:
        return {bind for frontend in self.served if frontend.is_node_port for bind in self._binds(frontend)}
