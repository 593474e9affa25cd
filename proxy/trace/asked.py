"""What a trace is asked: which connections, for how long, how many, and whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from proxy.dump import Filter
from proxy.trace.packets import SLUICE, Whose
from rules.forwarding import Address, Family, ForwardingTable, family_of
from rules.nftables.trace import Wanted


class Bounds(NamedTuple):
    """When a trace ends: whichever comes first."""

    seconds: float
    packets: int


class UntraceableError(Exception):
    """Nothing can be traced; the message says why and what to do."""


class Hear(Protocol):
    """What is said beside the packets."""

    def ready(self) -> None:
        """From now on packets are seen."""

    def note(self, line: str) -> None:
        """Something that whoever reads the packets should know."""


class Question(NamedTuple):
    """What is traced, by family."""

    wanted: Mapping[Family, Wanted]
    tables: Mapping[Family, ForwardingTable]
    bounds: Bounds
    whose: Whose = SLUICE
    """The proxy whose tables these are."""


def question_of(
    tables: Mapping[Family, ForwardingTable],
    wanted: Filter,
    source: Address,
    bounds: Bounds,
    whose: Whose = SLUICE,
) -> Question | None:
    """What is asked of tables; None: nothing can be what was asked for."""
    asked = {family: each for family, table in tables.items() if (each := _wanted(table, wanted, source))}
    return Question(asked, tables, bounds, whose) if asked else None


def _wanted(table: ForwardingTable, wanted: Filter, source: Address) -> Wanted | None:
    """Which packets of a table's family are traced; None: none can be what was asked for."""
    given = [each for each in (wanted.address, source) if each]
    if any(family_of(each) is not table.family for each in given):
        return None
    if not (wanted.namespace or wanted.service) and (wanted.address or wanted.port):
        # Also what is no frontend: a closed port, an address that no Service has.
        return Wanted(None, wanted.address or b"", wanted.port, source)
    frontends = frozenset(frontend for frontend, route in table.routes.items() if wanted.admits(frontend, route))
    return Wanted(frontends, source=source) if frontends else None
