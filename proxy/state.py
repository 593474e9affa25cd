"""The objects that are known, and what changed among them since the last sync.

A `State` is the `Sink` of the sources and lives on the event loop's thread.  It compares every report with what it
holds, so that a report of what is known already costs a comparison and nothing more (SVC-14, EPS-4), and remembers of
what changed the value from before.  `take_changes` says which Services must be computed again; what was changed and
changed back in between is none.  Nothing here walks all Services for one change.

It reads no clock and writes no log: the time comes with the calls that need one, and whoever wants to hear of changes
and troubles sets `on_change` and `on_trouble`, and `on_event` to hear of every report.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar, cast

import msgspec

from proxy.objects import (
    HEADLESS_LABEL,
    TRIGGER_TIME_ANNOTATION,
    EndpointSlice,
    Key,
    Node,
    Object,
    Service,
    ServiceCIDR,
)
from proxy.sources.base import Resource
from rules.forwarding import Family

SECOND_LOOK = 5.0
"""Seconds after which a list in doubt is worth reading again."""

_VANISHED_AT_LEAST = 100


def suspicious(known: int, vanished: int) -> bool:
    """Whether so many of the known objects are missing in a list that it is read twice (DESIGN 4.4)."""
    return vanished >= _VANISHED_AT_LEAST and 2 * vanished > known


class Trigger(NamedTuple):
    """When what a slice tells happened in the cluster, as its controller noted it (EPS-13); for MET-5."""

    service: Key
    family: Family
    time: float
    """Seconds since the epoch."""


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What a sync has to look at."""

    services: frozenset[Key] = frozenset()
    """Services to compute again: they, or slices of theirs, are new, other or gone."""
    node: bool = False
    service_cidrs: bool = False
    triggers: tuple[Trigger, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.services or self.node or self.service_cidrs)


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """How much is known and how much was heard."""

    services: int
    slices: int
    service_changes_total: int
    """Reports about Services (MET-9)."""
    service_changes_pending: int
    endpoint_changes_total: int
    """Reports about slices of a family (MET-7)."""
    endpoint_changes_pending: int
    troubles: int


T = TypeVar("T", Service, EndpointSlice, ServiceCIDR)


class _Table(dict[Key, T]):
    """The objects of one resource, and of those that changed what they were before (None: they were not)."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[Key, T | None] = {}

    def put(self, key: Key, value: T | None) -> bool:
        """Set or, with None, delete an object; whether that changed anything."""
        old = self.get(key)
        if old == value:
            return False
        before = self.before.setdefault(key, old)
        if before == value:
            del self.before[key]
        if value is None:
            del self[key]
        else:
            self[key] = value
        return True

    def take(self) -> dict[Key, T | None]:
        taken, self.before = self.before, {}
        return taken


class State:
    """What is known of the cluster.  `started` is the time since the epoch; older triggers are not measured (EPS-13).

    Of Nodes, only the one named `node_name` is kept, and its last version stays when it is deleted (NOD-8), its
    addresses also when a later version has none.
    """

    def __init__(self, node_name: str, *, started: float = 0.0) -> None:
        self._node_name = node_name
        self._started = started
        self._services: _Table[Service] = _Table()
        self._slices: _Table[EndpointSlice] = _Table()
        self._service_cidrs: _Table[ServiceCIDR] = _Table()
        self._by_service: dict[Key, dict[Key, EndpointSlice]] = {}
        self._node: Node | None = None
        self._node_changed = False
        self._triggers: dict[Key, list[Trigger]] = {}
        self._listed: set[Resource] = set()
        self._held: dict[Resource, tuple[float, frozenset[Key]]] = {}
        self._troubles: dict[tuple[str, str], str] = {}
        self._service_reports = 0
        self._slice_reports = 0
        self.on_change: Callable[[], None] = _ignore
        """Called after each report that changed something, and after the first list of a resource anyway."""
        self.on_trouble: Callable[[str, str, str | None], None] = _ignore
        """Called with origin, subject and reason when a trouble is new, another, or (None) over."""
        self.on_event: Callable[[str, Resource, Key, bool], None] = _ignore
        """Called for each object that is reported after the first list: how, and whether that changed anything."""

    # --- what is known ---

    @property
    def synced(self) -> bool:
        """Whether Services and EndpointSlices have both been listed: before that nothing is written (SYN-1)."""
        return self.listed(Resource.SERVICES) and self.listed(Resource.SLICES)

    def listed(self, resource: Resource) -> bool:
        """Whether all objects of the resource have been told at least once."""
        return resource in self._listed

    @property
    def services(self) -> Mapping[Key, Service]:
        return self._services

    @property
    def slices(self) -> Mapping[Key, EndpointSlice]:
        return self._slices

    @property
    def node(self) -> Node | None:
        """The own Node, as it was last seen."""
        return self._node

    @property
    def service_cidrs(self) -> Mapping[Key, ServiceCIDR]:
        return self._service_cidrs

    @property
    def troubles(self) -> Mapping[tuple[str, str], str]:
        """What is wrong now, by origin and subject."""
        return self._troubles

    def slices_of(self, service: Key) -> Collection[EndpointSlice]:
        """The slices that name the Service as their owner (EPS-2), whether it is there or not."""
        return self._by_service.get(service, {}).values()

    def statistics(self) -> Statistics:
        return Statistics(
            services=len(self._services),
            slices=len(self._slices),
            service_changes_total=self._service_reports,
            service_changes_pending=len(self._services.before),
            endpoint_changes_total=self._slice_reports,
            endpoint_changes_pending=len(self._slices.before),
            troubles=len(self._troubles),
        )

    def take_changes(self) -> Changes:
        """What changed since the last call."""
        services = set(self._services.take())
        for key, before in self._slices.take().items():
            for each in (before, self._slices.get(key)):
                if each is not None and (owner := each.service) is not None:
                    services.add(owner)
        changes = Changes(
            services=frozenset(services),
            node=self._node_changed,
            service_cidrs=bool(self._service_cidrs.take()),
            triggers=tuple(trigger for triggers in self._triggers.values() for trigger in triggers),
        )
        self._node_changed = False
        self._triggers = {}
        return changes

    # --- what is told (Sink) ---

    def plausible(self, resource: Resource, keys: Collection[Key], now: float) -> bool:
        """Whether a list of all objects may be reported with `replace` (DESIGN 4.4).

        A list that lacks very many of the known objects is held back, until another one, at least `SECOND_LOOK`
        seconds later, lacks so many of the same ones that those alone would be suspicious.  `now` is monotonic.
        """
        known = frozenset(self._known(resource))
        vanished = known.difference(keys)
        held = self._held.pop(resource, None)
        if not suspicious(len(known), len(vanished)):
            return True
        if held is None:
            self._held[resource] = now, vanished
            return False
        since, first = held
        both = vanished & first
        if not suspicious(len(known), len(both)):
            self._held[resource] = now, vanished  # others are missing now: that is another doubt
            return False
        if now - since >= SECOND_LOOK:
            return True
        self._held[resource] = since, both
        return False

    def prepare(self, resource: Resource, objects: Iterable[Object]) -> None:
        """These will be among the objects of the first list; nobody looks at them before that is told."""
        if resource not in self._listed:
            for value in objects:
                self._put(resource, value.key, value)

    def replace(self, resource: Resource, objects: Iterable[Object]) -> None:
        """These are all objects of the resource."""
        first = changed = resource not in self._listed
        known = self._known(resource)
        listed = {}
        for value in objects:
            key = value.key
            listed[key] = value
            if known.get(key) is not value:
                changed |= self._put(resource, key, value) if first else self._report("listed", resource, key, value)
        for key in frozenset(known).difference(listed):
            changed |= self._report("not listed", resource, key, None)
        self._held.pop(resource, None)
        self._listed.add(resource)
        if changed:
            self.on_change()

    def set(self, resource: Resource, value: Object) -> None:
        """The object is new or changed."""
        if self._report("set", resource, value.key, value):
            self.on_change()

    def delete(self, resource: Resource, key: Key) -> None:
        """The object is gone."""
        if self._report("deleted", resource, key, None):
            self.on_change()

    def trouble(self, origin: str, subject: str, reason: str | None) -> None:
        """Something is wrong with `subject`, or (None) no longer; telling the same again changes nothing."""
        known = self._troubles.get((origin, subject))
        if known == reason:
            return
        if reason is None:
            del self._troubles[origin, subject]
        else:
            self._troubles[origin, subject] = reason
        self.on_trouble(origin, subject, reason)

    # --- each resource in its own way ---

    def _known(self, resource: Resource) -> Mapping[Key, Object]:
        match resource:
            case Resource.SERVICES:
                return self._services
            case Resource.SLICES:
                return self._slices
            case Resource.SERVICE_CIDRS:
                return self._service_cidrs
            case Resource.NODES:
                return {}

    def _report(self, how: str, resource: Resource, key: Key, value: Object | None) -> bool:
        changed = self._put(resource, key, value)
        self.on_event(how, resource, key, changed)
        return changed

    def _put(self, resource: Resource, key: Key, value: Object | None) -> bool:
        match resource:
            case Resource.SERVICES:
                self._service_reports += 1
                return self._services.put(key, cast("Service | None", value))
            case Resource.SLICES:
                return self._put_slice(key, cast("EndpointSlice | None", value))
            case Resource.SERVICE_CIDRS:
                return self._service_cidrs.put(key, cast("ServiceCIDR | None", value))
            case Resource.NODES:
                return self._put_node(cast("Node | None", value))

    def _put_node(self, value: Node | None) -> bool:
        if value is None or value.metadata.name != self._node_name:
            return False
        bare = not value.status.addresses
        if bare and self._node is not None and self._node.status.addresses:
            # A Node that was deleted and registered again has none until its cloud's controller has seen it.
            value = msgspec.structs.replace(value, status=self._node.status)
            self.trouble("state", f"Node {self._node_name}", "it has no addresses now: those that it had hold")
        elif not bare:
            self.trouble("state", f"Node {self._node_name}", None)
        if value == self._node:
            return False
        self._node = value
        self._node_changed = True
        return True

    def _put_slice(self, key: Key, value: EndpointSlice | None) -> bool:
        old = self._slices.get(key)
        family = _FAMILIES.get((value or old or _NO_SLICE).address_type)
        if family is not None:
            self._slice_reports += 1
        orphan = value is not None and value.service is None
        self.trouble(
            "state",
            f"EndpointSlice {key}",
            "no Service is named by its label kubernetes.io/service-name: it is ignored" if orphan else None,
        )
        if orphan or (value is not None and HEADLESS_LABEL in value.metadata.labels):  # EPS-1, EPS-2
            value = None
        if not self._slices.put(key, value):
            return False
        if old is not None:
            self._forget_slice(key, old)
        if value is not None and (owner := value.service) is not None:
            self._by_service.setdefault(owner, {})[key] = value
            time = _trigger_time(value)
            if family is not None and time is not None and time > self._started:
                self._triggers.setdefault(owner, []).append(Trigger(owner, family, time))
        elif old is not None and old.service is not None:
            self._triggers.pop(old.service, None)  # EPS-13: what a removal left cannot be told apart
        return True

    def _forget_slice(self, key: Key, old: EndpointSlice) -> None:
        owner = old.service
        if owner is not None:
            slices = self._by_service[owner]
            del slices[key]
            if not slices:
                del self._by_service[owner]


_FAMILIES = {family.label: family for family in Family}
_NO_SLICE = EndpointSlice()


def _trigger_time(value: EndpointSlice) -> float | None:
    text = value.metadata.annotations.get(TRIGGER_TIME_ANNOTATION, "")
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.timestamp() if moment.tzinfo is not None else None


def _ignore(*_: object) -> None:
    """Nobody listens."""
