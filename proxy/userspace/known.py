"""What workers and the kernel hold since the last write of one family: what an agent must remember to write a delta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import msgspec

from proxy.userspace.anyip import LocalRoutes, RouteError, needed
from proxy.userspace.control import WireNode
from rules.dataplane import Capabilities
from rules.diff import fit
from rules.forwarding import Address, Delta, ForwardingTable, Frontend, Prefix


class Known:
    """A table as it was written, and the routes that were there then."""

    def __init__(self, table: ForwardingTable, wire: WireNode, local: LocalRoutes) -> None:
        self.family = table.family
        self.routes = dict(table.routes)
        self.hairpins = set(table.hairpins)
        self.facts = table.node
        self.wire = wire
        self.local = local
        self._users = Counter(frontend.address for frontend in table.routes if frontend.address)
        """How many frontends have an address: several ports, and several Services, may share one."""

    def table(self) -> ForwardingTable:
        """The table of now; it changes with the next delta."""
        return ForwardingTable(
            family=self.family, node=self.facts, routes=self.routes, hairpins=frozenset(self.hairpins)
        )

    def fitted(self, delta: Delta, capabilities: Capabilities) -> Delta:
        """A delta as a dataplane of these capabilities holds it."""
        facts = self.facts if delta.node is None else delta.node
        partial = ForwardingTable(family=self.family, node=facts, routes=delta.changed)
        held = fit(partial, capabilities)
        return msgspec.structs.replace(
            delta,
            changed=held.routes,
            removed=delta.removed & self.routes.keys(),
            node=held.node if held.node != self.facts else None,
        )

    def take(self, delta: Delta) -> tuple[frozenset[Prefix], frozenset[Prefix]]:
        """Become what a delta makes of it; the routes that this takes, and those that nothing takes any more."""
        touched: set[Address] = set()
        for frontend in delta.removed:
            del self.routes[frontend]
            self._count(frontend, -1, touched)
        for frontend, route in delta.changed.items():
            if frontend not in self.routes:
                self._count(frontend, 1, touched)
            self.routes[frontend] = route
        self.hairpins -= delta.hairpins_removed
        self.hairpins |= delta.hairpins_added
        networks = self.facts.service_cidrs
        if delta.node is not None:
            self.facts = delta.node
        if self.facts.service_cidrs != networks:
            wanted = self.needed()
            return wanted - self.local.ours, self.local.ours - wanted
        wanted = needed((each for each in touched if each in self._users), networks, self.local.others)
        singles = frozenset(Prefix(address, len(address) * 8) for address in touched)
        return wanted - self.local.ours, (singles & self.local.ours) - wanted

    def needed(self) -> frozenset[Prefix]:
        """All routes that the table takes."""
        return needed(self._users, self.facts.service_cidrs, self.local.others)

    def uses(self, prefix: Prefix) -> bool:
        """Whether the table takes a route of ours."""
        return prefix.address in self._users or prefix in self.facts.service_cidrs

    def _count(self, frontend: Frontend, change: int, touched: set[Address]) -> None:
        address = frontend.address
        if not address:
            return
        self._users[address] += change
        if self._users[address] == 0:
            del self._users[address]
            touched.add(address)
        elif change > 0 and self._users[address] == 1:
            touched.add(address)


def unreachable(table: ForwardingTable, refused: Collection[RouteError], local: LocalRoutes) -> Mapping[Frontend, str]:
    """The frontends whose addresses could not be made the node's own, and why."""
    if not refused:
        return {}
    is_local = local.covering()
    why = f"the address cannot be made one of the node's: {next(iter(refused)).strerror}"
    return {
        frontend: f"{frontend}: {why}"
        for frontend in table.routes
        if frontend.address and not is_local(frontend.address)
    }
