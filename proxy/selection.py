"""Endpoint selection: which endpoints of a service port this node sends connections to (SEL-*).

Theory of operation
-------------------
`members` walks the slices of a Service once and says of every address and port in them what selection needs to know,
or why it is no endpoint at all.  `merge` puts the members of one service port (a port name and a protocol, EPS-6) into
one list without duplicates (EPS-10).  `select` makes of that list the two lists that paths use:

* the cluster list, for traffic policy Cluster: the ready endpoints, or those of them that topology hints reserve for
  this node or zone; when none is ready, those that terminate and still serve;
* the local list, for traffic policy Local: the same of the endpoints on this node, hints ignored (SEL-8).

Slices are taken by name, so that the same objects always give the same lists (EPS-10 leaves it open).

`verdict` says of one member why each list has it or not.  It looks at what `select` concluded, so that the reasons
that people are shown are those by which packets went.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from proxy.addresses import lenient_address
from proxy.objects import HEADLESS_LABEL, EndpointSlice, Hint
from rules.forwarding import Backend, Family


class Reason(enum.Enum):
    """Why an endpoint is used for a list, or why not; each with the clause behind it."""

    USED = "used", "SEL-3"
    NOT_READY = "it is not ready", "SEL-15"
    NOT_SERVING = "it is terminating and no longer serves", "SEL-15"
    TERMINATING = "it is terminating, and ready endpoints exist", "SEL-3"
    NOT_LOCAL = "it is not on this node", "SEL-4"
    OTHER_NODE = "its topology hints name other nodes", "SEL-6"
    OTHER_ZONE = "its topology hints name other zones", "SEL-6"
    DUPLICATE = "another entry has the same address and port", "EPS-10"
    NOT_A_SERVICE_PORT = "the Service has no port of this name and protocol", "EPS-6"
    NO_PORT_NAME = "the slice's port has no name, not even an empty one", "EPS-6"
    NO_PORT_NUMBER = "the slice's port has no number", "EPS-6"
    NO_ADDRESS = "it has no address", "EPS-7"
    BAD_ADDRESS = "its address cannot be read as one of the slice's type", "EPS-7"
    BAD_ADDRESS_TYPE = "the slice's addressType is not supported", "EPS-3"

    @property
    def text(self) -> str:
        """The reason in words."""
        return self.value[0]

    @property
    def clause(self) -> str:
        """Where the behaviour document says so."""
        return self.value[1]


class Topology(enum.Enum):
    """What hints make of the ready endpoints (SEL-6)."""

    NONE = "none"
    SAME_NODE = "PreferSameNode"
    SAME_ZONE = "PreferSameZone"


class Member(msgspec.Struct, frozen=True, gc=False):
    """An endpoint of one port of a slice."""

    backend: Backend
    node: str
    local: bool
    ready: bool
    serving: bool
    terminating: bool
    zones: tuple[Hint, ...]
    nodes: tuple[Hint, ...]
    slice: str
    """The slice's name."""

    @property
    def fallback(self) -> bool:
        """Whether it may serve when nothing is ready (SEL-3, SEL-4)."""
        return self.serving and self.terminating


class Misfit(NamedTuple):
    """An entry of a slice, or all of it, that is no endpoint."""

    slice: str
    text: str
    """What it is about, as the slice writes it: an address, a port, an address type; for people."""
    reason: Reason


PortKey = tuple[str, str]
"""A port's name and its protocol: what matches ports of a Service and of its slices (EPS-6)."""


def members(slices: Iterable[EndpointSlice], family: Family, node_name: str) -> list[tuple[PortKey, Member] | Misfit]:
    """What the slices of a Service hold for one family, in an order that depends on nothing but their content."""
    label = family.label
    found: list[tuple[PortKey, Member] | Misfit] = []
    for each in sorted(slices, key=_name):
        if HEADLESS_LABEL in each.metadata.labels:  # EPS-1; an API server would have left it out
            continue
        if each.address_type == label:
            _add_members(found, each, family, node_name)
        elif each.address_type not in _ADDRESS_TYPES:
            found.append(Misfit(each.metadata.name, each.address_type or "no addressType", Reason.BAD_ADDRESS_TYPE))
    return found


def merge(found: Iterable[Member]) -> tuple[Member, ...]:
    """The members of one service port without duplicates (EPS-10).

    A later one replaces an earlier one of the same address and port, but a terminating one never does: a new pod may
    have the address of one that is going.
    """
    kept: dict[Backend, Member] = {}
    for member in found:
        if not member.terminating or member.backend not in kept:
            kept[member.backend] = member
    return tuple(kept.values())


class Selection(NamedTuple):
    """What one service port may use, and by which rules that came out."""

    cluster: frozenset[Backend]
    """For policy Cluster."""
    local: frozenset[Backend]
    """For policy Local."""
    has_any: bool
    """Whether any endpoint anywhere could serve (SEL-3, SEL-4): what tells a drop from a refusal (SEL-11)."""
    topology: Topology
    cluster_ready: bool
    """Whether the cluster list is of ready endpoints; else it is of serving and terminating ones."""
    local_ready: bool


def select(endpoints: Sequence[Member], node_name: str, zone: str) -> Selection:
    """Both lists of a service port, from its merged endpoints, for a node in a zone ("" when it has none)."""
    ready = [member for member in endpoints if member.ready]
    topology = topology_of(ready, node_name, zone)
    usable = ready or [member for member in endpoints if member.fallback]
    hinted = usable
    if topology is not Topology.NONE:
        hinted = [member for member in usable if _hinted(member, topology, node_name, zone)]
    cluster = frozenset([member.backend for member in hinted])
    local_ready = [member.backend for member in ready if member.local]
    local = frozenset(local_ready or [member.backend for member in endpoints if member.local and member.fallback])
    return Selection(
        cluster=cluster,
        # Where every endpoint that is used is local the two lists are one object, as they often stand side by side.
        local=cluster if local == cluster else local,
        has_any=bool(usable),
        topology=topology,
        cluster_ready=bool(ready),
        local_ready=bool(local_ready),
    )


def topology_of(ready: Sequence[Member], node_name: str, zone: str) -> Topology:
    """The topology mode, from the hints of the ready endpoints alone (SEL-6)."""
    if not ready or not (ready[0].nodes or ready[0].zones):
        return Topology.NONE  # hints count where all have them: most Services have none at all
    if all(member.nodes for member in ready) and any(_named(member.nodes, node_name) for member in ready):
        return Topology.SAME_NODE
    if all(member.zones for member in ready) and any(_named(member.zones, zone) for member in ready):
        return Topology.SAME_ZONE
    return Topology.NONE


def verdict(member: Member, selection: Selection) -> tuple[Reason, Reason]:
    """Why the cluster list and the local list have a merged endpoint, or why not."""
    if member.backend in selection.cluster:
        cluster = Reason.USED
    elif (unfit := _unfit(member, ready=selection.cluster_ready)) is not None:
        cluster = unfit
    else:
        cluster = Reason.OTHER_NODE if selection.topology is Topology.SAME_NODE else Reason.OTHER_ZONE
    if member.backend in selection.local:
        return cluster, Reason.USED
    if not member.local:
        return cluster, Reason.NOT_LOCAL
    return cluster, _unfit(member, ready=selection.local_ready) or Reason.NOT_READY


def _unfit(member: Member, *, ready: bool) -> Reason | None:
    """Why a member's conditions keep it from a list that is, or isn't, of ready endpoints."""
    if member.ready:
        return None
    if not member.terminating:
        return Reason.NOT_READY
    if not member.serving:
        return Reason.NOT_SERVING
    return Reason.TERMINATING if ready else None


def _hinted(member: Member, topology: Topology, node_name: str, zone: str) -> bool:
    if topology is Topology.SAME_NODE:
        return _named(member.nodes, node_name)
    return _named(member.zones, zone)


def _named(hints: tuple[Hint, ...], name: str) -> bool:
    return any(hint.name == name for hint in hints)


_ADDRESS_TYPES = frozenset(family.label for family in Family)


def _name(each: EndpointSlice) -> str:
    return each.metadata.name


def _add_members(
    found: list[tuple[PortKey, Member] | Misfit], each: EndpointSlice, family: Family, node_name: str
) -> None:
    """Append what one slice holds.  It runs for each endpoint of a cluster: a quarter of all computing is here."""
    name = each.metadata.name
    ports: list[tuple[PortKey, int]] = []
    for index, port in enumerate(each.ports):
        if port.name is None:
            found.append(Misfit(name, f"ports[{index}]", Reason.NO_PORT_NAME))
        elif not port.port:
            found.append(Misfit(name, f"ports[{index}]", Reason.NO_PORT_NUMBER))
        else:
            ports.append(((port.name, port.protocol), port.port))
    size = family.address_bytes
    for index, endpoint in enumerate(each.endpoints):
        if not endpoint.addresses:
            found.append(Misfit(name, f"endpoints[{index}]", Reason.NO_ADDRESS))
            continue
        text = endpoint.addresses[0]
        try:
            address = lenient_address(text)
        except ValueError:
            address = b""
        if len(address) != size:
            found.append(Misfit(name, repr(text), Reason.BAD_ADDRESS))
            continue
        conditions, hints, node = endpoint.conditions, endpoint.hints, endpoint.node_name
        local = node != "" and node == node_name
        ready, serving = conditions.ready is not False, conditions.serving is not False
        terminating = conditions.terminating is True
        for key, number in ports:
            # By position, in the order of the fields: names cost as much as the rest.
            backend = Backend(address, number)
            member = Member(backend, node, local, ready, serving, terminating, hints.for_zones, hints.for_nodes, name)
            found.append((key, member))
