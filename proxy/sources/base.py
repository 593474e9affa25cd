"""What a source of objects tells, and to whom.

A source (the API server, a directory of manifests) runs as one coroutine for as long as the agent does and reports to
a `Sink`, on the event loop's thread.  Per resource it reports a whole list at least once (`replace`), and then lists
or single changes as they come.  A source never forgets: while it cannot read (the server is away, a file is half
written) it stays silent, and what was reported before holds.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from proxy.objects import EndpointSlice, Key, Node, Object, Service, ServiceCIDR
from proxy.report import Followed


class Resource(enum.Enum):
    """What is listed and watched; the value is the plural by which the API knows it."""

    SERVICES = "services"
    SLICES = "endpointslices"
    NODES = "nodes"
    SERVICE_CIDRS = "servicecidrs"


RESOURCE_OF: dict[type[Object], Resource] = {
    Service: Resource.SERVICES,
    EndpointSlice: Resource.SLICES,
    Node: Resource.NODES,
    ServiceCIDR: Resource.SERVICE_CIDRS,
}


AT_A_TIME = 200
"""Objects that are decoded or told before others get a turn on the event loop: a few milliseconds."""


class Sink(Protocol):
    """Who is told; `proxy.state.State` is one."""

    def prepare(self, resource: Resource, objects: Iterable[Object]) -> None:
        """These will be among the objects of the first `replace`: what is known of them by then is quickly told."""

    def replace(self, resource: Resource, objects: Iterable[Object]) -> None:
        """These are all objects of the resource: whatever else was known of it is gone."""

    def plausible(self, resource: Resource, keys: Collection[Key], now: float) -> bool:
        """Whether a list of all objects may be reported with `replace`, asked before it is (DESIGN 4.4).

        False: so much of what was known is missing in it that the list itself is in doubt.  The source then reports
        nothing, reads again after `proxy.state.SECOND_LOOK` seconds, and asks again.  `now` is monotonic time.
        """

    def set(self, resource: Resource, value: Object) -> None:
        """The object is new or changed."""

    def delete(self, resource: Resource, key: Key) -> None:
        """The object is gone."""

    def trouble(self, origin: str, subject: str, reason: str | None) -> None:
        """Something about `subject` (an object's key, a file's name) is wrong, in one line; None: no longer.

        `origin` is who says so (`manifests`, `api`, `compute`), so that each one clears only its own complaints.
        Reporting the same again changes nothing: the first report is logged, and `sluice status` shows all.
        """


class Source(Protocol):
    """Where objects come from."""

    @property
    def description(self) -> str:
        """For the log and `sluice status`: `manifests /etc/sluice/manifests`, `https://10.0.0.1:6443`."""

    def followed(self) -> Sequence[Followed]:
        """How far behind it is, for `sluice status`."""

    async def run(self, sink: Sink) -> None:
        """Report to `sink` until cancelled."""


async def prepare(sink: Sink, resource: Resource, objects: Iterable[Object]) -> None:
    """Have a sink take the objects of a first list a few at a time; `replace` with all of them comes after it."""
    waiting = list(objects)
    for start in range(0, len(waiting), AT_A_TIME):
        sink.prepare(resource, waiting[start : start + AT_A_TIME])
        await asyncio.sleep(0)
