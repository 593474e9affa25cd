"""Running the API source against the stand-in server, with time that passes quickly and a sink that remembers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import NamedTuple

from proxy.objects import Key, Object
from proxy.sources.apiserver import ApiServer
from proxy.sources.base import Resource
from proxy.sources.credentials import Credentials, Keyring
from proxy.sources.progress import Settings, Timing
from tests.fakes.apistore import Object as Plain


class RecordingSink:
    """A Sink that holds what it is told, and in `calls` how."""

    def __init__(self) -> None:
        self.objects: dict[Resource, dict[Key, Object]] = {}
        self.calls: Counter[tuple[str, Resource]] = Counter()
        self.troubles: dict[tuple[str, str], str] = {}
        self.doubts: list[bool] = []
        """Answers that `plausible` gives, first to last; True when there are none left."""

    def plausible(self, resource: Resource, keys: Collection[Key], now: float) -> bool:
        return not (resource is Resource.SERVICES and self.doubts and self.doubts.pop(0))

    def prepare(self, resource: Resource, objects: Iterable[Object]) -> None:
        assert resource not in self.objects, "only a first list is prepared"

    def replace(self, resource: Resource, objects: Iterable[Object]) -> None:
        self.calls["replace", resource] += 1
        self.objects[resource] = {value.key: value for value in objects}

    def set(self, resource: Resource, value: Object) -> None:
        self.calls["set", resource] += 1
        self.objects[resource][value.key] = value

    def delete(self, resource: Resource, key: Key) -> None:
        self.calls["delete", resource] += 1
        self.objects[resource].pop(key, None)

    def trouble(self, origin: str, subject: str, reason: str | None) -> None:
        if reason is None:
            self.troubles.pop((origin, subject), None)
        else:
            self.troubles[origin, subject] = reason

    def names(self, resource: Resource = Resource.SERVICES) -> frozenset[str]:
        return frozenset(key.name for key in self.objects.get(resource, {}))


class Following(NamedTuple):
    source: ApiServer
    sink: RecordingSink
    naps: list[float]
    """The pauses that were asked for; each took a millisecond."""


def service(name: str, address: str = "10.96.0.1", **metadata: object) -> Plain:
    return {
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", **metadata},
        "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"port": 80}]},
    }


@contextlib.asynccontextmanager
async def following(
    url: str,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    keyring: Keyring | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Following]:
    """The source, running, for a node `node1`; chance always says the middle."""
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)
        await asyncio.sleep(0.001)

    async def same() -> Credentials:
        return Credentials(server=url)

    source = ApiServer(
        keyring or Keyring(Credentials(server=url), same),
        "node1",
        settings=settings,
        timing=Timing(clock=clock, sleep=nap, random=lambda: 0.5),
    )
    sink = RecordingSink()
    task = asyncio.ensure_future(source.run(sink))
    try:
        yield Following(source, sink, naps)
    finally:
        assert not task.done() or task.result() is None, "a source ends only when it is cancelled"
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
