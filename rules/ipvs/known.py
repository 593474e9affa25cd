"""What one family's kernel holds since the last write, and from there to the steps of a delta.  Pure.

A delta costs what it changes: the frontends that it names are laid out as they were and as they will be, and nothing
else is looked at.  Only another bit for masquerading changes every mark, and with it everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from rules.forwarding import Address, Delta, ForwardingTable, Frontend, NodeFacts, Route
from rules.ipvs.layout import Layout, addresses_of, joined
from rules.ipvs.marks import Numbers
from rules.ipvs.plan import Oddities, RealKey, RemoveReal, RemoveServer, Serve, Step, Weigh, steps


class Known:
    """A family's table, with what the kernel has given to it."""

    def __init__(self, table: ForwardingTable, numbers: Numbers, own: frozenset[Address], scheduler: str) -> None:
        """A table that was written; the other arguments as of `rules.ipvs.layout.Layout`."""
        self._family = table.family
        self._scheduler = scheduler
        self._numbers = numbers
        self._own = own
        self.facts: NodeFacts = table.node
        self._routes = dict(table.routes)
        self._hairpins = set(table.hairpins)
        self._tenants = Counter(addresses_of(table.routes))
        """By address, how many frontends have it."""
        self.draining: set[RealKey] = set()

    def take(self, delta: Delta, fitting: ForwardingTable) -> list[Step]:
        """The steps of a delta, after which this is the table that it leads to.

        Args:
            delta: the delta.
            fitting: its changed routes and the node's facts from then on, as the mode holds them.

        Raises:
            ValueError: the facts cannot be said in marks.
        """
        before, facts = self.facts, fitting.node
        changed = dict(fitting.routes)
        touched = {each: self._routes[each] for each in (*delta.removed, *changed) if each in self._routes}
        gone, come = self._move(addresses_of(touched), addresses_of(changed))
        layouts = [self._layout(before), self._layout(facts)]
        if facts.mark == before.mark:
            old = layouts[0].state(touched, delta.hairpins_removed & self._hairpins)
            self._change(delta, changed)
            new = layouts[1].state(changed, delta.hairpins_added)
        else:
            old = layouts[0].state(self._routes, self._hairpins)
            self._change(delta, changed)
            new = layouts[1].state(self._routes, self._hairpins)
        old, new = joined(old, layouts[0].bound(gone)), joined(new, layouts[1].bound(come))
        if facts != before:
            old, new = joined(old, layouts[0].node()), joined(new, layouts[1].node())
        self.facts = facts
        needed = set(layouts[1].owners_of(changed))
        for owner in layouts[0].owners_of(touched):
            if owner not in needed:
                self._numbers.give_back(owner)
        odd = Oddities(draining=frozenset(each for each in self.draining if each[0] in old.servers))
        planned = steps(old, new, odd, rules=_rules_differ(before, facts))
        self.note(planned)
        return planned

    def note(self, planned: Iterable[Step]) -> None:
        """Remember which real servers drain after some steps."""
        for step in planned:
            for change in step.changes if isinstance(step, Serve) else ():
                match change:
                    case Weigh(key, target, weight):
                        (self.draining.discard if weight else self.draining.add)((key, target))
                    case RemoveReal(key, target):
                        self.draining.discard((key, target))
                    case RemoveServer(key):
                        self.draining = {each for each in self.draining if each[0] != key}

    def _change(self, delta: Delta, changed: dict[Frontend, Route]) -> None:
        for frontend in delta.removed:
            self._routes.pop(frontend, None)
        self._routes.update(changed)
        self._hairpins -= delta.hairpins_removed
        self._hairpins |= delta.hairpins_added

    def _move(self, leaving: Iterable[Address], coming: Iterable[Address]) -> tuple[list[Address], list[Address]]:
        """Count frontends' addresses; those that nobody has any more, and those that somebody has now."""
        moved = Counter(coming)
        moved.subtract(leaving)
        gone, come = [], []
        for address, by in moved.items():
            had = self._tenants.get(address, 0)
            if has := had + by:
                self._tenants[address] = has
            else:
                self._tenants.pop(address, None)
            if had and not has:
                gone.append(address)
            elif has and not had:
                come.append(address)
        return gone, come

    def _layout(self, facts: NodeFacts) -> Layout:
        return Layout(self._family, facts, self._numbers, self._own, self._scheduler)


def _rules_differ(old: NodeFacts, new: NodeFacts) -> bool:
    """Whether the constant rules of two nodes do, beside what stands in sets."""

    def by_rules(facts: NodeFacts) -> NodeFacts:
        restricted = None if facts.node_port_addresses is None else frozenset[Address]()
        return msgspec.structs.replace(
            facts, node_port_addresses=restricted, service_cidrs=(), health_check_ports=frozenset()
        )

    return by_rules(old) != by_rules(new)
