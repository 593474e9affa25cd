"""What became of one packet, and events of a trace put together to that.

The kernel numbers packets by where they lie in memory, so that numbers come again, and a packet that the node sends to
itself gets another one when it comes in by the loopback interface.  There it is known by its headers.  Lines of legacy
iptables have no number at all: they belong to the packet of the same source, and may be read before its first event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

import msgspec

from rules.forwarding import Address, Family, Protocol, family_of
from rules.netlink.headers import Headers
from rules.nftables.chains import STICKY_READ, TO_SLOT
from rules.nftables.expressions import DROP
from rules.nftables.layout import TABLE
from rules.nftables.trace import ENTERING, LEAVING, POLICY, SAMPLE, Event

LOOPBACK = 1
"""The index of the loopback interface: it is the first of every network namespace."""
MOST_OPEN = 1000
MOST_EARLY = 10_000
"""Lines that are kept for packets whose first event was not read yet."""
_REMEMBERED = "the client is remembered, and gets the backend that it had (affinity)"
_FORGOTTEN = "the client is remembered, and the backend that it had is gone: it gets another (affinity)"


class Whose(NamedTuple):
    """The proxy whose rules are followed, by which of them are its own."""

    name: str
    table: str
    """Of nftables."""
    chains: str
    """How the names of its chains begin in tables of iptables."""

    def has(self, table: str, chain: str) -> bool:
        """Whether a chain is its own."""
        return table == self.table or chain.startswith(self.chains)


SLUICE = Whose("sluice", TABLE, "SLUICE-")
KUBE_PROXY = Whose("kube-proxy", "kube-proxy", "KUBE-")


class Place(NamedTuple):
    """A rule, or a chain's policy (`handle` 0)."""

    family: int
    table: str
    chain: str
    handle: int
    """In nftables the rule's handle; in legacy iptables its number in the chain."""
    target: str = ""
    """In legacy iptables, where handles are unknown: DROP or REJECT."""

    @property
    def legacy(self) -> bool:
        """Whether it is of legacy iptables."""
        return bool(self.target)


class Traced(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one packet."""

    before: Headers
    """As it came in or was sent."""
    after: Headers
    """As it was seen last."""
    input: int = 0
    """The index of the interface by which it came in; 0: the node sent it, or nobody said."""
    output: int = 0
    """By which it left; 0: it did not, or nobody said."""
    chains: tuple[str, ...] = ()
    """Those of the proxy that it went through, in order."""
    dropped: Place | None = None
    arrived: bool = False
    """Whether it left the node or reached a socket of it."""
    failed: str = ""
    """Why a worker gave the connection up, without a backend."""
    notes: tuple[str, ...] = ()
    """What else was seen."""

    @property
    def family(self) -> Family:
        return family_of(self.before.destination)

    @property
    def translated(self) -> bool:
        return (self.before.destination, self.before.port) != (self.after.destination, self.after.port)

    @property
    def masqueraded(self) -> bool:
        """Whether the one who answers sees another source: of what the node sends itself, mostly the port alone."""
        return (self.before.source, self.before.source_port) != (self.after.source, self.after.source_port)


class Passed(NamedTuple):
    """That a packet met a rule of legacy iptables."""

    headers: Headers
    """As they were there."""
    place: Place
    ends: bool
    """Whether it ended there."""


_Source = tuple[Address, int, Protocol]
_Key = TypeVar("_Key")


class _Underway(Generic[_Key]):
    """Packets that are not complete, by key; the one of a line is found without a walk over all of them."""

    def __init__(self) -> None:
        self._packets: dict[_Key, Traced] = {}
        self._by_source: dict[_Source, dict[_Key, None]] = {}

    def __len__(self) -> int:
        return len(self._packets)

    def packets(self) -> Iterable[Traced]:
        return self._packets.values()

    def get(self, key: _Key) -> Traced | None:
        return self._packets.get(key)

    def put(self, key: _Key, traced: Traced) -> None:
        self.pop(key)
        self._packets[key] = traced
        for source in _sources(traced):
            self._by_source.setdefault(source, {})[key] = None

    def pop(self, key: _Key) -> Traced | None:
        traced = self._packets.pop(key, None)
        for source in _sources(traced) if traced is not None else ():
            keys = self._by_source[source]
            del keys[key]
            if not keys:
                del self._by_source[source]
        return traced

    def of(self, passed: Passed) -> tuple[_Key, Traced] | None:
        """Whose line it is; None: of none of these."""
        keys = self._by_source.get(_source(passed.headers), ())
        return next(((key, traced) for key in keys if _is_of(passed, traced := self._packets[key])), None)


class _Early:
    """Lines of packets whose first event was not read yet; of too many, those of the oldest source go."""

    def __init__(self) -> None:
        self._by_source: dict[_Source, dict[int, Passed]] = {}
        self._kept = 0
        self._number = 0

    def keep(self, passed: Passed) -> None:
        if self._kept >= MOST_EARLY:
            self._kept -= len(self._by_source.pop(next(iter(self._by_source))))
        self._by_source.setdefault(_source(passed.headers), {})[self._number] = passed
        self._number += 1
        self._kept += 1

    def near(self, traced: Traced) -> list[tuple[int, Passed]]:
        """Lines that may be of a packet, numbered, in their order."""
        if not self._kept:
            return []
        return sorted(item for source in _sources(traced) for item in self._by_source.get(source, {}).items())

    def drop(self, number: int, passed: Passed) -> None:
        source = _source(passed.headers)
        lines = self._by_source[source]
        del lines[number]
        self._kept -= 1
        if not lines:
            del self._by_source[source]


class Assembly:
    """Packets on their way, by the events of one trace: `own_table` is that of the trace, `whose` the proxy."""

    def __init__(self, own_table: str, whose: Whose = SLUICE) -> None:
        self._own_table = own_table
        self._whose = whose
        self._open: _Underway[int] = _Underway()
        self._looped: _Underway[Headers] = _Underway()
        """What left by the loopback interface, and has not come in yet."""
        self._early = _Early()

    def add(self, event: Event) -> list[Traced]:
        """Take note of an event; the packets that are complete with it."""
        own = event.table == self._own_table
        lost: list[Traced] = []
        traced = self._open.get(event.id)
        if own and event.headers is not None and event.chain == SAMPLE:
            if traced is not None:
                lost = [traced]
            traced = Traced(before=event.headers, after=event.headers, input=event.input)
        elif event.headers is not None and (looped := self._looped.pop(event.headers)) is not None:
            lost = [traced] if traced is not None else []
            traced = looped
        if traced is None:
            return lost
        traced = self._with_early(_advanced(traced, event, self._whose))
        self._open.pop(event.id)
        if traced.dropped is not None:
            return [*lost, traced]
        if own and event.chain == LEAVING and event.output == LOOPBACK:
            self._looped.put(traced.after, traced)
        elif own and event.chain in {LEAVING, ENTERING}:
            return [*lost, msgspec.structs.replace(traced, arrived=True)]
        elif len(self._open) < MOST_OPEN:
            self._open.put(event.id, traced)
        return lost

    def passed(self, passed: Passed) -> list[Traced]:
        """Take note of a line; the packets that are complete with it."""
        found = self._lined(self._open, passed)
        if found is None:
            found = self._lined(self._looped, passed)
        if found is None:
            self._early.keep(passed)
        return found or []

    def rest(self) -> list[Traced]:
        """Packets that were seen and of which no end was told."""
        return [*self._open.packets(), *self._looped.packets()]

    def _with_early(self, traced: Traced) -> Traced:
        """A packet with the lines that were read before it was known."""
        for number, each in self._early.near(traced):
            if traced.dropped is None and _is_of(each, traced):
                traced = _went_through(traced, each, self._whose)
                self._early.drop(number, each)
        return traced

    def _lined(self, packets: _Underway[_Key], passed: Passed) -> list[Traced] | None:
        """Write a line to its packet; the packets that end with it; None: it is not among these."""
        found = packets.of(passed)
        if found is None:
            return None
        key, traced = found[0], _went_through(found[1], passed, self._whose)
        if traced.dropped is None:
            packets.put(key, traced)
            return []
        packets.pop(key)
        return [traced]


def _source(headers: Headers) -> _Source:
    return headers.source, headers.source_port, headers.protocol


def _sources(traced: Traced) -> set[_Source]:
    """Those that lines about a packet have."""
    return {_source(traced.before), _source(traced.after)}


def _is_of(passed: Passed, traced: Traced) -> bool:
    """Whether a line is about a packet: of its source, or of its headers as they were seen last."""
    return passed.headers == traced.after or _source(passed.headers) == _source(traced.before)


def _went_through(traced: Traced, passed: Passed, whose: Whose) -> Traced:
    chains, name = traced.chains, passed.place.chain
    if name not in chains and whose.has(passed.place.table, name):
        chains += (name,)
    return msgspec.structs.replace(
        traced, after=passed.headers, chains=chains, dropped=passed.place if passed.ends else None
    )


def _advanced(traced: Traced, event: Event, whose: Whose) -> Traced:
    chains = traced.chains
    for each in (event.chain, event.target):
        if each and each not in chains and whose.has(event.table, each):
            chains += (each,)
    notes = traced.notes
    if event.table == TABLE and event.target == TO_SLOT:
        notes = _by_affinity(notes, remembered=event.chain == STICKY_READ)
    dropped = None
    if event.verdict >= 0 and event.verdict & 0xFF == DROP:
        dropped = Place(event.family, event.table, event.chain, 0 if event.kind == POLICY else event.handle)
    return msgspec.structs.replace(
        traced,
        after=event.headers or traced.after,
        output=event.output if event.chain == LEAVING else traced.output,
        chains=chains,
        notes=notes,
        dropped=dropped,
    )


def _by_affinity(notes: tuple[str, ...], *, remembered: bool) -> tuple[str, ...]:
    """What is told of a client whose backend is looked up: as it is remembered, or anew."""
    if remembered:
        return (*notes, _REMEMBERED)
    # A remembered backend that is gone is looked up in vain.
    return tuple(_FORGOTTEN if each == _REMEMBERED else each for each in notes)
