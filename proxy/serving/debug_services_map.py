"""All Services as the page lists them, kept up to date by what changed.

A row is a piece of JSON of some hundred bytes, made once and kept until its Service is another: the page gets all rows
in one answer that is put together by joining, and later only those that changed.  Objects and routes are frozen, so
that "the same" is told by identity: an update of a node with 10,000 Services of which one changed takes some
milliseconds, and none of it is spent while nobody looks at the page.

What a row says (names are short, as there are ten thousand of them):

    s   namespace/name                      r, n   endpoints that are ready, and all of them
    t   its type, or headless               f      frontends: [port, kind, frontend, backends, local backends or -1]
    h   its health, a word of `Health`      b      backends, each once
    w   why its health is not `ok`
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from proxy.counters import NOTHING, Row, Traffic
from proxy.desired import Desired
from proxy.objects import EndpointSlice, Key, Service
from proxy.state import State
from rules.forwarding import Backend, Family, Frontend, Kind, Route

_SERVICE = "Service "
"""How the subjects of troubles begin that are about Services."""
_AT_ONCE = 100
"""Rows that are made in one go: some 5 ms."""
MOST_GONE = 10_000
"""Services that are remembered as gone; a page that has missed more loads everything again."""


class Health(enum.Enum):
    """How a Service is, as far as this node is concerned."""

    OK = "ok"
    NOTE = "note"
    """It works as it is meant to, and some clients are refused."""
    WARN = "warn"
    """Some of it does not work, or not all of its endpoints do."""
    BAD = "bad"
    """Nobody can connect, or something is wrong with its objects."""
    NONE = "none"
    """It has no frontends."""


class Since(NamedTuple):
    """What is other than it was at some revision."""

    rows: list[bytes]
    gone: list[str]
    traffic: list[tuple[str, Traffic]]


class ServiceMap:
    """The rows of all Services; on the event loop's thread."""

    def __init__(self, state: State, desired: Desired, families: Iterable[Family]) -> None:
        self._state = state
        self._desired = desired
        self._routes: dict[Family, dict[Frontend, Route]] = {family: {} for family in families}
        self._services: dict[Key, Service] = {}
        self._slices: dict[Key, EndpointSlice] = {}
        self._troubles: dict[str, list[str]] = {}
        """What is wrong with Services, by their names."""
        self._frontends: dict[str, set[tuple[Family, Frontend]]] = {}
        """Of each Service, those that it has."""
        self._rows: dict[str, bytes] = {}
        self._changed: dict[str, int] = {}
        """At which revision a row became what it is."""
        self._gone: dict[str, int] = {}
        self._forgotten = 0
        """The last revision at which a Service went that is no longer remembered."""
        self._traffic: dict[str, Traffic] = {}
        self._moved: dict[str, int] = {}
        """At which revision its traffic became what it is."""
        self._updating = asyncio.Lock()
        self.revision = 0

    async def update(self) -> None:
        """Take over what is other than it was."""
        async with self._updating:
            dirty = self._dirty()
            if not dirty:
                return
            revision = self.revision + 1
            for count, name in enumerate(dirty, 1):
                self._remake(name, revision)
                if count % _AT_ONCE == 0:
                    await asyncio.sleep(0)
            self.revision = revision

    def count(self, rows: Iterable[Row]) -> None:
        """Take over what has passed each Service by now."""
        found: dict[str, Traffic] = {}
        for row in rows:
            name = row.service.partition(":")[0]
            found[name] = found.get(name, NOTHING) + row.traffic
        moved = {name: traffic for name, traffic in found.items() if self._traffic.get(name) != traffic}
        if moved:
            self.revision += 1
            self._moved.update(dict.fromkeys(moved, self.revision))
        for name in self._moved.keys() - found.keys():
            del self._moved[name]
        self._traffic = found

    def everything(self) -> bytes:
        """All rows as the inside of a JSON array, by name."""
        return b",".join(self._rows[name] for name in sorted(self._rows))

    def traffic(self) -> Mapping[str, Traffic]:
        """What has passed each Service that had any traffic."""
        return self._traffic

    def since(self, revision: int) -> Since | None:
        """What is other than at a revision; None: too much is to tell."""
        if revision < self._forgotten or revision > self.revision:
            return None
        return Since(
            rows=[self._rows[name] for name, changed in self._changed.items() if changed > revision],
            gone=[name for name, changed in self._gone.items() if changed > revision],
            traffic=[(name, self._traffic[name]) for name, moved in self._moved.items() if moved > revision],
        )

    # --- what changed ------------------------------------------------------------------------------------------

    def _dirty(self) -> set[str]:
        """The Services whose rows may be others, and the state of now taken for theirs."""
        dirty: set[str] = set()
        for family, before in self._routes.items():
            routes = dict(self._desired.routes(family))
            for frontend in _differing(before, routes):
                self._move(family, frontend, before.get(frontend), routes.get(frontend), dirty)
            self._routes[family] = routes
        services, slices = dict(self._state.services), dict(self._state.slices)
        dirty.update(map(str, _differing(self._services, services)))
        for key in _differing(self._slices, slices):
            dirty.update(str(each[key].service) for each in (self._slices, slices) if key in each)
        troubles: dict[str, list[str]] = {}
        for (_, subject), reason in self._state.troubles.items():
            if subject.startswith(_SERVICE):
                troubles.setdefault(subject.removeprefix(_SERVICE), []).append(reason)
        dirty.update(
            name for name in troubles.keys() | self._troubles if troubles.get(name) != self._troubles.get(name)
        )
        self._services, self._slices, self._troubles = services, slices, troubles
        return dirty

    def _move(self, family: Family, frontend: Frontend, old: Route | None, new: Route | None, dirty: set[str]) -> None:
        for route in (old, new):
            if route is not None:
                name = service_of(route)
                dirty.add(name)
                places = self._frontends.setdefault(name, set())
                (places.add if route is new else places.discard)((family, frontend))
                if not places:
                    del self._frontends[name]

    def _remake(self, name: str, revision: int) -> None:
        namespace, _, rest = name.partition("/")
        key = Key(namespace, rest)
        service = self._services.get(key)
        if service is None:
            if self._rows.pop(name, None) is not None:
                del self._changed[name]
                self._gone[name] = revision
                while len(self._gone) > MOST_GONE:
                    self._forgotten = self._gone.pop(next(iter(self._gone)))
            return
        row = msgspec.json.encode(self._row(name, key, service))
        if self._rows.get(name) != row:
            self._rows[name] = row
            self._changed[name] = revision
            self._gone.pop(name, None)

    # --- a row -------------------------------------------------------------------------------------------------

    def _row(self, name: str, key: Key, service: Service) -> dict[str, Any]:
        routes = [
            (frontend, route)
            for family, frontend in self._frontends.get(name, ())
            if (route := self._routes[family].get(frontend)) is not None
        ]
        routes.sort(key=_in_reading_order)
        ready, total = endpoints_of(self._state.slices_of(key))
        health, why = health_of(service, [route for _, route in routes], ready, total, self._troubles.get(name, ()))
        backends: dict[Backend, None] = {}
        for _, route in routes:
            backends.update(dict.fromkeys(route.backends))
            backends.update(dict.fromkeys(route.local_backends or ()))
        return {
            "s": name,
            "t": service.spec.type if service.spec.cluster_ip != "None" else "headless",
            "h": health.value,
            "w": why,
            "r": ready,
            "n": total,
            "f": [
                (
                    route.label.partition(":")[2],
                    route.kind.value,
                    str(frontend),
                    len(route.backends),
                    -1 if route.local_backends is None else len(route.local_backends),
                )
                for frontend, route in routes
            ],
            "b": [str(each) for each in sorted(backends)],
        }


K = TypeVar("K")


def _differing(before: Mapping[K, object], now: Mapping[K, object]) -> list[K]:
    """The keys whose values are not the very same."""
    return [
        *(key for key, each in now.items() if before.get(key) is not each),
        *(key for key in before if key not in now),
    ]


_KINDS = {kind: place for place, kind in enumerate(Kind)}


def _in_reading_order(item: tuple[Frontend, Route]) -> tuple[str, int, int, Frontend]:
    frontend, route = item
    return route.label, _KINDS[route.kind], len(frontend.address), frontend


def service_of(route: Route) -> str:
    """The Service that a route's label names, as `namespace/name`."""
    return route.label.partition(":")[0]


def endpoints_of(slices: Iterable[EndpointSlice]) -> tuple[int, int]:
    """How many endpoints are ready, and how many there are; of both families."""
    ready = total = 0
    for each in slices:
        for endpoint in each.endpoints:
            total += 1
            ready += endpoint.conditions.ready is not False
    return ready, total


def health_of(
    service: Service, routes: Iterable[Route], ready: int, total: int, troubles: Sequence[str]
) -> tuple[Health, str]:
    """How a Service is on this node, and why it is not well."""
    routes = list(routes)
    if not routes:
        return Health.NONE, "; ".join([_without_rules(service), *troubles])
    empty = sum(not route.backends for route in routes)
    nobody_local = any(route.local_backends is not None and not route.local_backends for route in routes)
    local = "policy Local, and no endpoint on this node: clients from outside are dropped here"
    by_weight = (
        (empty == len(routes), Health.BAD, "no endpoint can serve" if total else "there are no endpoints"),
        (any(troubles), Health.WARN, "; ".join(troubles)),
        (empty > 0, Health.WARN, f"{empty} of {len(routes)} frontends have no backend"),
        (ready < total, Health.WARN, f"{total - ready} of {total} endpoints are not ready"),
        (nobody_local, Health.NOTE, local),
    )
    return next(((health, why) for applies, health, why in by_weight if applies), (Health.OK, ""))


def _without_rules(service: Service) -> str:
    spec = service.spec
    if spec.type == "ExternalName":
        return "it is an ExternalName: DNS gives clients another name"
    if spec.cluster_ip in {"", "None"}:
        return "it is headless: DNS gives clients the addresses of its pods"
    return "it has no ports or addresses that can be used"
