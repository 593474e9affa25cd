"""Events of a trace put together: one value for each packet.

The kernel numbers packets by where they lie in memory, so that numbers come again, and a packet that the node sends to
itself gets another one when it comes in by the loopback interface.  There it is known by its headers.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rules.forwarding import Family, family_of
from rules.nftables.expressions import DROP
from rules.nftables.layout import TABLE
from rules.nftables.trace import ENTERING, LEAVING, POLICY, SAMPLE, Event, Headers

LOOPBACK = 1
"""The index of the loopback interface: it is the first of every network namespace."""
MOST_OPEN = 1000


class Place(NamedTuple):
    """A rule, or a chain's policy (`handle` 0)."""

    family: int
    table: str
    chain: str
    handle: int


class Traced(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one packet."""

    before: Headers
    """As it came in or was sent."""
    after: Headers
    """As it was seen last."""
    input: int = 0
    """The index of the interface by which it came in; 0: the node sent it."""
    output: int = 0
    """By which it left; 0: it did not."""
    chains: tuple[str, ...] = ()
    """Those of our table that it went through, in order."""
    dropped: Place | None = None
    arrived: bool = False
    """Whether it left the node or reached a socket of it."""

    @property
    def family(self) -> Family:
        return family_of(self.before.destination)

    @property
    def translated(self) -> bool:
        return (self.before.destination, self.before.port) != (self.after.destination, self.after.port)

    @property
    def masqueraded(self) -> bool:
        return self.before.source != self.after.source


class Assembly:
    """Packets on their way, by the events of one trace; `own_table` is that of the trace."""

    def __init__(self, own_table: str) -> None:
        self._own_table = own_table
        self._open: dict[int, Traced] = {}
        self._looped: dict[Headers, Traced] = {}
        """What left by the loopback interface, and has not come in yet."""

    def add(self, event: Event) -> list[Traced]:
        """Take note of an event; the packets that are complete with it."""
        own = event.table == self._own_table
        lost: list[Traced] = []
        traced = self._open.get(event.id)
        if own and event.headers is not None and event.chain == SAMPLE:
            if traced is not None:
                lost = [traced]
            traced = Traced(before=event.headers, after=event.headers, input=event.input)
        elif event.headers is not None and (looped := self._looped.pop(event.headers, None)) is not None:
            lost = [traced] if traced is not None else []
            traced = looped
        if traced is None:
            return lost
        traced = _advanced(traced, event)
        self._open.pop(event.id, None)
        if own and event.chain == LEAVING and event.output == LOOPBACK:
            self._looped[traced.after] = traced
        elif own and event.chain in {LEAVING, ENTERING}:
            return [*lost, msgspec.structs.replace(traced, arrived=True)]
        elif traced.dropped is not None:
            return [*lost, traced]
        elif len(self._open) < MOST_OPEN:
            self._open[event.id] = traced
        return lost

    def rest(self) -> list[Traced]:
        """Packets that were seen and of which no end was told."""
        return [*self._open.values(), *self._looped.values()]


def _advanced(traced: Traced, event: Event) -> Traced:
    chains = traced.chains
    if event.table == TABLE:
        chains += tuple(each for each in (event.chain, event.target) if each and each not in chains)
    dropped = None
    if event.verdict >= 0 and event.verdict & 0xFF == DROP:
        dropped = Place(event.family, event.table, event.chain, 0 if event.kind == POLICY else event.handle)
    return msgspec.structs.replace(
        traced,
        after=event.headers or traced.after,
        output=event.output if event.chain == LEAVING else traced.output,
        chains=chains,
        dropped=dropped,
    )
