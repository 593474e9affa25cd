"""Objects by way of an API server: the stand-in of tests/fakes, over TLS, inside node1's network namespace.

It stands beside `ManifestFeed`.  What an API server cannot do is to change several resources at once: Services and
slices come in the order of the list, the marker last, so that whoever has seen the marker has seen them; a Node or a
ServiceCIDR may come a moment later.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from proxy.demo.world import World
from tests.fakes.apiserver import FakeApiServer
from tests.fakes.apistore import RESOURCES, path_of, resource_of
from tests.fakes.certificates import Authority
from tests.fakes.older_versions import OLDER
from tests.scenarios.schema import Manifest

_TOKEN = "the-token-of-node1"
_USER = "system:serviceaccount:kube-system:kube-proxy"
_PATIENCE = 30.0

T = TypeVar("T")


class ApiFeed:
    """An API server with the objects in it; a context manager.

    `older`: versions of 1.20 are served too.
    """

    def __init__(self, world: World, directory: Path, *, older: bool = False) -> None:
        authority = Authority(directory)
        self.arguments: list[str] = []
        kubeconfig = directory / "kubeconfig"
        self.config: dict[str, Any] = {"clientConnection": {"kubeconfig": str(kubeconfig)}}
        self._kubeconfig = kubeconfig
        self._authority = authority.pair.certificate
        # The hour of a watch and the minute of a bookmark are not waited for.
        self.server = FakeApiServer(
            tokens={_TOKEN: _USER},
            tls=authority.serving(authority.server("IP:127.0.0.1")),
            bookmark_every=1.0,
            older=OLDER if older else {},
        )
        self._loop = asyncio.new_event_loop()
        # Listening sockets belong to the namespace of the thread that the loop runs in.
        self._thread = threading.Thread(
            target=lambda: world.namespaces["node1"].inside(self._loop.run_forever), name="API server", daemon=True
        )
        self._published: dict[str, Manifest] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.__aenter__(), self._loop).result(_PATIENCE)
        self._kubeconfig.write_bytes(msgspec.json.encode(self._kubeconfig_of(self.server.url)))
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.server.__aexit__(), self._loop).result(_PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop.close()

    def publish(self, objects: Iterable[Manifest]) -> None:
        """These are all objects: what differs is written, an object at a time, as clients of an API server do."""
        wanted = {
            resource_of(each).plural + path_of(_placed(each)): each
            for each in objects
            if any(resource.kind == each["kind"] for resource in RESOURCES.values())
        }

        def write() -> None:
            for key, value in wanted.items():
                if self._published.get(key) != value:
                    self.server.set(value)
            for key, value in self._published.items():
                if key not in wanted:
                    metadata = _placed(value)["metadata"]
                    self.server.delete(resource_of(value).plural, metadata["name"], metadata.get("namespace", ""))

        self.call(write)
        self._published = wanted

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns when the server's loop calls it."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(_PATIENCE)

    def go_away(self) -> None:
        """Stop listening, and break every connection."""
        asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(_PATIENCE)

    def come_back(self) -> None:
        """Listen again, at the same address."""
        asyncio.run_coroutine_threadsafe(self.server.start(), self._loop).result(_PATIENCE)

    def _kubeconfig_of(self, url: str) -> Manifest:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": str(self._authority)}}],
            "users": [{"name": "u", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }


def _placed(value: Manifest) -> Manifest:
    """The object with the namespace that the server gives it."""
    metadata = dict(value["metadata"])
    if resource_of(value).namespaced:
        metadata.setdefault("namespace", "default")
    return {**value, "metadata": metadata}
