"""The API server as a source: four reflectors, and what they find told to a sink.

What is asked for is what kube-proxy asks for, with the rights that it has (CFG-57): Services and EndpointSlices with
its selectors (SVC-1, EPS-1), the own Node (NOD-2) and the ServiceCIDRs where the server has them (CID-1).

An object that cannot be read is complained about and skipped; if an earlier form of it was reported, that stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Self
from urllib.parse import urlsplit

import msgspec

from proxy.objects import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    EndpointSlice,
    Key,
    Node,
    Object,
    ObjectError,
    Service,
    ServiceCIDR,
    decode_json,
)
from proxy.report import Followed
from proxy.sources.base import AT_A_TIME, Resource, Sink, prepare
from proxy.sources.credentials import Credentials, Keyring, load, read
from proxy.sources.credentials_reading import SERVICE_ACCOUNT, Reading
from proxy.sources.failing import Failing
from proxy.sources.pace import Pace
from proxy.sources.progress import Progress, Settings, Statistics, Timing
from proxy.sources.reflector import Event, Listed, NotServed, Reflector, Target
from proxy.sources.transport import ApiError, Client, OnAnswer
from proxy.sources.wire import head

ORIGIN = "api"

CREATE_PATIENCE = 5.0
"""Seconds for the server to take an object that is created."""

KIND: Mapping[Resource, type[Object]] = MappingProxyType(
    {
        Resource.SERVICES: Service,
        Resource.SLICES: EndpointSlice,
        Resource.NODES: Node,
        Resource.SERVICE_CIDRS: ServiceCIDR,
    },
)


def targets(node_name: str) -> dict[Resource, Target]:
    """What is listed and watched for the node of that name."""
    return {
        Resource.SERVICES: Target(
            "/api/v1/services",
            {"labelSelector": f"!{PROXY_NAME_LABEL}", "fieldSelector": "spec.clusterIP!=None"},
        ),
        Resource.SLICES: Target("/apis/discovery.k8s.io/v1/endpointslices", {"labelSelector": f"!{HEADLESS_LABEL}"}),
        Resource.NODES: Target("/api/v1/nodes", {"fieldSelector": f"metadata.name={node_name}"}),
        # Servers before 1.33 have none, and then nothing is known of unallocated addresses.
        Resource.SERVICE_CIDRS: Target("/apis/networking.k8s.io/v1/servicecidrs", {}, optional=True),
    }


class ApiServer:
    """A Source: reports what an API server has, for as long as it runs."""

    def __init__(
        self,
        keyring: Keyring,
        node_name: str,
        *,
        settings: Settings = Settings(),  # noqa: B008 - frozen
        timing: Timing = Timing(),  # noqa: B008 - likewise
        user_agent: str = "sluice",
        pace: Pace | None = None,
    ) -> None:
        self._client = Client(keyring, user_agent=user_agent, pace=pace)
        self._keyring = keyring
        self._targets = targets(node_name)
        self._settings = settings
        self._timing = timing
        failing = Failing(lambda: self.description)
        self._progress = {
            resource: Progress(resource, settings, timing, on_change=self._keys_changed, failing=failing)
            for resource in self._targets
        }
        self._sink: Sink | None = None

    @classmethod
    async def open(
        cls,
        kubeconfig: str,
        master: str,
        node_name: str,
        *,
        settings: Settings = Settings(),  # noqa: B008 - frozen
        service_account: str = SERVICE_ACCOUNT,
        reading: Reading | None = None,
        pace: Pace | None = None,
    ) -> Self:
        """A source with the credentials of a kubeconfig, or of the pod when both names are empty (CFG-15).

        The server need not be there yet.  `reading` is a child that reads these credentials already; `pace` is how
        often the server may be asked.

        Raises:
            CredentialsError: there are no usable credentials; one line says why and what to do.
        """

        async def again() -> Credentials:
            return await load(kubeconfig, master, service_account=service_account)

        first = await (again() if reading is None else read(reading, kubeconfig))
        return cls(Keyring(first, again), node_name, settings=settings, pace=pace)

    @property
    def description(self) -> str:
        """The server's URL."""
        return self._keyring.server

    @property
    def host(self) -> str:
        """The server's host and port, for metrics."""
        return urlsplit(self._keyring.server).netloc

    def statistics(self) -> Mapping[Resource, Statistics]:
        """How each resource is followed."""
        return {resource: progress.statistics() for resource, progress in self._progress.items()}

    def followed(self) -> Sequence[Followed]:
        """How far behind each resource is."""
        return [
            Followed(what=resource.value, state=each.state.value, lag=each.lag, changed=each.changed, error=each.error)
            for resource, each in self.statistics().items()
        ]

    async def run(self, sink: Sink) -> None:
        """Report to `sink` until cancelled.

        While the server is away nothing is reported, and what was reported holds; `sink.replace` is called with
        complete lists only.
        """
        self._sink = sink
        async with self._client, asyncio.TaskGroup() as group:
            for resource in self._targets:
                group.create_task(self._follow(resource, sink), name=f"api {resource.value}")

    def watch_answers(self, told: OnAnswer) -> None:
        """Tell of each request its method, status and seconds; see `proxy.sources.transport.Client`."""
        self._client.on_answer = told

    async def create(self, path: str, body: bytes) -> str | None:
        """Create an object, while `run` runs; why that could not be, in one line, or None (`proxy.events.Writer`)."""
        try:
            await self._client.post(path, body, patience=CREATE_PATIENCE)
        except (ApiError, RuntimeError) as error:
            return str(error)
        return None

    async def _follow(self, resource: Resource, sink: Sink) -> None:
        reporter = Reporter(resource, sink, self._timing)
        reflector = Reflector(self._client, self._targets[resource], self._progress[resource])
        in_doubt = False
        while True:
            async with contextlib.aclosing(reflector.list_then_watch(newest=in_doubt)) as changes:
                async for change in changes:
                    match change:
                        case Listed():
                            in_doubt = not await reporter.listed(change)
                            if in_doubt:
                                break
                        case Event():
                            reporter.changed(change)
                        case NotServed():
                            reporter.not_served()
            await self._timing.sleep(self._settings.doubt)

    def _keys_changed(self) -> None:
        if self._sink is not None:
            self._sink.trouble(ORIGIN, "credentials", self._keyring.trouble)


class Reporter:
    """What a reflector of one resource finds, told to a sink object by object."""

    def __init__(self, resource: Resource, sink: Sink, timing: Timing) -> None:
        self._resource = resource
        self._kind = KIND[resource]
        self._sink = sink
        self._timing = timing
        self._reported = False
        self._known: set[Key] = set()
        self._troubled: set[Key] = set()

    async def listed(self, listed: Listed) -> bool:
        """Report a complete list; False: it is in doubt, and nothing was reported (DESIGN 4.4).

        It uses up the list's items: whoever handed it on may hold it until the next event comes.
        """
        objects, bad = await self._decoded(listed.items)
        # The sink has an older form of these.
        kept = bad.keys() & self._known
        keys = objects.keys() | kept
        if not self._sink.plausible(self._resource, keys, self._timing.clock()):
            return False
        if kept:
            # `replace` would take them away.
            for key in self._known - keys:
                self._sink.delete(self._resource, key)
            for value in objects.values():
                self._sink.set(self._resource, value)
        else:
            if not self._reported:
                await prepare(self._sink, self._resource, objects.values())
            self._sink.replace(self._resource, objects.values())
        self._known = keys
        self._reported = True
        for key in self._troubled - bad.keys():
            self._well(key)
        for key, reason in bad.items():
            self._trouble(key, reason)
        return True

    async def _decoded(self, items: list[msgspec.Raw]) -> tuple[dict[Key, Object], dict[Key, str]]:
        """The objects of a list, and what is wrong with those that are none."""
        objects: dict[Key, Object] = {}
        bad: dict[Key, str] = {}
        items.reverse()
        while items:
            if len(items) % AT_A_TIME == 0:
                await asyncio.sleep(0)
            item = items.pop()  # from the front of the list; its bytes are free from here on
            try:
                value = self._decode(item)
                objects[value.key] = value
            except ObjectError as error:
                bad[head(item).key] = str(error)
        return objects, bad

    def changed(self, event: Event) -> None:
        """Report one change; bookmarks are none."""
        if event.type == "BOOKMARK":
            return
        key = event.head.key
        if event.type == "DELETED" and key.name:
            self._known.discard(key)
            self._sink.delete(self._resource, key)
            self._well(key)
            return
        try:
            value = self._decode(event.object)
        except ObjectError as error:
            self._trouble(key, str(error))
            return
        self._known.add(key)
        self._sink.set(self._resource, value)
        self._well(key)

    def not_served(self) -> None:
        """The server has no such resource: an empty list, unless it had one before."""
        if not self._reported:
            self._reported = True
            self._sink.replace(self._resource, ())

    def _decode(self, item: msgspec.Raw) -> Object:
        value = decode_json(self._kind, item)
        if not value.metadata.name:
            raise ObjectError("metadata.name is missing")
        return value

    def _subject(self, key: Key) -> str:
        # A name out of a malformed object may hold anything, and a complaint is one line.
        name = str(key) if key.name else "without a name"
        return f"{self._resource.value} {name if name.isprintable() else ascii(name)}"

    def _trouble(self, key: Key, reason: str) -> None:
        self._troubled.add(key)
        self._sink.trouble(ORIGIN, self._subject(key), reason)

    def _well(self, key: Key) -> None:
        if key in self._troubled:
            self._troubled.discard(key)
            self._sink.trouble(ORIGIN, self._subject(key), None)
