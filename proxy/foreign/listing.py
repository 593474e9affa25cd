"""What an API server has, listed once: the objects of verbs that run beside no agent."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable

from proxy.config.settings import Settings
from proxy.foreign.wanted import CannotTellError, Objects
from proxy.objects import EndpointSlice, Key, Node, Object, Service, ServiceCIDR
from proxy.sources.apiserver import ApiServer
from proxy.sources.base import Resource
from proxy.sources.credentials import CredentialsError
from proxy.sources.manifest_objects import Loaded, Problem

PATIENCE = 30.0
"""Seconds for the API server to list everything."""


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


def listed(settings: Settings, node_name: str) -> Objects:
    """What the API server of the settings has, as kube-proxy on that node would list it.

    Raises:
        CannotTellError: it could not be asked.
    """
    return asyncio.run(_listed(settings, node_name))


async def _listed(settings: Settings, node_name: str) -> Objects:
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
