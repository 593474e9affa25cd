"""The ipsets of one family: what packets are looked up in, and what they carry.

Names are up to 31 characters, and of both families together; those of IPv6 begin with SLUICE6.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator

from rules.forwarding import Address, Family, Kind, Prefix, merge_prefixes
from rules.netlink.ipset import Element, SetSpec, SetType


class Set(enum.Enum):
    """A set of ours, by what ends its name."""

    CLUSTER_IP = "CLUSTER-IP"
    """Frontends of one kind: their labels."""
    EXTERNAL_IP = "EXTERNAL-IP"
    LOAD_BALANCER = "LOAD-BALANCER"
    EMPTY = "EMPTY"
    """Those of them that have no backends at all: a node port of the same number goes before them."""
    REFUSED = "REFUSED"
    """Those whose clients are met with silence, where the list for them is empty."""
    LOCAL = "LOCAL"
    """Those under policy Local: the mark for local pods and the node."""
    RANGED = "RANGED"
    """Those with source ranges."""
    SOURCES = "SOURCES"
    """And these ranges."""
    OPEN = "OPEN"
    """Frontends that have a virtual server: other ports of their addresses are closed."""
    BOUND = "BOUND"
    """The addresses on our device."""
    NODE_PORT = "NODE-PORT"
    """Node ports: the mark for everybody, or under policy Local for those outside; and their labels."""
    NODE_PORT_LOCAL = "NODE-PORT-LOCAL"
    """Those under policy Local: the mark for local pods and the node."""
    NODE_ADDRESS = "NODE-ADDRESS"
    """The addresses that answer node ports, where not all do."""
    HAIRPIN = "HAIRPIN"
    """Endpoints that are masqueraded when they reach themselves."""
    SERVICE_CIDR = "SERVICE-CIDR"
    HEALTH_CHECK = "HEALTH-CHECK"
    """TCP ports of the node where load balancers ask about Services."""


KINDS = {Kind.CLUSTER_IP: Set.CLUSTER_IP, Kind.EXTERNAL_IP: Set.EXTERNAL_IP, Kind.LOAD_BALANCER: Set.LOAD_BALANCER}

_TYPES = {
    Set.SOURCES: SetType.IP_PORT_NET,
    Set.BOUND: SetType.IP,
    Set.NODE_PORT: SetType.NET_PORT,
    Set.NODE_PORT_LOCAL: SetType.NET_PORT,
    Set.NODE_ADDRESS: SetType.IP,
    Set.HAIRPIN: SetType.IP_PORT_IP,
    Set.SERVICE_CIDR: SetType.NET,
    Set.HEALTH_CHECK: SetType.PORT,
}
_LABELLED = frozenset({*KINDS.values(), Set.NODE_PORT})
_MARKED = frozenset({Set.LOCAL, Set.NODE_PORT, Set.NODE_PORT_LOCAL})
_PREFIXES = {Family.IPV4: "SLUICE-", Family.IPV6: "SLUICE6-"}


def name(family: Family, which: Set) -> str:
    """What a set is called."""
    return _PREFIXES[family] + which.value


def spec(family: Family, which: Set) -> SetSpec:
    """What a set is made as."""
    kind = _TYPES.get(which, SetType.IP_PORT)
    return SetSpec(
        name(family, which),
        kind,
        None if kind is SetType.PORT else family,
        comments=which in _LABELLED,
        marks=which in _MARKED,
    )


def is_ours(family: Family, name: str) -> bool:
    """Whether a set's name is one of ours, of this version or another."""
    return name.startswith(_PREFIXES[family])


def storable(prefix: Prefix) -> tuple[Prefix, ...]:
    """Prefixes that cover what one does: a set has no room for a length of 0, but for both halves of it."""
    if prefix.length:
        return (prefix,)
    size = len(prefix.address)
    return Prefix(bytes(size), 1), Prefix(b"\x80" + bytes(size - 1), 1)


def everywhere(family: Family) -> tuple[Prefix, ...]:
    """All addresses of a family, as a set can hold them."""
    return storable(Prefix(bytes(family.address_bytes), 0))


def networks(prefixes: Iterable[Prefix]) -> Iterator[Element]:
    """The elements that hold networks."""
    for each in prefixes:
        for part in storable(each):
            yield Element(part.address, length=part.length)


def merged(parts: Iterable[tuple[Address, int]]) -> tuple[Prefix, ...]:
    """The networks that elements come to: the inverse of `storable`, of all together."""
    return merge_prefixes(Prefix(*each) for each in parts)
