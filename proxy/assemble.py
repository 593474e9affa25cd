"""The outcomes of all Services put together: one forwarding table per family, kept up to date change by change.

An `Assembler` holds what every Service claims.  Two things are shared and counted by owner: frontends that several
Services claim (the older Service has it, then the one whose namespace and name come first; the others wait, and the
next in line takes over when it goes), and hairpin endpoints, as one pod may be behind several Services.

The work of an update is in proportion to the Service that is updated, that of `take_delta` to what was touched since
the last one.  What was changed and changed back in between is no change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from proxy.compute import NOTHING, Outcome
from proxy.conntrack import Change, Serving, change
from proxy.objects import Key, Metadata
from rules.forwarding import Delta, Endpoint, Family, ForwardingTable, Frontend, NodeFacts, Route


class Precedence(NamedTuple):
    """Who comes first where Services contend, the least first: the oldest, then by namespace and name.

    An object without a creation timestamp (a manifest written by hand) is younger than all that have one: what a
    cluster has agreed on is not displaced by a file.
    """

    undated: bool
    created: str
    namespace: str
    name: str


def precedence_of(metadata: Metadata) -> Precedence:
    """The precedence of an object.  RFC 3339 in UTC sorts as text."""
    created = metadata.creation_timestamp
    return Precedence(not created, created, metadata.namespace, metadata.name)


class Conflict(NamedTuple):
    """A frontend that several Services claim."""

    frontend: Frontend
    winner: Key
    losers: tuple[Key, ...]
    """In the order in which they would take over."""


class Assembler:
    """The table of one family, from the outcomes of Services as they come."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._node = NodeFacts()
        self._outcomes: dict[Key, Outcome] = {}
        self._precedences: dict[Key, Precedence] = {}
        self._routes: dict[Frontend, Route] = {}
        self._owners: dict[Frontend, Key] = {}
        self._contested: dict[Frontend, set[Key]] = {}
        """All who claim a frontend that more than one does, the winner among them."""
        self._hairpins: dict[Endpoint, int] = {}
        self._let_in: dict[int, int] = {}
        """How many Services have their health check at a port."""
        self._let_in_moved = False
        self._serving: dict[Frontend, Serving] = {}
        """Of the frontends' owners; see `Outcome.serving`."""
        # What the last delta led to, for what was touched since.
        self._routes_before: dict[Frontend, Route | None] = {}
        self._hairpins_before: dict[Endpoint, bool] = {}
        self._serving_before: dict[Frontend, Serving | None] = {}
        self._node_before = self._node

    @property
    def family(self) -> Family:
        return self._family

    def update(self, key: Key, precedence: Precedence, outcome: Outcome | None) -> None:
        """The Service at `key` comes to `outcome` now; None: it is gone."""
        old = self._outcomes.get(key, NOTHING)
        new = outcome or NOTHING
        if old is NOTHING and not (new.routes or new.hairpins):
            return  # the other family's Services, mostly
        if new.routes or new.hairpins:
            self._outcomes[key] = new
        else:
            self._outcomes.pop(key, None)
        moved = self._precedences.get(key) not in (None, precedence)
        for frontend in old.routes:
            if frontend not in new.routes:
                self._withdraw(key, frontend)
        if new.routes:
            self._precedences[key] = precedence
        else:
            self._precedences.pop(key, None)
        for frontend, route in new.routes.items():
            if frontend not in old.routes:
                self._claim(key, frontend)
            elif moved and frontend in self._contested:
                self._elect(frontend)
            elif self._owners[frontend] == key and self._routes[frontend] is not route:
                self._put(frontend, route)
        self._recount(old.hairpins, new.hairpins)
        self._move_let_in(old.let_in, new.let_in)
        self._tend(old.serving.keys() | new.serving.keys())

    def set_node(self, facts: NodeFacts) -> None:
        """What holds for every route from now on, but for the ports of health checks, which Services say."""
        self._node = facts
        self._let_in_moved = True

    def take_delta(self) -> Delta:
        """What makes the table of the last call into the one of now."""
        changed = {}
        removed = set()
        for frontend, before in self._routes_before.items():
            now = self._routes.get(frontend)
            if now is None:
                if before is not None:
                    removed.add(frontend)
            elif now != before:
                changed[frontend] = now
        added = {endpoint for endpoint, had in self._hairpins_before.items() if not had and endpoint in self._hairpins}
        gone = {endpoint for endpoint, had in self._hairpins_before.items() if had and endpoint not in self._hairpins}
        node = self.node
        delta = Delta(
            changed=changed,
            removed=frozenset(removed),
            hairpins_added=frozenset(added),
            hairpins_removed=frozenset(gone),
            node=node if node != self._node_before else None,
        )
        self._routes_before = {}
        self._hairpins_before = {}
        self._node_before = node
        return delta

    def take_changes(self) -> dict[Frontend, Change]:
        """What became, since the last call, of the frontends whose stale flows are deleted."""
        changes = {}
        for frontend, before in self._serving_before.items():
            after = self._serving.get(frontend)
            # A Service that no longer asks for it has its flows left alone from now on.
            if after != before and (after is not None or frontend not in self._routes):
                changes[frontend] = change(before, after)
        self._serving_before = {}
        return changes

    @property
    def serving(self) -> Mapping[Frontend, Serving]:
        """The endpoints that serve each frontend whose stale flows are deleted."""
        return self._serving

    @property
    def routes(self) -> Mapping[Frontend, Route]:
        """The routes of the table; they change with later updates."""
        return self._routes

    def table(self) -> ForwardingTable:
        """The table of now; it does not change with later updates."""
        return ForwardingTable(
            family=self._family, node=self.node, routes=dict(self._routes), hairpins=frozenset(self._hairpins)
        )

    @property
    def node(self) -> NodeFacts:
        """What holds for every route."""
        if self._let_in_moved:
            self._let_in_moved = False
            self._node = msgspec.structs.replace(self._node, health_check_ports=frozenset(self._let_in))
        return self._node

    @property
    def size(self) -> int:
        """How many frontends the table has."""
        return len(self._routes)

    def conflicts(self) -> tuple[Conflict, ...]:
        """The frontends that several Services claim, by frontend."""
        conflicts = []
        for frontend in sorted(self._contested):
            winner, *losers = self._ranked(self._contested[frontend])
            conflicts.append(Conflict(frontend, winner, tuple(losers)))
        return tuple(conflicts)

    def _claim(self, key: Key, frontend: Frontend) -> None:
        owner = self._owners.get(frontend)
        if owner is None:
            self._owners[frontend] = key
            self._put(frontend, self._outcomes[key].routes[frontend])
        else:
            self._contested.setdefault(frontend, {owner}).add(key)
            self._elect(frontend)

    def _withdraw(self, key: Key, frontend: Frontend) -> None:
        claimants = self._contested.get(frontend)
        if claimants is None:
            del self._owners[frontend]
            self._put(frontend, None)
            return
        claimants.discard(key)
        self._elect(frontend)
        if len(claimants) == 1:
            del self._contested[frontend]

    def _elect(self, frontend: Frontend) -> None:
        winner = self._ranked(self._contested[frontend])[0]
        self._owners[frontend] = winner
        self._put(frontend, self._outcomes[winner].routes[frontend])
        self._tend([frontend])

    def _ranked(self, keys: Iterable[Key]) -> list[Key]:
        return sorted(keys, key=self._precedences.__getitem__)

    def _put(self, frontend: Frontend, route: Route | None) -> None:
        self._routes_before.setdefault(frontend, self._routes.get(frontend))
        if route is None:
            del self._routes[frontend]
        else:
            self._routes[frontend] = route

    def _tend(self, frontends: Iterable[Frontend]) -> None:
        """Take over what the frontends' owners say of their flows."""
        for frontend in frontends:
            owner = self._owners.get(frontend)
            now = None if owner is None else self._outcomes[owner].serving.get(frontend)
            before = self._serving.get(frontend)
            if now == before:
                continue
            self._serving_before.setdefault(frontend, before)
            if now is None:
                del self._serving[frontend]
            else:
                self._serving[frontend] = now

    def _move_let_in(self, old: int, new: int) -> None:
        if old == new:
            return
        for port, step in ((old, -1), (new, 1)):
            if port:
                self._let_in[port] = self._let_in.get(port, 0) + step
                if not self._let_in[port]:
                    del self._let_in[port]
        self._let_in_moved = True

    def _recount(self, old: frozenset[Endpoint], new: frozenset[Endpoint]) -> None:
        if old != new:
            for endpoint in new - old:
                self._count(endpoint, 1)
            for endpoint in old - new:
                self._count(endpoint, -1)

    def _count(self, endpoint: Endpoint, change: int) -> None:
        count = self._hairpins.get(endpoint, 0)
        self._hairpins_before.setdefault(endpoint, count > 0)
        if count + change:
            self._hairpins[endpoint] = count + change
        else:
            del self._hairpins[endpoint]
