"""The rig: a userspace worker in a network namespace of its own, without an agent, and the hosts that it serves.

Clients, backends and the worker share one namespace.  10.96.0.0/16 and fd00:10:96::/64 are routed to it as a whole
(AnyIP), so any address in them can be a frontend, a backend or a client.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy.userspace.control import Applied, Apply, Connection, ControlError, FrontendStats, StatsAnswer, WireNode
from proxy.userspace.control import Stats as AskStats
from rules.forwarding import Backend, Family, Frontend, Kind, Protocol, Refusal, Route, parse_address
from tests.netns.isolation import own_network_namespace
from tests.netns.patience import TIME_SCALE

VIP = "10.96.0.1"
VIP6 = "fd00:10:96::1"

PATIENCE = 20.0 * TIME_SCALE
SILENCE = 0.7 * TIME_SCALE
"""After so many seconds, a packet counts as dropped."""
NOTHING = FrontendStats(
    frontend=Frontend(b"", Protocol.TCP, 1),
    family=Family.IPV4,
    label="",
    open=0,
    total=0,
    bytes_in=0,
    bytes_out=0,
    failures=0,
    connect_seconds=0.0,
    connects=[],
)
_ABORT = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def anyip_namespace() -> Iterator[None]:
    """Be in a namespace where every address of the networks above is local."""
    with own_network_namespace():
        for command in (
            "link set lo up",
            "route add local 10.96.0.0/16 dev lo",
            "-6 route add local fd00:10:96::/64 dev lo",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        # Backends and clients bind addresses that the kernel has no more than a route for.
        for family in ("ipv4", "ipv6"):
            Path(f"/proc/sys/net/{family}/ip_nonlocal_bind").write_text("1")
        yield


class Worker:
    """A worker process, and a connection to it."""

    def __init__(self, index: int = 0, *options: str, files: int = 0) -> None:
        """`files` limits its descriptors."""
        command = [sys.executable, "-m", "proxy.userspace.worker", "--index", str(index), *options]
        root = Path(__file__).parents[2]
        if files:
            command = ["prlimit", f"--nofile={files}:{files}", *command]
        self.process = subprocess.Popen(command, cwd=root)
        self.index = index
        self.connection = self._connect()

    def _connect(self) -> Connection:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return Connection(self.index, timeout=PATIENCE)
            except ControlError:
                assert self.process.poll() is None, "the worker has ended"
                assert time.monotonic() < deadline, "the worker doesn't answer"
                time.sleep(0.01)

    def apply(
        self,
        routes: Mapping[Frontend, Route] | None = None,
        *,
        family: Family = Family.IPV4,
        removed: list[Frontend] | None = None,
        node: WireNode | None = None,
        reset: bool = False,
    ) -> Mapping[Frontend, str]:
        """Change the table; the trouble."""
        request = Apply(family=family, put=list((routes or {}).items()), removed=removed or [], node=node, reset=reset)
        answer = self.connection.ask(request)
        assert isinstance(answer, Applied), answer
        return dict(answer.trouble)

    def stats(self) -> StatsAnswer:
        answer = self.connection.ask(AskStats())
        assert isinstance(answer, StatsAnswer), answer
        return answer

    def carried(self) -> FrontendStats:
        """What has passed the one frontend that anything has passed; all zero before."""
        figures = self.stats().frontends
        assert len(figures) < 2, figures
        return figures[0] if figures else NOTHING

    def memory(self) -> int:
        """Its resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()


class Server:
    """A TCP backend at an address of its own: every connection is given to a function, in a thread."""

    def __init__(self, address: str, handle: Callable[[socket.socket], None], *, port: int = 8080) -> None:
        self.backend = Backend(parse_address(address), port)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.create_server((address, port), family=family, backlog=2048)
        self.served = 0
        self._handle = handle
        self._threads: list[threading.Thread] = []
        self._main = threading.Thread(target=self._serve)
        self._main.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.served += 1
            thread = threading.Thread(target=self._one, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _one(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        with connection, contextlib.suppress(OSError):
            self._handle(connection)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._main.join(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)


class Held:
    """A backend's side of connections, for a test to do with as it likes."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self.over = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        self.connections.append(connection)
        self.over.wait(10 * PATIENCE)

    def newest(self, count: int = 1) -> socket.socket:
        until(lambda: len(self.connections) >= count)
        return self.connections[count - 1]


class UdpServer:
    """A UDP backend that answers every datagram with its own address, a blank and what came."""

    def __init__(self, address: str, *, port: int = 8080) -> None:
        self.backend = Backend(parse_address(address), port)
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, port))
        self.address = address
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, client = self.socket.recvfrom(65536)
            if data == b"end":
                return
            with contextlib.suppress(OSError):  # the client may be gone
                self.socket.sendto(self.address.encode() + b" " + data, client)

    def close(self) -> None:
        deadline = time.monotonic() + PATIENCE
        with socket.socket(self.socket.family, socket.SOCK_DGRAM) as last:
            while self._thread.is_alive():
                assert time.monotonic() < deadline, "the server doesn't end"
                last.sendto(b"end", self.socket.getsockname())
                self._thread.join(0.05)  # it is lost where a flood has filled the queue
        self.socket.close()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def name_of_itself(connection: socket.socket) -> None:
    """Say the backend's address, and wait for the end."""
    connection.sendall(connection.getsockname()[0].encode())
    while connection.recv(1 << 16):
        pass


def frontend(address: str, port: int = 80, protocol: Protocol = Protocol.TCP) -> Frontend:
    """A frontend; without an address, a node port."""
    return Frontend(parse_address(address) if address else b"", protocol, port)


def route(*backends: Backend, **fields: Any) -> Route:
    """A route to backends, of a ClusterIP unless said otherwise; without any, it rejects unless said otherwise."""
    fields.setdefault("kind", Kind.CLUSTER_IP)
    fields.setdefault("label", "default/some:port")
    if not backends:
        fields.setdefault("refusal", Refusal.REJECT)
    return Route(backends=frozenset(backends), **fields)


def connect(address: str, port: int = 80, *, source: str = "", timeout: float = PATIENCE) -> socket.socket:
    """A connection to a frontend."""
    return socket.create_connection((address, port), timeout, (source, 0) if source else None)


def ask(address: str, port: int = 80, *, source: str = "") -> str:
    """What a new connection says until it ends, when the client says nothing."""
    with connect(address, port, source=source) as connection:
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection).decode()


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def reset(connection: socket.socket) -> None:
    """Close with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    connection.close()


def until(holds: Callable[[], object]) -> None:
    """Return once `holds()` is true; AssertionError if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.01)


def is_silent(address: str, port: int = 80, *, source: str) -> bool:
    """Whether a connect from a source meets silence."""
    try:
        connect(address, port, source=source, timeout=SILENCE).close()
    except TimeoutError:
        return True
    return False


Start = Callable[..., Worker]
Serve = Callable[..., Server]
