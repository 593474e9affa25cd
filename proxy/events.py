"""Events: what operators see of the agent in `kubectl get events`, on the Node and on Services (CFG-56, HC-21).

Recording costs a look into a dictionary and never waits: events go through a short queue to whoever can write them to
the API server, one at a time.  What the queue does not hold, what comes too often, and what the server does not take is
dropped: an event is news, not state, and the log and `sluice status` have the same.

Who reports is `kube-proxy`, as in kube-proxy, for whoever filters by that.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from proxy.logs import get_logger
from proxy.objects import Key

REPORTER = "kube-proxy"

AGAIN = 360.0
"""Seconds in which the same event is not recorded again: a port that stays taken is tried after every sync."""
BURST, EVERY = 25, 10.0
"""How many events are recorded at once, and seconds until there may be another one."""
WAITING = 50
"""Events that wait to be written."""
REMEMBERED = 1000
"""Events that are remembered so as not to be repeated."""
_LONGEST_NOTE = 1024
"""What an API server takes."""

_log = get_logger("sluice.events")


class Event(NamedTuple):
    """Something that happened to the Node (no namespace) or to a Service."""

    kind: Literal["Node", "Service"]
    key: Key
    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


def starting(node: str) -> Event:
    """The agent has begun."""
    return Event("Node", Key("", node), "Normal", "Starting", "StartKubeProxy", "")


def ipvs_deprecated(node: str) -> Event:
    """Mode ipvs is used (IPVS-2)."""
    note = "mode ipvs is deprecated in Kubernetes and will be removed there: use mode nftables"
    return Event("Node", Key("", node), "Warning", "IPVSDeprecation", "StartKubeProxy", note)


def server_not_started(node: str, server: str, note: str) -> Event:
    """The server `health` or `metrics` cannot listen, and the agent ends for it (CFG-55)."""
    reason = "FailedToStartMetricServer" if server == "metrics" else "FailedToStartProxierHealthcheck"
    return Event("Node", Key("", node), "Warning", reason, "StartKubeProxy", note)


def health_check_not_started(node: str, service: Key, port: int, why: str) -> Event:
    """A Service's health-check node port cannot be listened on (HC-21)."""
    note = f'node {node} failed to start healthcheck "{service}" on port {port}: {why}'
    return Event("Service", service, "Warning", "FailedToStartServiceHealthcheck", "Listen", note)


def manifest(event: Event, *, instance: str, nanoseconds: int) -> dict[str, object]:
    """The events.k8s.io/v1 object of an event that happened so many nanoseconds after the epoch."""
    moment = dt.datetime.fromtimestamp(nanoseconds // 1_000_000_000, tz=dt.UTC)
    # The uid is what kube-proxy says too, who has no object to take one from.
    regarding = {"kind": event.kind, "name": event.key.name, "uid": str(event.key)}
    if event.key.namespace:
        regarding["namespace"] = event.key.namespace
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{event.key.name[:220]}.{nanoseconds:x}", "namespace": _namespace(event)},
        "eventTime": f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds // 1000 % 1_000_000:06}Z",
        "reportingController": REPORTER,
        "reportingInstance": instance[:128],
        "action": event.action,
        "reason": event.reason,
        "regarding": regarding,
        "note": event.note[:_LONGEST_NOTE],
        "type": event.type,
    }


def _namespace(event: Event) -> str:
    return event.key.namespace or "default"


@runtime_checkable
class Writer(Protocol):
    """A source that events can be written to."""

    async def create(self, path: str, body: bytes) -> str | None:
        """Create an object under a path; why that could not be, in one line, or None.  It ends in a few seconds."""


class Recorder:
    """Takes events, and writes those that are due."""

    def __init__(
        self,
        node: str,
        *,
        told: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        """Of an agent on a node.

        Args:
            node: the node's name; events are kept from the start, for whenever somebody runs `run`.
            told: told what became of each event: `recorded`, `dropped` (too many, or the server did not take it) or
                `repeated`.
            clock: monotonic seconds.
            now: nanoseconds since the epoch.
        """
        self.node = node
        self._instance = f"{REPORTER}-{socket.gethostname()}"
        self._told = told
        self._clock = clock
        self._now = now
        self._queue: asyncio.Queue[tuple[Event, int]] = asyncio.Queue(WAITING)
        self._recorded: dict[Event, float] = {}
        self._left = float(BURST)
        self._since = clock()
        self._complained = False

    def record(self, event: Event) -> None:
        """Have an event written, if it is not one too many."""
        now = self._clock()
        before = self._recorded.get(event)
        if before is not None and now - before < AGAIN:
            self._told("repeated")
            return
        self._left = min(BURST, self._left + (now - self._since) / EVERY)
        self._since = now
        if self._left < 1 or self._queue.full():
            self._told("dropped")
            return
        self._left -= 1
        self._recorded.pop(event, None)
        self._recorded[event] = now
        while len(self._recorded) > REMEMBERED:
            del self._recorded[next(iter(self._recorded))]
        self._queue.put_nowait((event, self._now()))

    async def run(self, writer: Writer) -> None:
        """Write events until cancelled."""
        while True:
            event, moment = await self._queue.get()
            try:
                await self._write(writer, event, moment)
            finally:
                self._queue.task_done()

    async def _write(self, writer: Writer, event: Event, moment: int) -> None:
        path = f"/apis/events.k8s.io/v1/namespaces/{_namespace(event)}/events"
        body = msgspec.json.encode(manifest(event, instance=self._instance, nanoseconds=moment))
        trouble = await writer.create(path, body)
        self._told("recorded" if trouble is None else "dropped")
        if trouble is None:
            self._complained = False
        elif not self._complained:
            self._complained = True
            # The source warns of a server that cannot be reached; that an event is lost is no more than worth knowing.
            _log.info("events are not recorded", about=f"{event.kind} {event.key}", reason=trouble)

    async def settled(self, seconds: float) -> None:
        """Wait until everything is written or dropped, but no longer than so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._queue.join()
        except TimeoutError:
            return
