"""`python -m bench.userspace`: the userspace proxy against HAProxy and against no proxy at all.  It needs root.

A client and a backend are in network namespaces with a node between them, joined by veth pairs.  The node forwards
("direct"), or runs one proxy.  HAProxy (of the distribution: `apt-get install haproxy`) has one thread, as a worker
has.  Programs take turns within a round and the median of the rounds is told, so that what else the machine does
concerns all of them; with fewer than four cores, sources, sinks and proxy share cores, and the CPU time of the proxy
says more than the throughput.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench import report, traffic
from bench.report import Row
from bench.traffic import Child, Exchanges
from proxy.demo import namespaces
from proxy.demo.namespaces import Namespace
from proxy.userspace.control import Applied, Apply, Connection, ControlError, WireNode
from rules.forwarding import Backend, Family, Frontend, Kind, Protocol, Route, parse_address

_CLIENT, _NODE, _BACKEND = "10.1.0.2", "10.1.0.1", "10.2.0.2"
_SINK, _ECHO, _HOLD, _UDP = 9001, 9002, 9003, 9004
_PREFIX = "sluice-bench"
_WAIT = 20.0
_IDLE = 10_000
_FILES = 2 * _IDLE + 1000
_SPARE_FILES = 300
"""What a proxy needs beside two for each connection; HAProxy refuses to start without."""
_UDP_RATE = 50_000
"""Datagrams per second that a worker must carry (issue 6)."""


class Program(NamedTuple):
    """What runs on the node."""

    name: str
    start: Callable[[Bench], list[int]] | None
    """Starts it and says which processes it is; None: the node forwards."""
    carries_udp: bool = False


class Bench:
    """The three namespaces, and the backends."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        namespaces.remove_stale(_PREFIX)
        self.client, self.node, self.backend = (self._namespace(each) for each in ("client", "node", "backend"))
        for other, net in ((self.client, "10.1.0"), (self.backend, "10.2.0")):
            near, far = f"to-{other.name.rpartition('-')[2]}", "eth0"
            _ip(f"link add {near} netns {self.node.name} type veth peer name {far} netns {other.name}")
            _ip(f"-n {self.node.name} address add {net}.1/24 dev {near}")
            _ip(f"-n {self.node.name} link set {near} up")
            _ip(f"-n {other.name} address add {net}.2/24 dev {far}")
            _ip(f"-n {other.name} link set {far} up")
            _ip(f"-n {other.name} route add default via {net}.1")
        for each in (self.client, self.node, self.backend):
            each.inside(_roomy)
        for serve in (
            functools.partial(traffic.sink, _SINK),
            functools.partial(traffic.echo, _ECHO),
            functools.partial(traffic.echo, _ECHO),
        ):
            child = Child(self.backend, serve, type(None))
            stack.callback(child.kill)
        self.await_listeners(_SINK, _ECHO, namespace=self.backend)

    def start_workers(self, count: int, loop: str) -> list[int]:
        """Start workers that serve all ports of the node."""
        pids = []
        routes = [
            (
                Frontend(parse_address(_NODE), protocol, port),
                Route(
                    kind=Kind.LOAD_BALANCER,
                    backends=frozenset({Backend(parse_address(_BACKEND), port)}),
                    label="bench/bench:port",
                ),
            )
            for protocol, port in [(Protocol.TCP, each) for each in (_SINK, _ECHO, _HOLD)] + [(Protocol.UDP, _UDP)]
        ]
        for index in range(count):
            arguments = ["--index", str(index), "--workers", str(count), "--loop", loop]
            pids.append(self.run([sys.executable, "-m", "proxy.userspace.worker", *arguments]))

            def apply(index: int = index) -> None:
                connection = _connection(index)
                answer = connection.ask(Apply(family=Family.IPV4, node=WireNode(), put=routes))
                connection.close()
                if not isinstance(answer, Applied) or answer.trouble:
                    raise RuntimeError(f"the worker has trouble: {answer}")

            self.node.inside(apply)
        return pids

    def start_haproxy(self, *, splice: bool) -> list[int]:
        """Start HAProxy with one thread."""
        ports = "".join(
            f"listen port{port}\n bind {_NODE}:{port}\n server backend {_BACKEND}:{port}\n"
            for port in (_SINK, _ECHO, _HOLD)
        )
        options = " option splice-auto\n" if splice else ""
        configuration = (
            f"global\n nbthread 1\n maxpipes 50\n maxconn {_room()}\n"
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
            f" maxconn {_room()}\n{options}{ports}"
        )
        path = self._directory / f"haproxy-{splice}.cfg"
        path.write_text(configuration)
        pid = self.run(["haproxy", "-db", "-q", "-f", str(path)])
        self.await_listeners(_SINK, _ECHO, _HOLD, namespace=self.node)
        return [pid]

    def run(self, command: list[str]) -> int:
        """Start a program on the node; its number."""
        entering = ["nsenter", f"--net={self.node.path}", *command]
        process = subprocess.Popen(entering, cwd=Path(__file__).parents[1])  # noqa: S603  # ours
        self._processes.append(process)
        return process.pid

    @contextlib.contextmanager
    def running(self, program: Program) -> Iterator[list[int]]:
        """Have a program on the node for a while; its processes."""
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            yield program.start(self) if program.start is not None else []
        finally:
            for process in self._processes:
                process.kill()
                process.wait()

    def _namespace(self, host: str) -> Namespace:
        namespace = namespaces.create(f"{_PREFIX}-{os.getpid()}-{host}")
        self._stack.callback(namespace.remove)
        return namespace

    def await_listeners(self, *ports: int, namespace: Namespace) -> None:
        """Return once there are listeners at all of these ports."""

        def listening() -> set[int]:
            lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
            return {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3] == "0A"}

        end = time.monotonic() + _WAIT
        while not set(ports) <= namespace.inside(listening):
            if time.monotonic() > end:
                raise RuntimeError("nobody listens")
            time.sleep(0.02)


class Measured(NamedTuple):
    """One figure of one program in one round."""

    what: str
    unit: str
    value: float


Figures = list[Measured]


def bulk(bench: Bench, program: Program, pids: list[int], *, streams: int, seconds: float) -> Figures:
    """Bytes through some connections at once."""
    del program
    place = (_NODE if pids else _BACKEND), _SINK
    before, begin = traffic.cpu_seconds(pids), time.monotonic()
    children = [Child(bench.client, lambda: traffic.stream(place, seconds), int) for _ in range(streams)]
    sent = sum(child.result() for child in children)
    taken, used = time.monotonic() - begin, traffic.cpu_seconds(pids) - before
    found = [Measured(f"throughput, {streams} streams", "Gbit/s", sent * 8 / taken / 1e9)]
    if pids:
        found.append(Measured(f"CPU per GB, {streams} streams", "s", used / sent * 1e9))
    return found


def connections(bench: Bench, program: Program, pids: list[int], *, seconds: float) -> Figures:
    """Connections that carry one word each: as many as go, and one after the other."""
    del program
    place = (_NODE if pids else _BACKEND), _ECHO
    before = traffic.cpu_seconds(pids)
    children = [Child(bench.client, lambda: traffic.exchange(place, seconds), Exchanges) for _ in range(3)]
    results = [child.result() for child in children]
    used = traffic.cpu_seconds(pids) - before
    alone = Child(bench.client, lambda: traffic.exchange(place, seconds), Exchanges).result()
    found = [Measured("connections/s, 3 clients", "1/s", sum(each.number / each.seconds for each in results))]
    if pids:
        found.append(Measured("CPU per connection", "us", used / sum(each.number for each in results) * 1e6))
    return [
        *found,
        Measured("connect, echo, close: median", "us", alone.median * 1e6),
        Measured("connect, echo, close: p99", "us", alone.p99 * 1e6),
    ]


def idle(bench: Bench, program: Program, pids: list[int]) -> Figures:
    """Memory of connections that do nothing."""
    del program
    if not pids:
        return []
    count = min(_IDLE, _room() * len(pids))
    holder = Child(bench.backend, lambda: traffic.hold(_HOLD), type(None))
    bench.await_listeners(_HOLD, namespace=bench.backend)
    before = traffic.private_memory(pids)
    ready, ready_write = os.pipe()
    over_read, over = os.pipe()
    child = Child(bench.client, lambda: traffic.sit((_NODE, _HOLD), count, ready_write, over_read), int)
    os.read(ready, 1)
    time.sleep(0.5)
    grown = traffic.private_memory(pids) - before
    os.write(over, b".")
    child.result()
    holder.kill()
    for descriptor in (ready, ready_write, over_read, over):
        os.close(descriptor)
    return [
        Measured("idle connections", "number", count),
        Measured("memory of 10,000 of them", "MB", grown / count * _IDLE / 1e6),
    ]


def _room() -> int:
    """How many connections one process can have: a connection takes two descriptors."""
    return min(_IDLE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - _SPARE_FILES) // 2)


def datagrams(bench: Bench, program: Program, pids: list[int], *, seconds: float) -> Figures:
    """Datagrams of 64 bytes, as many as go."""
    if pids and not program.carries_udp:
        return []
    place = (_NODE if pids else _BACKEND), _UDP
    before = traffic.cpu_seconds(pids)
    _, arrived = _send_datagrams(bench, lambda: traffic.flood(place, seconds))
    used = traffic.cpu_seconds(pids) - before
    found = [Measured("UDP, as many as go: datagrams/s", "1/s", arrived / seconds)]
    if pids:
        # What a worker would do with a core of its own.
        found.append(Measured("the same, per CPU second", "1/s", arrived / used))
    return found


def paced(bench: Bench, program: Program, pids: list[int], *, seconds: float) -> Figures:
    """Datagrams at the rate that a worker must carry, times the workers: what arrives, and what it costs each.

    Senders, workers and the sink share the machine's cores: how many datagrams two workers could carry with a core each
    shows in what one of them needs of a core at a rate that there is room for.
    """
    if not program.carries_udp or not pids:
        return []
    rate = _UDP_RATE * len(pids)
    before = [traffic.cpu_seconds([pid]) for pid in pids]
    sent, arrived = _send_datagrams(bench, lambda: traffic.pace((_NODE, _UDP), seconds, rate))
    used = [traffic.cpu_seconds([pid]) - each for pid, each in zip(pids, before, strict=True)]
    return [
        Measured("UDP, 50,000/s a worker: arrived", "1/s", arrived / seconds),
        Measured("the same, lost", "%", (1 - arrived / sent) * 100),
        Measured("the same, busiest worker's part of a core", "%", max(used) / seconds * 100),
        Measured("the same, idlest worker's part of a core", "%", min(used) / seconds * 100),
    ]


def _send_datagrams(bench: Bench, send: Callable[[], int]) -> tuple[int, int]:
    """How many datagrams were sent, and how many arrived."""
    ready, ready_write = os.pipe()
    taker = Child(bench.backend, lambda: traffic.count_datagrams(_UDP, ready_write, 0.5), int)
    os.read(ready, 1)
    os.close(ready)
    os.close(ready_write)
    sent = Child(bench.client, send, int).result()
    return sent, taker.result()


def programs(names: list[str]) -> list[Program]:
    """The programs of these names."""
    known = [
        Program("sluice", lambda bench: bench.start_workers(1, "asyncio"), carries_udp=True),
        Program("uvloop", lambda bench: bench.start_workers(1, "uvloop"), carries_udp=True),
        Program("2 workers", lambda bench: bench.start_workers(2, "asyncio"), carries_udp=True),
        Program("haproxy", lambda bench: bench.start_haproxy(splice=False)),
        Program("hap.splice", lambda bench: bench.start_haproxy(splice=True)),
        Program("direct", None, carries_udp=True),
    ]
    return [each for each in known if each.name in names]


def target(what: str, values: Mapping[str, float]) -> float | None:
    """What a figure should stay below, by what HAProxy needed beside it (issue 6)."""
    if what.startswith("CPU per GB"):
        return values.get("hap.splice")
    if what == "CPU per connection" and "haproxy" in values:
        return 2 * values["haproxy"]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.userspace", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--programs", default="sluice,uvloop,2 workers,haproxy,hap.splice,direct")
    parser.add_argument("--only", default="bulk,connections,idle,datagrams")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "userspace.json")
    options = parser.parse_args()
    chosen = programs(options.programs.split(","))
    if any("hap" in each.name for each in chosen) and not shutil.which("haproxy"):
        sys.exit("haproxy is not installed: apt-get install haproxy, or leave it out with --programs")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with contextlib.suppress(ValueError):  # it takes CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, _FILES), max(limit, _FILES)))
    measures: dict[str, list[Callable[[Bench, Program, list[int]], Figures]]] = {
        "bulk": [functools.partial(bulk, streams=each, seconds=options.seconds) for each in (1, 8)],
        "connections": [functools.partial(connections, seconds=options.seconds)],
        "idle": [idle],
        "datagrams": [functools.partial(each, seconds=options.seconds) for each in (datagrams, paced)],
    }
    figures: dict[tuple[str, str], dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        bench = Bench(stack, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX))))
        for turn in range(options.rounds):
            for kind in options.only.split(","):
                if kind == "idle" and turn:
                    continue
                for measure in measures[kind]:
                    for program in chosen:
                        with bench.running(program) as pids:
                            for what, unit, value in measure(bench, program, pids):
                                figures.setdefault((what, unit), {}).setdefault(program.name, []).append(value)
    medians = {
        (what, unit): {name: statistics.median(values) for name, values in by_program.items()}
        for (what, unit), by_program in figures.items()
    }
    rows = [Row("veth", what, unit, values, target(what, values)) for (what, unit), values in medians.items()]
    found = report.results(rows)
    report.save(found, options.out)
    print(report.table(found, programs=[each.name for each in chosen], unit=""))  # noqa: T201  # what the program is for
    return 0


def _connection(index: int) -> Connection:
    end = time.monotonic() + _WAIT
    while True:
        try:
            return Connection(index)
        except ControlError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _roomy() -> None:
    """Ports for many connections, and forwarding."""
    for command in ("link set lo up",):
        _ip(command)
    for name, value in {
        "ip_forward": "1",
        "ip_local_port_range": "10000 65000",
        "tcp_tw_reuse": "1",
        "tcp_max_syn_backlog": "8192",
    }.items():
        Path(f"/proc/sys/net/ipv4/{name}").write_text(value)
    Path("/proc/sys/net/core/somaxconn").write_text("8192")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)  # noqa: S603, S607  # ours, and wherever ip is


if __name__ == "__main__":
    raise SystemExit(main())
