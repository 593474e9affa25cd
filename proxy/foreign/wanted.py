"""What another proxy's rules should come to, by the objects: of manifests, or of the API server, listed once."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from proxy.config.settings import Settings
from proxy.node import Interfaces, normal_node_name
from proxy.objects import EndpointSlice, Key, Node, Object, Service, ServiceCIDR
from proxy.sources.base import Resource
from rules.forwarding import Family, ForwardingTable

if TYPE_CHECKING:
    from proxy.sources.manifest_objects import Loaded

PATIENCE = 30.0
"""Seconds for the API server to list everything."""


class CannotTellError(Exception):
    """Nobody says what is wanted; the message says why and what to do."""


class Objects(NamedTuple):
    """The objects that say what is wanted."""

    loaded: Loaded
    by: str
    """Whose they are, for people."""


def of_given(manifests: str, settings: Settings) -> Objects | None:
    """The objects of what a verb was given: manifests, else an API server; None: neither.

    Args:
        manifests: a file or a directory; empty: none were given.
        settings: where the API server is (`kubeconfig`, `master`), and which node this is.

    Raises:
        CannotTellError: they cannot be had.
        ValueError: the node's name is empty (NOD-1).
    """
    if manifests:
        return of_manifests(manifests)
    if settings.kubeconfig or settings.master:
        return of_api_server(settings, normal_node_name(settings.hostname_override, socket.gethostname()))
    return None


def of_manifests(name: str) -> Objects:
    """The objects in a file or a directory; `-` is standard input.

    Raises:
        CannotTellError: they cannot be read or used.
    """
    from proxy.sources.manifest_objects import FileError  # noqa: PLC0415  # YAML, which the API server does without
    from proxy.sources.manifests import Unreadable, load, loads  # noqa: PLC0415  # likewise

    try:
        loaded = loads("standard input", sys.stdin.buffer.read()) if name == "-" else load(name)
    except (Unreadable, FileError) as error:
        raise CannotTellError(str(error)) from None
    if loaded.problems and not (loaded.services or loaded.slices or loaded.nodes):
        raise CannotTellError(f"nothing in {name} can be used")
    return Objects(loaded, name)


def of_api_server(settings: Settings, node_name: str) -> Objects:
    """What the API server of the settings has, as kube-proxy on that node would list it.

    Raises:
        CannotTellError: it could not be asked.
    """
    return asyncio.run(_listed(settings, node_name))


def tables(
    objects: Objects, settings: Settings, hostname: str, mode: str, interfaces: Interfaces | None
) -> tuple[dict[Family, ForwardingTable], tuple[str, ...]]:
    """What the objects come to where a proxy runs in some mode, and what is wrong with them.

    `interfaces` are the node's own; None: it has the addresses that its Node object says.

    Raises:
        ValueError: the node's name is empty (NOD-1).
    """
    from proxy.render import render  # noqa: PLC0415  # next to its one use: YAML

    rendered = render(objects.loaded, in_mode(settings, mode), hostname, interfaces=interfaces)
    return {table.family: table for table in rendered.tables}, rendered.problems


def in_mode(settings: Settings, mode: str) -> Settings:
    """The settings of a proxy that runs in another mode."""
    return msgspec.structs.replace(settings, mode=mode)


# --- the API server --------------------------------------------------------------------------------------------


class _Collected:
    """A sink that takes every list once."""

    def __init__(self) -> None:
        self.objects: dict[Resource, dict[Key, Object]] = {}
        self.problems: dict[str, str] = {}
        self.complete = asyncio.Event()

    def prepare(self, resource: Resource, objects: Iterable[Object]) -> None:
        """Nothing: the list that comes is taken as a whole."""

    def replace(self, resource: Resource, objects: Iterable[Object]) -> None:
        self.objects[resource] = {each.key: each for each in objects}
        if len(self.objects) == len(Resource):
            self.complete.set()

    def plausible(self, resource: Resource, keys: Collection[Key], now: float) -> bool:  # noqa: ARG002  # nothing is known yet
        return True

    def set(self, resource: Resource, value: Object) -> None:
        self.objects[resource][value.key] = value

    def delete(self, resource: Resource, key: Key) -> None:
        self.objects[resource].pop(key, None)

    def trouble(self, origin: str, subject: str, reason: str | None) -> None:  # noqa: ARG002  # there is one origin
        if reason is None:
            self.problems.pop(subject, None)
        else:
            self.problems[subject] = reason


async def _listed(settings: Settings, node_name: str) -> Objects:
    # aiohttp and the rest of a client, which answers from manifests do without.
    from proxy.sources.apiserver import ApiServer  # noqa: PLC0415
    from proxy.sources.credentials import CredentialsError  # noqa: PLC0415
    from proxy.sources.manifest_objects import Loaded, Problem  # noqa: PLC0415

    try:
        server = await ApiServer.open(settings.kubeconfig, settings.master, node_name)
    except CredentialsError as error:
        raise CannotTellError(str(error)) from None
    sink = _Collected()
    running = asyncio.create_task(server.run(sink))
    try:
        async with asyncio.timeout(PATIENCE):
            await sink.complete.wait()
    except TimeoutError:
        errors = [each.error for each in server.followed() if each.error]
        why = f": {errors[0]}" if errors else ""
        raise CannotTellError(f"{server.description} has not listed everything within {PATIENCE:.0f} s{why}") from None
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    def of(resource: Resource) -> Collection[Object]:
        return [value for _, value in sorted(sink.objects[resource].items())]

    loaded = Loaded(
        services=tuple(each for each in of(Resource.SERVICES) if isinstance(each, Service)),
        slices=tuple(each for each in of(Resource.SLICES) if isinstance(each, EndpointSlice)),
        nodes=tuple(each for each in of(Resource.NODES) if isinstance(each, Node)),
        service_cidrs=tuple(each for each in of(Resource.SERVICE_CIDRS) if isinstance(each, ServiceCIDR)),
        problems=tuple(Problem(subject, reason) for subject, reason in sink.problems.items()),
    )
    return Objects(loaded, server.description)
