"""What the agent answers on its socket, from its parts as they are now.

Everything runs on the event loop, as the parts live there: what grows with the number of Services is walked and encoded
a piece at a time, with others' turns in between.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any, TypeVar

import msgspec

from proxy.agent_socket import TableHead, TablePart, network_namespace
from proxy.config.settings import Settings
from proxy.counting import Counters, Off
from proxy.desired import Desired
from proxy.objects import Key
from proxy.report import Contested, EndpointReport, FamilyReport, SourceReport, Status, Trouble, Unselected, Unserved
from proxy.service_spec import wants_rules
from proxy.serving.agent_server import Answer, RefusedError
from proxy.serving.health import ProxyHealth
from proxy.sources.base import Source
from proxy.state import State
from proxy.sync import FamilySync
from rules.dataplane import limits
from rules.forwarding import Family

ROUTES, OBJECTS, LOOKS = 500, 100, 5000
"""In one go, of some milliseconds each: routes to encode, objects to encode, Services to look at."""
MOST_UNSELECTED = 1000
"""Services without slices that are told."""

T = TypeVar("T")


class Answers:
    """The verbs of the agent's socket (see `proxy.agent_socket`)."""

    def __init__(
        self,
        *,
        settings: Settings,
        node_name: str,
        source: Source,
        state: State,
        desired: Desired,
        syncs: Sequence[FamilySync],
        health: ProxyHealth,
        unserved: Sequence[Unserved] = (),
        counters: Counters | None = None,
    ) -> None:
        self._counters = counters or Off()
        self._settings = settings
        self._unserved = tuple(unserved)
        self._node_name = node_name
        self._source = source
        self._state = state
        self._desired = desired
        self._syncs = {sync.family: sync for sync in syncs}
        self._health = health
        self._started = time.monotonic()
        self._namespace = network_namespace()

    def configured(self, settings: Settings) -> None:
        """The configuration is another one."""
        self._settings = settings

    def families(self) -> tuple[FamilyReport, ...]:
        """How each family is."""
        return tuple(self._family(sync) for sync in self._syncs.values())

    def answer(self, verb: str, arguments: dict[str, str]) -> Answer:
        """The answer to a request; iterating over it may raise RefusedError."""
        match verb:
            case "status" | "troubles" | "counters":
                return {"status": self._status, "troubles": self._troubles, "counters": self._count}[verb]()
            case "table":
                return self._table(_family(arguments))
            case "serving":
                return self._serving(_family(arguments))
            case "decisions":
                return self._decisions(_service(arguments))
            case "objects":
                return self._objects(_service(arguments) if arguments.get("service") else None)
            case _:
                raise RefusedError(f"there is no verb {verb[:50]!r}")

    async def _table(self, family: Family) -> AsyncGenerator[tuple[str, Any], None]:
        sync = self._syncs.get(family)
        if sync is None:
            raise RefusedError(f"{family.label} is not served on this node")
        syncs = sync.statistics()
        table = self._desired.table(family)
        for routes in _pieces(table.routes.items()):
            yield "part", TablePart(routes=routes)
            await asyncio.sleep(0)
        for hairpins in _pieces(table.hairpins):
            yield "part", TablePart(hairpins=hairpins)
            await asyncio.sleep(0)
        yield (
            "result",
            TableHead(
                family=family,
                node=table.node,
                dataplane=sync.dataplane.name,
                capabilities=sync.dataplane.capabilities,
                syncs=syncs.count,
                pending=syncs.pending,
                network_namespace=self._namespace,
            ),
        )

    async def _serving(self, family: Family) -> AsyncGenerator[tuple[str, Any], None]:
        if family not in self._syncs:
            raise RefusedError(f"{family.label} is not served on this node")
        # A copy, as frontends may come and go between two parts.
        for pairs in _pieces(tuple(self._desired.serving(family).items())):
            yield "part", pairs
            await asyncio.sleep(0)
        yield "result", None

    async def _decisions(self, service: Key) -> AsyncGenerator[tuple[str, Any], None]:
        if service not in self._state.services:
            raise RefusedError(f"there is no Service {service}")
        yield (
            "result",
            [
                EndpointReport(
                    family=family.label,
                    port=each.port,
                    endpoint=each.endpoint,
                    slice=each.slice,
                    node=each.node,
                    cluster=each.cluster and each.cluster.name,
                    local=each.local and each.local.name,
                )
                for family in self._syncs
                for each in self._desired.decisions(service, family)
            ],
        )

    async def _objects(self, service: Key | None) -> AsyncGenerator[tuple[str, Any], None]:
        for objects in _pieces(self._chosen(service), OBJECTS):
            yield "part", [_manifest(each) for each in objects]
            await asyncio.sleep(0)
        yield "result", None

    def _chosen(self, service: Key | None) -> Iterable[Any]:
        state = self._state
        if service is not None:
            found = state.services.get(service)
            return (*filter(None, [found]), *state.slices_of(service))
        node = state.node
        # A copy, as objects may come and go between two parts.
        return (
            *filter(None, [node]),
            *state.service_cidrs.values(),
            *state.services.values(),
            *state.slices.values(),
        )

    async def _troubles(self) -> AsyncGenerator[tuple[str, Any], None]:
        yield "result", self._trouble_list()

    async def _count(self) -> AsyncGenerator[tuple[str, Any], None]:
        for rows in _pieces(self._counters.rows()):
            yield "part", rows
            await asyncio.sleep(0)
        yield "result", self._counters.report()

    def _trouble_list(self) -> tuple[Trouble, ...]:
        return tuple(
            Trouble(origin=origin, subject=subject, reason=reason)
            for (origin, subject), reason in sorted(self._state.troubles.items())
        )

    async def _status(self) -> AsyncGenerator[tuple[str, Any], None]:
        state, settings = self._state, self._settings
        unselected = [each async for each in self._unselected()]
        known = state.statistics()
        yield (
            "result",
            Status(
                version=metadata.version("sluice-proxy"),
                pid=os.getpid(),
                uptime=time.monotonic() - self._started,
                network_namespace=self._namespace,
                node=self._node_name,
                mode=settings.mode,
                behaviour=settings.behaviour,
                drift_policy=settings.drift_policy,
                synced=state.synced,
                source=SourceReport(description=self._source.description, followed=tuple(self._source.followed())),
                families=self.families(),
                services=known.services,
                slices=known.slices,
                pending_changes=known.service_changes_pending + known.endpoint_changes_pending,
                troubles=tuple(each for each in self._trouble_list() if each.origin != "conflict"),
                contested=tuple(
                    Contested(frontend=str(each.frontend), winner=str(each.winner), losers=tuple(map(str, each.losers)))
                    for family in self._syncs
                    for each in self._desired.conflicts(family)
                ),
                unselected=tuple(unselected),
                unserved=self._unserved,
                notes=tuple(self._notes()),
            ),
        )

    def _family(self, sync: FamilySync) -> FamilyReport:
        return FamilyReport(
            family=sync.family.label,
            dataplane=sync.dataplane.name,
            capabilities=sync.dataplane.capabilities,
            healthy=self._health.healthy(sync.family),
            frontends=self._desired.size(sync.family),
            syncs=sync.statistics(),
        )

    async def _unselected(self) -> AsyncGenerator[Unselected, None]:
        """Services with a selector and no slices (DESIGN 4.14)."""
        state = self._state
        found = 0
        for number, (key, service) in enumerate(list(state.services.items()), 1):
            if service.spec.selector and not state.slices_of(key) and wants_rules(service):
                selector = ",".join(f"{name}={value}" for name, value in sorted(service.spec.selector.items()))
                yield Unselected(service=str(key), selector=selector)
                found += 1
                if found == MOST_UNSELECTED:
                    return
            if number % LOOKS == 0:
                await asyncio.sleep(0)

    def _notes(self) -> Iterator[str]:
        dataplanes = [sync.dataplane for sync in self._syncs.values()]
        told = {limit: each.name for each in dataplanes for limit in limits(each.capabilities)}
        yield from (f"{name}: {limit}" for limit, name in told.items())
        if self._state.synced and self._settings.behaviour == "nftables":
            unknown = [
                family.label
                for family in self._syncs
                if self._desired.size(family) and not self._desired.facts(family).service_cidrs
            ]
            if unknown:
                yield (
                    f"no service CIDRs are known ({', '.join(unknown)}): connections to addresses in them that no "
                    "Service has are not dropped; --service-cidrs or a ServiceCIDR object tells them"
                )


def _pieces(items: Iterable[T], size: int = ROUTES) -> Iterator[tuple[T, ...]]:
    rest = iter(items)
    while piece := tuple(itertools.islice(rest, size)):
        yield piece


def _manifest(value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(value)
    return {"apiVersion": value.API_VERSION, "kind": value.KIND, **plain}


def _family(arguments: dict[str, str]) -> Family:
    for family in Family:
        if arguments.get("family") == family.label:
            return family
    raise RefusedError("the argument family must be IPv4 or IPv6")


def _service(arguments: dict[str, str]) -> Key:
    namespace, slash, name = arguments.get("service", "").partition("/")
    if not (namespace and slash and name):
        raise RefusedError("the argument service must be namespace/name")
    return Key(namespace, name)
