"""What is measured, of one checkout and one cluster at a time.

A change is timed from the moment before its bytes are sent to the agent until the kernel says that a transaction was
applied, and once more to the moment when the agent hands the transaction over: what lies before is the agent's part,
what lies behind the kernel's.  After the changes the kernel's table is compared with what it must hold: a fast agent
that is wrong has no time.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench import kernel
from bench.agent import HEALTH, SMALLEST, Agent, Source
from bench.cluster import PORT, TARGET_PORT, Cluster, spare_pod
from bench.server import SERVICES, SLICES, Server, event
from rules.forwarding import Backend, parse_address

T = TypeVar("T")

BURST = 1000
_PATIENCE = 120.0
_REST = 0.02
"""Seconds after a change in which the agent does what belongs to it: metrics, the log."""
_SETTLED = 0.3
"""Seconds without a transaction after which it is worth looking whether all is there."""


class Spread(NamedTuple):
    """What many samples say, in seconds."""

    median: float
    p99: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        ranked = sorted(samples)
        return cls(statistics.median(ranked), ranked[min(len(ranked) - 1, int(len(ranked) * 0.99))])


class Place(NamedTuple):
    """Where one checkout is measured."""

    checkout: Path
    directory: Path
    listener: kernel.Listener


class Start(NamedTuple):
    """A first sync, from the start of the process until the kernel holds everything."""

    seconds: float
    cpu: float
    """CPU seconds of the agent until then."""


@contextlib.contextmanager
def synced(place: Place, cluster: Cluster, agent: Agent) -> Iterator[tuple[Agent, Start]]:
    """An agent whose first sync is done."""
    place.listener.drain()
    with agent:
        end = agent.started
        deadline = agent.started + _PATIENCE
        while True:
            seen = place.listener.wait(_SETTLED)
            if seen is not None:
                end = seen
                continue
            agent.check()
            if kernel.cluster_ips() == cluster.services:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"no first sync of {cluster}:\n{agent.tail()}")
        yield agent, Start(end - agent.started, agent.cpu())


def from_server(directory: Path, url: str) -> Source:
    """A server as a source of objects."""
    path = directory / "kubeconfig"
    path.write_text(
        f"""apiVersion: v1
kind: Config
clusters: [{{name: bench, cluster: {{server: "{url}"}}}}]
users: [{{name: bench, user: {{token: secret}}}}]
contexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]
current-context: bench
"""
    )
    return Source(kubeconfig=path)


def first_sync(place: Place, cluster: Cluster, source: Source) -> Start:
    """A first sync of a node that holds nothing."""
    kernel.remove_tables()
    with synced(place, cluster, Agent(place.checkout, place.directory, source)) as (_, start):
        return start


def health_wait(place: Place, cluster: Cluster, source: Source) -> float:
    """The longest wait of a health answer during a first sync, in seconds."""
    kernel.remove_tables()
    done = threading.Event()
    waits: list[float] = []
    prober = threading.Thread(target=_probe_health, args=(done, waits))
    prober.start()
    try:
        with synced(place, cluster, Agent(place.checkout, place.directory, source)):
            pass
    finally:
        done.set()
        prober.join()
    if not waits:
        raise RuntimeError("the agent never answered about its health")
    return max(waits)


def _probe_health(done: threading.Event, waits: list[float]) -> None:
    while not done.wait(0.002):
        start = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", HEALTH), timeout=10) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while connection.recv(4096):
                    pass
        except ConnectionError:  # it does not listen yet, or no more
            continue
        waits.append(time.monotonic() - start)


class Changes(NamedTuple):
    """Changes of one kind."""

    total: Spread
    """From the bytes of the event to the kernel's acknowledgement."""
    to_send: Spread
    """From the bytes of the event to the agent's send."""
    cpu: float
    """CPU seconds of the agent for each."""


class Connects(NamedTuple):
    """How long a TCP connection takes to be made."""

    direct: Spread
    first: Spread
    last: Spread


class Session(NamedTuple):
    """What one running agent showed."""

    changes: dict[str, Changes]
    burst: float
    """Seconds from the first of many events to the last transaction."""
    connects: Connects
    rss: int
    uss: int
    uss_at_end: int


class _Running:
    """An agent that runs, and what its kernel must hold."""

    def __init__(self, place: Place, cluster: Cluster, server: Server, agent: Agent, pause: float) -> None:
        self._listener = place.listener
        self._cluster = cluster
        self._server = server
        self._agent = agent
        self._pause = pause
        self._version = 10 * cluster.services
        self._spare = 0
        self._pods: dict[int, list[str]] = {}

    def pods(self, number: int) -> list[str]:
        return self._pods.setdefault(number, self._cluster.pods(number))

    def spread(self, count: int) -> list[int]:
        """So many Services, spread over all, each at most once."""
        count = min(count, self._cluster.services)
        return [index * self._cluster.services // count for index in range(count)]

    def slice_event(self, number: int) -> bytes:
        self._version += 1
        return event("MODIFIED", self._cluster.slice(number, self.pods(number), self._version))

    def replace(self, number: int) -> tuple[str, bytes]:
        """Another endpoint in the place of the first one."""
        self.pods(number)[0] = self._new_pod()
        return SLICES, self.slice_event(number)

    def add(self, number: int) -> tuple[str, bytes]:
        """One more endpoint."""
        self.pods(number).append(self._new_pod())
        return SLICES, self.slice_event(number)

    def remove(self, number: int) -> tuple[str, bytes]:
        """One endpoint fewer."""
        self.pods(number).pop()
        return SLICES, self.slice_event(number)

    def add_service(self, number: int) -> tuple[str, bytes]:
        """A Service whose slice is there already."""
        self._server.emit(SLICES, event("ADDED", self._cluster.slice(number)))
        time.sleep(self._pause)
        return SERVICES, event("ADDED", self._cluster.service(number))

    def remove_service(self, number: int) -> tuple[str, bytes]:
        return SERVICES, event("DELETED", self._cluster.service(number))

    def time(self, changes: Iterable[tuple[str, bytes]]) -> Changes:
        """Time changes, made one by one while the agent has nothing else to do."""
        total: list[float] = []
        to_send: list[float] = []
        cpu = 0.0
        for path, data in changes:
            self._listener.drain(self._pause)
            before, start = self._agent.cpu(), time.monotonic()
            self._server.emit(path, data)
            seen = self._listener.wait(10)
            if seen is None:
                raise TimeoutError(f"a change was not applied:\n{self._agent.tail()}")
            total.append(seen - start)
            to_send.append(self._agent.sent() - start)
            self._listener.drain(_REST)
            cpu += self._agent.cpu() - before
        return Changes(Spread.of(total), Spread.of(to_send), cpu / len(total))

    def burst(self, count: int) -> float:
        """Replace many endpoints at once; seconds until the last is replaced."""
        events = b"".join(self.replace(number)[1] for number in self.spread(count))
        self._listener.drain(2 * self._pause)
        start = time.monotonic()
        self._server.emit(SLICES, events)
        last = self._listener.drain(1 + 2 * self._pause)
        if last is None:
            raise TimeoutError("the burst was not applied")
        return last - start

    def check(self) -> None:
        """Compare the kernel with what was sent.

        Raises:
            AssertionError: it holds something else.
        """
        wanted = {
            f"default/service-{number}": frozenset(
                Backend(parse_address(pod), TARGET_PORT) for pod in self._pods[number]
            )
            if number in self._pods
            else self._cluster.backends(number)
            for number in range(self._cluster.services)
        }
        found = kernel.services()
        wrong = [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        assert not wrong, f"the kernel is wrong about {len(wrong)} Services, among them {sorted(wrong)[:3]}"

    def _new_pod(self) -> str:
        self._spare += 1
        return spare_pod(self._spare)


def session(
    place: Place,
    cluster: Cluster,
    server: Server,
    *,
    count: int,
    only: str = "",
    period: str | None = SMALLEST,
    pause: float = 0.02,
) -> Session:
    """All kinds of changes or `only` one, `count` of each; `pause` lets the agent come to rest between them."""
    kernel.remove_tables()
    source = from_server(place.directory, server.url)
    agent = Agent(place.checkout, place.directory, source, period=period, marks=True)
    with synced(place, cluster, agent):
        time.sleep(1)
        usage = agent.usage()
        running = _Running(place, cluster, server, agent, pause)
        numbers = running.spread(count)
        new = range(cluster.services, cluster.services + count)
        kinds: dict[str, tuple[Callable[[int], tuple[str, bytes]], Iterable[int]]] = {
            "endpoint replaced": (running.replace, numbers),
            "endpoint added": (running.add, numbers),
            "endpoint removed": (running.remove, numbers),
            "Service added": (running.add_service, new),
            "Service removed": (running.remove_service, new),
        }
        running.time(map(running.replace, running.spread(min(count, 5))))  # the first ones are of a cold agent
        changes = {name: running.time(map(change, on)) for name, (change, on) in kinds.items() if only in ("", name)}
        burst = running.burst(BURST)
        running.check()
        connects = _connects(cluster)
        at_end = agent.usage()
    server.forget()
    return Session(changes, burst, connects, usage.rss, usage.uss, at_end.uss)


def _connects(cluster: Cluster) -> Connects:
    """Connections to an endpoint itself, and to it through the first Service and through the last."""
    last = cluster.services - 1
    targets = [
        (cluster.pods(0)[-1], TARGET_PORT),
        (cluster.cluster_ip(0), PORT),
        (cluster.cluster_ip(last), PORT),
    ]
    return Connects(*connect_times(targets))


def connect_times(targets: Sequence[tuple[str, int]], samples: int = 300) -> list[Spread]:
    """How long connections to each of some addresses take, made in turns."""
    taken: list[list[float]] = [[] for _ in targets]
    with socket.create_server(("0.0.0.0", TARGET_PORT)) as listener:  # noqa: S104  # all endpoints, see `kernel`
        for _ in range(samples):
            for samples_of, target in zip(taken, targets, strict=True):
                with socket.socket() as client:
                    client.settimeout(5)
                    start = time.perf_counter()
                    client.connect(target)
                    samples_of.append(time.perf_counter() - start)
                    listener.accept()[0].close()
    return [*map(Spread.of, taken)]
