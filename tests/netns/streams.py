"""Streams of probes through every kind of frontend, of which none may fail whatever happens to the agent meanwhile.

The Services are those of `tests/scenarios/base/every-frontend.yaml`.  Where no rule is for it, a connection does not
pass for one that got through: the node answers a node port of nobody with a reset, and `upstream`, who owns every
address of nobody, refuses the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from proxy.demo.probes import Outcome, Probe
from proxy.demo.world import World
from tests.netns.patience import TIME_SCALE
from tests.netns.runner import ANSWER, backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, Manifest, manifests

INTERVAL = 0.03 * TIME_SCALE
"""Seconds between two connections of one stream; with as many streams as there are, one is made each 2 ms."""


class Stream(NamedTuple):
    """Connections from a host to a frontend, and whose answers are right."""

    about: str
    host: str
    address: str
    port: int
    answering: frozenset[str]
    protocol: str = "TCP"


BOTH, HERE = frozenset({"p1", "q1"}), frozenset({"p1"})
STREAMS = (
    Stream("ClusterIP", "p3", "10.96.6.1", 80, BOTH),
    Stream("ClusterIP from the node", "node1", "10.96.6.1", 80, BOTH),
    Stream("ClusterIP by UDP", "p3", "10.96.6.1", 53, BOTH, "UDP"),
    Stream("ClusterIP by IPv6", "p3", "fd00:10:96::601", 80, BOTH),
    Stream("node port", "c", "192.168.50.11", 30001, BOTH),
    Stream("node port by UDP", "c", "192.168.50.11", 30053, BOTH, "UDP"),
    Stream("node port by IPv6", "c", "fd00:50::11", 30001, BOTH),
    Stream("external IP", "c", "192.168.99.11", 80, BOTH),
    Stream("load balancer", "c", "203.0.113.31", 80, BOTH),
    Stream("load balancer by IPv6", "c", "2001:db8:113::31", 80, BOTH),
    Stream("policy Local, node port", "c", "192.168.50.11", 30002, HERE),
    Stream("policy Local, source ranges", "c", "203.0.113.32", 80, HERE),
    Stream("policy Local, from a pod", "p3", "203.0.113.32", 80, BOTH),
    Stream("policy Local by IPv6", "c", "2001:db8:113::32", 80, HERE),
    Stream("affinity", "p3", "10.96.6.3", 80, BOTH),
    Stream("affinity, node port", "c", "192.168.50.11", 30003, BOTH),
    Stream("hairpin", "p1", "10.96.6.4", 80, HERE),
    Stream("hairpin by IPv6", "p1", "fd00:10:96::604", 80, HERE),
)


def objects() -> list[Manifest]:
    """The cluster and the Services that the streams go through."""
    return manifests(CLUSTER) + manifests(DIRECTORY / "base" / "every-frontend.yaml")


class Streaming:
    """Streams that run, and what came of them once they ended."""

    def __init__(self) -> None:
        self.outcomes: dict[Stream, list[Outcome]] = {}

    @property
    def made(self) -> int:
        """How many connections were made."""
        return sum(map(len, self.outcomes.values()))

    def wrong(self) -> list[str]:
        """What went wrong, a line each; streams that made no connection, too."""
        found = [f"{stream.about}: no connection was made" for stream, made in self.outcomes.items() if not made]
        for stream, made in self.outcomes.items():
            found += [
                f"{stream.about}, at {outcome.began:.3f}: {outcome}"
                for outcome in made
                if outcome.kind != "answered" or outcome.host not in stream.answering
            ]
        return found


@contextlib.contextmanager
def streaming(world: World, streams: Sequence[Stream] = STREAMS, *, interval: float = INTERVAL) -> Iterator[Streaming]:
    """Streams, for as long as the block lasts; the Services must be served before.

    `interval` is the time between two connections of one, in seconds.
    """
    running = [each for each in streams if world.ipv6 or ":" not in each.address]
    found = Streaming()
    for stream in running:
        probe = Probe(
            host=stream.host, address=stream.address, port=stream.port, protocol=stream.protocol, timeout=ANSWER
        )
        world.probes.start(stream.about, probe, interval)
    try:
        yield found
    finally:
        found.outcomes = {stream: world.probes.stop(stream.about) for stream in running}


def listen(world: World) -> None:
    """Have the endpoints answer."""
    world.probes.open(backends(objects()))
