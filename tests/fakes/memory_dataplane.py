"""A dataplane whose kernel is a variable, and which misbehaves to order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from rules.dataplane import Applied, Capabilities, DataplaneError, Raw
from rules.forwarding import Delta, Family, ForwardingTable, apply_delta


class FlakyMemory:
    """See the head of this module; the kernel, `held`, outlives it when it is passed on."""

    name = "memory"
    capabilities = Capabilities()

    def __init__(self, family: Family = Family.IPV4, held: ForwardingTable | None = None) -> None:
        self.family = family
        self.held = held
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, list[Callable[[], None]]] = {"apply": [], "sync": [], "read": [], "after": []}
        """What befalls the next calls, first to last; `after`: when a sync or an apply has been written already."""
        self.refused: set[str] = set()
        """Labels that the kernel does not take."""
        self._known: ForwardingTable | None = None

    def check(self) -> None:
        """Nothing is lacking."""

    def read(self) -> ForwardingTable | None:
        self._befall("read")
        return self.held

    def raw(self) -> Raw | None:
        return None

    def sync(self, table: ForwardingTable) -> Applied:
        self._known = None
        self._befall("sync")
        found = self.held
        routes = {frontend: route for frontend, route in table.routes.items() if route.label not in self.refused}
        refused = frozenset(route.label for route in table.routes.values() if route.label in self.refused)
        self.held = msgspec.structs.replace(table, routes=routes)
        self._befall("after")
        self._known = self.held
        return Applied(
            full=True,
            found=found,
            operations=int(found != self.held),
            refused=refused,
            why_refused=dict.fromkeys(refused, "a bad element"),
        )

    def apply(self, delta: Delta) -> Applied:
        known, self._known = self._known, None
        if known is None:
            raise DataplaneError("a sync must come first")
        self._befall("apply")
        if any(route.label in self.refused for route in delta.changed.values()):
            raise DataplaneError("an element was refused")
        if self.held is None or self.held.damage:
            raise DataplaneError("the rules are gone")
        # What others did to the rest stays as it is.
        self.held = apply_delta(self.held, delta)
        self._befall("after")
        self._known = apply_delta(known, delta)
        return Applied(operations=1)

    def cleanup(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to give back."""

    def _befall(self, call: str) -> None:
        self.calls[call] += 1
        if self.faults[call]:
            self.faults[call].pop(0)()


def bad_mood() -> None:
    raise DataplaneError("the kernel is in a bad mood")


def bug() -> None:
    raise ZeroDivisionError("a bug")
