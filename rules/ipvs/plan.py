"""From what a kernel holds to what it should hold: ordered steps.  Pure.

IPVS, sets and rules cannot change in one transaction, so the order of the steps is the promise (issue 7, point 3).  At
every point in between

* a frontend that is new answers only once its source ranges and what masquerades it are in place, and it loses them
  only after it is gone;
* a connection gets a backend that it would have got before all steps or after them, and keeps its source only where it
  would have kept it then with that backend.

    what narrows first     addresses off the device, open ports, servers and their backends, elements that carry marks
                           or keep packets from being marked
    what packets meet      firewall, kinds, hairpins; sources that ranges admit no longer; then the rules that look at
                           all these
    what widens then       servers by mark, elements that carry marks, servers by address, open ports, then bound
                           addresses, whose other ports are refused, and the addresses on the device
    what nobody needs      servers that no element leads to any more, then the rest of the elements

Marks are given by elements, one for each frontend, and a server by mark is there before the element that leads to it
and goes after it.  Where a frontend changes from policy Cluster to Local, its server loses the backends of others
before the element ends the masquerading; where it changes back, masquerading begins before the backends come.

A TCP backend that goes gets weight 0 and drains; of UDP and SCTP it is deleted, and so are its flows when their next
packet comes (IPVS-23).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import NamedTuple

from rules.forwarding import Address, Protocol
from rules.ipvs.layout import Server, State
from rules.ipvs.messages import Key, Target, VirtualServer
from rules.ipvs.sets import Set
from rules.netlink.ipset import Element, Extra

RealKey = tuple[Key, Target]


class NewServer(NamedTuple):
    server: VirtualServer


class ChangeServer(NamedTuple):
    """It picks in another way."""

    server: VirtualServer


class RemoveServer(NamedTuple):
    """With its real servers."""

    key: Key


class NewReal(NamedTuple):
    key: Key
    target: Target


class Weigh(NamedTuple):
    """1: connections come; 0: they don't, and those that are there go on."""

    key: Key
    target: Target
    weight: int


class RemoveReal(NamedTuple):
    key: Key
    target: Target


Change = NewServer | ChangeServer | RemoveServer | NewReal | Weigh | RemoveReal


class Serve(NamedTuple):
    """Changes of servers, in order."""

    changes: tuple[Change, ...]


class Add(NamedTuple):
    """Elements to a set; one that is there carries something else from now on."""

    which: Set
    elements: Mapping[Element, Extra]


class Delete(NamedTuple):
    """Elements from a set."""

    which: Set
    elements: tuple[Element, ...]


class Bind(NamedTuple):
    """Addresses to the device."""

    addresses: frozenset[Address]


class Unbind(NamedTuple):
    """Addresses from the device."""

    addresses: frozenset[Address]


class WriteRules(NamedTuple):
    """The constant rules, as the node's facts have them."""


Step = Serve | Add | Delete | Bind | Unbind | WriteRules


class Oddities(NamedTuple):
    """What a kernel holds beside a `State`."""

    draining: frozenset[RealKey] = frozenset()
    """Real servers of weight 0."""
    idle: frozenset[RealKey] = frozenset()
    """Real servers without connections, as far as it is known."""
    misweighed: frozenset[RealKey] = frozenset()
    """Real servers of another weight than 0 and 1."""
    broken: frozenset[Key] = frozenset()
    """Virtual servers that must be made anew: they have what none of ours has."""


NOTHING_ODD = Oddities()

_GATES = (Set.NODE_PORT_LOCAL, Set.LOCAL, Set.NODE_PORT)
"""Sets whose elements carry marks, in the order in which they come; they go the other way round."""
_BEFORE_RULES = (
    *(Set.SOURCES, Set.RANGED, Set.EXTERNAL_IP, Set.LOAD_BALANCER, Set.CLUSTER_IP, Set.HAIRPIN),
    *(Set.REFUSED, Set.EMPTY, Set.NODE_ADDRESS, Set.HEALTH_CHECK, Set.SERVICE_CIDR),
)
"""What decides about packets of frontends: it is there before them."""
_AFTER_ALL = (
    *(Set.SERVICE_CIDR, Set.RANGED, Set.SOURCES, Set.REFUSED, Set.NODE_ADDRESS, Set.HEALTH_CHECK),
    *(Set.EXTERNAL_IP, Set.LOAD_BALANCER, Set.CLUSTER_IP, Set.HAIRPIN, Set.BOUND),
)
"""And it goes after them."""


def steps(old: State, new: State, odd: Oddities = NOTHING_ODD, *, rules: bool = False) -> list[Step]:
    """What makes `old` into `new`; nothing where they are equal.

    Args:
        old: what the kernel holds, or the part of it that changes.
        new: what it should hold, or that part of it.
        odd: what it holds besides.
        rules: whether the constant rules are to be written.
    """
    return [step for step in _in_order(old, new, odd, rules=rules) if _does_something(step)]


def operations(step: Step) -> Iterator[Step]:
    """A step as the single changes that the kernel makes of it, in order."""
    match step:
        case Serve(changes):
            yield from (Serve((change,)) for change in changes)
        case Add(which, elements):
            yield from (Add(which, {element: extra}) for element, extra in elements.items())
        case Delete(which, gone):
            yield from (Delete(which, (element,)) for element in gone)
        case Bind(addresses):
            yield from (Bind(frozenset({address})) for address in sorted(addresses))
        case Unbind(addresses):
            yield from (Unbind(frozenset({address})) for address in sorted(addresses))
        case WriteRules():
            yield step


def size(step: Step) -> int:
    """How many kernel objects a step changes; the rules, which tell it themselves, count for none."""
    return 0 if isinstance(step, WriteRules) else len(step[-1])


def _in_order(old: State, new: State, odd: Oddities, *, rules: bool) -> Iterator[Step]:
    def gone(which: Set, but: Container[Element] = ()) -> Delete:
        wanted = new.of(which)
        return Delete(which, tuple(each for each in old.of(which) if each not in wanted and each not in but))

    def fresh(which: Set) -> Add:
        held = old.of(which)
        return Add(which, {element: extra for element, extra in new.of(which).items() if held.get(element) != extra})

    # Of frontends that keep having ranges; without ranges, whom the old ones admitted stays admitted.
    ranged = new.of(Set.RANGED)
    shut_out = Delete(Set.SOURCES, tuple(each for each in gone(Set.SOURCES).elements if Element(*each[:3]) in ranged))
    narrow, widen, last = _servers(old.servers, new.servers, odd)
    yield Unbind(old.addresses - new.addresses)
    yield gone(Set.OPEN)
    yield Serve(tuple(narrow))
    for which in reversed(_GATES):
        yield gone(which)
    yield gone(Set.EMPTY)
    for which in _BEFORE_RULES:
        yield fresh(which)
    yield shut_out
    if rules:
        yield WriteRules()
    yield Serve(tuple(change for change in widen if _is_by_mark(change)))
    for which in _GATES:
        yield fresh(which)
    yield Serve(tuple(change for change in widen if not _is_by_mark(change)))
    yield fresh(Set.OPEN)
    yield fresh(Set.BOUND)  # not earlier: where kube-proxy was before us, its addresses answer all this time
    yield Bind(new.addresses - old.addresses)
    yield Serve(tuple(last))
    for which in _AFTER_ALL:
        yield gone(which, but=frozenset(shut_out.elements) if which is Set.SOURCES else ())


def _servers(
    old: Mapping[Key, Server], new: Mapping[Key, Server], odd: Oddities
) -> tuple[list[Change], list[Change], list[Change]]:
    """What servers lose at once, what they get, and which of them go last."""
    narrow: list[Change] = []
    widen: list[Change] = []
    last: list[Change] = []
    draining: dict[Key, set[Target]] = {}
    for key, target in odd.draining:
        draining.setdefault(key, set()).add(target)
    for key, server in old.items():
        if key in odd.broken:
            narrow.append(RemoveServer(key))
        elif (wanted := new.get(key)) is None:
            (last if key.mark else narrow).append(RemoveServer(key))
        else:
            protocol = wanted.protocol if wanted.protocol is not None else server.protocol
            reals = server.reals
            narrow += (_leave(key, target, protocol, odd.idle) for target in sorted(reals - wanted.reals))
            narrow += _drained(key, draining.get(key, set()) - wanted.reals, protocol, odd.idle)
    for key, server in new.items():
        held = None if key in odd.broken else old.get(key)
        if held is None:
            widen.append(NewServer(server.server))
        elif held.server != server.server:
            widen.append(ChangeServer(server.server))
        there = frozenset() if held is None else held.reals
        waiting = set() if held is None else draining.get(key, set())
        widen += (
            Weigh(key, target, 1) if target in waiting else NewReal(key, target)
            for target in sorted(server.reals - there)
        )
        if odd.misweighed:
            widen += (Weigh(key, each, 1) for each in sorted(server.reals & there) if (key, each) in odd.misweighed)
    return narrow, widen, last


def key_of(change: Change) -> Key:
    """The virtual server that a change is of."""
    return change.server.key if isinstance(change, NewServer | ChangeServer) else change.key


def _is_by_mark(change: Change) -> bool:
    return bool(key_of(change).mark)


def _leave(key: Key, target: Target, protocol: Protocol | None, idle: frozenset[RealKey]) -> Change:
    """A backend goes: gracefully, if it may have connections to lose (IPVS-23)."""
    if protocol is Protocol.TCP and (key, target) not in idle:
        return Weigh(key, target, 0)
    return RemoveReal(key, target)


def _drained(
    key: Key, targets: Iterable[Target], protocol: Protocol | None, idle: frozenset[RealKey]
) -> Iterator[Change]:
    for target in sorted(targets):
        if protocol is not Protocol.TCP or (key, target) in idle:
            yield RemoveReal(key, target)


def _does_something(step: Step) -> bool:
    return isinstance(step, WriteRules) or bool(step[-1])
