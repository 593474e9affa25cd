"""A worker without an agent: TCP in all its states, policies, changes under load, and how it comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.userspace import filters
from proxy.userspace.control import (
    Apply,
    Connection,
    ControlError,
    Done,
    Drain,
    Failed,
    Hello,
    Stop,
    TableAnswer,
    WireNode,
    control_name,
    frame,
)
from proxy.userspace.control import Table as AskTable
from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    InputInterface,
    Kind,
    Prefix,
    Refusal,
    Route,
    SourcePrefix,
    parse_address,
    parse_prefix,
)
from tests.fakes.polling import eventually
from tests.netns.userspace import (
    PATIENCE,
    Server,
    Worker,
    anyip_namespace,
    ask,
    connect,
    echo,
    frontend,
    is_silent,
    name_of_itself,
    read_all,
    reset,
    route,
    until,
)

VIP = "10.96.0.1"
VIP6 = "fd00:10:96::1"
TRANSFER = int(os.environ.get("SLUICE_TEST_TRANSFER_BYTES", str(64 << 20)))
CONNECTIONS = 1000

Start = Callable[..., Worker]
Serve = Callable[..., Server]


@pytest.fixture
def namespace(root: None) -> Iterator[None]:
    with anyip_namespace():
        yield


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    return str(request.param)


@pytest.fixture
def start(namespace: None) -> Iterator[Start]:
    """Starts workers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(*args: object, **kwargs: object) -> Worker:
            worker = Worker(*args, **kwargs)  # type: ignore[arg-type]
            stack.callback(worker.end)
            return worker

        yield begin


@pytest.fixture
def serve(namespace: None) -> Iterator[Serve]:
    """Starts backends, which end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(address: str, handle: Callable[[socket.socket], None] = name_of_itself) -> Server:
            server = Server(address, handle)
            stack.callback(server.close)
            return server

        yield begin


class Held:
    """A backend's side of connections, for a test to do with as it likes."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self.over = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        self.connections.append(connection)
        self.over.wait(PATIENCE)

    def newest(self, count: int = 1) -> socket.socket:
        until(lambda: len(self.connections) >= count)
        return self.connections[count - 1]


@pytest.fixture
def held(serve: Serve) -> Iterator[tuple[Held, Backend]]:
    holder = Held()
    try:
        yield holder, serve("10.96.1.1", holder).backend
    finally:
        holder.over.set()


# --- bytes ---------------------------------------------------------------------------------------------------------


def chunks(seed: int, total: int) -> Iterator[bytes]:
    """Bytes that never repeat in step with any buffer, in pieces of random sizes."""
    chance = random.Random(seed)
    block = chance.randbytes((1 << 20) + 17)
    left = total
    while left:
        start = chance.randrange(1 << 19)
        piece = block[start : start + min(left, chance.choice([1, 100, 5000, 1 << 16, 1 << 19]))]
        left -= len(piece)
        yield piece


def send_all(connection: socket.socket, seed: int, total: int, *, pauses: int = 200) -> str:
    """Send so many bytes with some random pauses, then the end; their digest."""
    chance, digest, sent = random.Random(seed), hashlib.blake2b(), 0
    step = total // pauses + 1
    pause_at = step
    for piece in chunks(seed, total):
        connection.sendall(piece)
        digest.update(piece)
        sent += len(piece)
        if sent > pause_at:
            pause_at += step
            time.sleep(chance.random() * 0.01)
    connection.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def receive_all(connection: socket.socket, seed: int, total: int, *, pauses: int = 200) -> str:
    """Receive to the end with some random pauses; the digest."""
    chance, digest, received = random.Random(seed), hashlib.blake2b(), 0
    step = total // pauses + 1
    pause_at = step
    while data := connection.recv(chance.choice([1000, 1 << 14, 1 << 18])):
        digest.update(data)
        received += len(data)
        if received > pause_at:
            pause_at += step
            time.sleep(chance.random() * 0.01)
    assert received == total
    return digest.hexdigest()


def both(connection: socket.socket, sends: int, receives: int, total: int) -> tuple[str, str]:
    """Send and receive at once, each with its seed; the digests of what was sent and received."""
    sent: list[str] = []
    sender = threading.Thread(target=lambda: sent.append(send_all(connection, sends, total)))
    sender.start()
    received = receive_all(connection, receives, total)
    sender.join(PATIENCE)
    return sent[0], received


def test_bytes_cross_unchanged_in_both_directions_at_once(start: Start, serve: Serve, loop: str) -> None:
    at_backend: list[tuple[str, str]] = []
    server = serve("10.96.1.1", lambda connection: at_backend.append(both(connection, 2, 3, TRANSFER)))
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP): route(server.backend)})
    with connect(VIP) as client:
        sent, received = both(client, 4, 5, TRANSFER)
        until(lambda: at_backend)
    assert at_backend == [(received, sent)]
    figures = worker.stats().frontends[0]
    assert (figures.bytes_in, figures.bytes_out) == (TRANSFER, TRANSFER)


def test_a_single_byte_crosses_at_once_and_so_does_ipv6(start: Start, serve: Serve, loop: str) -> None:
    four, six = serve("10.96.1.1", echo), serve("fd00:10:96::2", echo)
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP): route(four.backend)})
    worker.apply({frontend(VIP6): route(six.backend)}, family=Family.IPV6)
    for address in (VIP, VIP6):
        with connect(address) as client:
            for byte in (b"a", b"b", b"c"):
                client.sendall(byte)
                assert client.recv(10) == byte


def test_who_does_not_read_stops_who_writes_and_costs_no_memory(
    start: Start, held: tuple[Held, Backend], loop: str
) -> None:
    holder, backend = held
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP): route(backend)})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(VIP)) for _ in range(30)]
        holder.newest(30)
        before = worker.memory()
        block = bytes(1 << 16)
        written = []
        for client in clients:
            client.setblocking(False)
            total, quiet_since = 0, time.monotonic()
            while time.monotonic() - quiet_since < 0.05:
                with contextlib.suppress(BlockingIOError):
                    total += client.send(block)
                    quiet_since = time.monotonic()
            written.append(total)
        # A direction holds one buffer, or a pipe in the kernel; the rest waits in the sockets of its ends.
        assert worker.memory() - before < 30 * (1 << 18) + (4 << 20)
        for client, total in zip(clients, written, strict=True):
            client.settimeout(PATIENCE)
            client.shutdown(socket.SHUT_WR)
            assert total > 0
        assert sum(len(read_all(each)) for each in holder.connections) == sum(written)


def test_what_waits_of_many_connections_is_not_mixed_up(start: Start, held: tuple[Held, Backend]) -> None:
    holder, backend = held
    # Sockets that hold little leave the rest with the worker, which is copying yet.
    for name in ("tcp_wmem", "tcp_rmem"):
        Path(f"/proc/sys/net/ipv4/{name}").write_text("4096 4096 4096")
    start().apply({frontend(VIP): route(backend)})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(VIP)) for _ in range(20)]
        senders = [
            threading.Thread(target=send_all, args=(client, seed, 40_000), kwargs={"pauses": 3})
            for seed, client in enumerate(clients)
        ]
        for each in senders:
            each.start()
        holder.newest(20)
        got = {read_all(each) for each in holder.connections[:20]}
        for each in senders:
            each.join(PATIENCE)
    assert got == {b"".join(chunks(seed, 40_000)) for seed in range(20)}


@pytest.mark.parametrize("amount", [10, 1 << 20])
@pytest.mark.parametrize("first", ["client", "backend"])
def test_an_end_that_is_done_still_hears_the_other(
    start: Start, held: tuple[Held, Backend], first: str, amount: int
) -> None:
    holder, backend = held
    start().apply({frontend(VIP): route(backend)})
    with connect(VIP) as client:
        client.sendall(b"hello")
        server = holder.newest()
        assert server.recv(10) == b"hello"
        early, late = (client, server) if first == "client" else (server, client)
        early.shutdown(socket.SHUT_WR)
        assert late.recv(10) == b""
        sender = threading.Thread(target=late.sendall, args=(bytes(amount),))
        sender.start()
        got = 0
        while got < amount:
            got += len(early.recv(1 << 16))
        sender.join(PATIENCE)
        late.shutdown(socket.SHUT_WR)
        assert early.recv(10) == b""


def _idle(_early: socket.socket, _late: socket.socket) -> None:
    pass


def _half_closed_by_it(early: socket.socket, late: socket.socket) -> None:
    early.shutdown(socket.SHUT_WR)
    assert late.recv(10) == b""


def _half_closed_by_the_other(early: socket.socket, late: socket.socket) -> None:
    late.shutdown(socket.SHUT_WR)
    assert early.recv(10) == b""


def _stuck(early: socket.socket, late: socket.socket) -> None:
    """The other one writes more than anybody takes."""
    late.setblocking(False)
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.1:
        with contextlib.suppress(BlockingIOError):
            late.send(bytes(1 << 16))
            quiet_since = time.monotonic()
    late.settimeout(PATIENCE)


def _busy(early: socket.socket, late: socket.socket) -> None:
    """Much has gone both ways, so both directions are spliced."""
    for sender, receiver in ((early, late), (late, early)):
        for _ in range(20):
            sender.sendall(bytes(10_000))
            got = 0
            while got < 10_000:
                got += len(receiver.recv(1 << 16))


@pytest.mark.parametrize("state", [_idle, _half_closed_by_it, _half_closed_by_the_other, _stuck, _busy])
@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_reset_reaches_the_other_end(
    start: Start, held: tuple[Held, Backend], who: str, state: Callable[[socket.socket, socket.socket], None], loop: str
) -> None:
    holder, backend = held
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP): route(backend)})
    with connect(VIP) as client:
        server = holder.newest()
        server.settimeout(PATIENCE)
        early, late = (client, server) if who == "client" else (server, client)
        state(early, late)
        reset(early)
        # It learns so without reading or writing: an orderly end would be no error.
        watched = select.poll()
        watched.register(late, 0)
        assert watched.poll(PATIENCE * 1000)
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.ECONNRESET, errno.EPIPE)
    until(lambda: worker.stats().tcp_connections == 0)


# --- backends that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def silent(namespace: None) -> Iterator[Backend]:
    """A backend that lets every packet of a handshake vanish."""
    with socket.create_server(("10.96.1.66", 8080)) as listener:
        program = filters.assemble(Family.IPV4, [filters.Stage()])
        assert program is not None
        filters.attach(listener, program)
        yield Backend(parse_address("10.96.1.66"), 8080)


def test_the_next_backend_serves_who_was_refused(start: Start, serve: Serve) -> None:
    good = serve("10.96.1.1").backend
    worker = start()
    worker.apply({frontend(VIP): route(good, *(Backend(parse_address(f"10.96.1.{n}"), 9) for n in range(2, 6)))})
    assert {ask(VIP) for _ in range(50)} == {"10.96.1.1"}
    assert worker.stats().frontends[0].failures > 0


def test_the_next_backend_serves_who_got_no_answer(start: Start, serve: Serve, silent: Backend) -> None:
    good = serve("10.96.1.1").backend
    worker = start(0, "--connect-timeout", "0.2")
    worker.apply({frontend(VIP): route(good, silent)})
    until(lambda: ask(VIP) == "10.96.1.1" and worker.stats().frontends[0].failures)


def test_a_client_that_no_backend_takes_is_reset(start: Start) -> None:
    worker = start()
    worker.apply({frontend(VIP): route(Backend(parse_address("10.96.1.2"), 9))})
    with pytest.raises(ConnectionResetError):
        ask(VIP)
    assert worker.stats().frontends[0].open == 0


def test_a_client_that_gives_up_takes_its_attempt_with_it(start: Start, silent: Backend) -> None:
    worker = start(0, "--connect-timeout", "60")
    worker.apply({frontend(VIP): route(silent)})
    client = connect(VIP)
    until(lambda: worker.stats().tcp_connections == 1)
    reset(client)
    until(lambda: worker.stats().tcp_connections == 0)


def test_a_client_that_waits_is_given_another_backend_when_its_own_is_removed(
    start: Start, serve: Serve, silent: Backend
) -> None:
    good = serve("10.96.1.1").backend
    worker = start(0, "--connect-timeout", "60")
    worker.apply({frontend(VIP): route(silent)})
    with connect(VIP) as client:
        until(lambda: worker.stats().tcp_connections == 1)
        worker.apply({frontend(VIP): route(good)})
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"10.96.1.1"


def test_idle_connections_end_only_if_there_is_a_limit(start: Start, held: tuple[Held, Backend]) -> None:
    _, backend = held
    worker = start(0, "--tcp-idle", "0.5")
    worker.apply({frontend(VIP): route(backend)})
    with connect(VIP) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    assert worker.stats().tcp_connections == 0


# --- changes under load ----------------------------------------------------------------------------------------------


def test_a_removed_backend_gets_no_connection_and_keeps_those_it_has(start: Start, loop: str) -> None:
    asyncio.run(_churn(start(0, "--loop", loop)))


class Backends:
    """Backends that name themselves with every line, and know which of them may get no new connection."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self.removed: set[str] = set()
        self.wrong: list[str] = []
        self.open = 0
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        for address in self.addresses:
            talk = functools.partial(self._talk, address)
            self._servers.append(await asyncio.start_server(talk, address, 8080, backlog=2048))

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        await eventually(lambda: not self.open, seconds=PATIENCE)

    def route(self, without: set[str]) -> Route:
        return route(*(Backend(parse_address(each), 8080) for each in self.addresses if each not in without))

    async def _talk(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        new = True
        while line := await reader.readline():
            if new and address in self.removed:
                self.wrong.append(address)
            new = False
            writer.write(address.encode() + b" " + line)
            await writer.drain()
        await _close(writer)
        self.open -= 1


async def _churn(worker: Worker) -> None:
    """1,000 connections are open and exchange bytes while backends come and go and clients keep coming."""
    backends = Backends([f"10.96.1.{n}" for n in range(1, 7)])
    await backends.start()
    worker.apply({frontend(VIP): backends.route(set())})
    opened = [await asyncio.open_connection(VIP, 80) for _ in range(CONNECTIONS)]
    first = [await _exchange(reader, writer, 0) for reader, writer in opened]
    assert set(first) == set(backends.addresses)

    async def keep_talking() -> None:
        for turn in range(1, 4):
            for index, (reader, writer) in enumerate(opened):
                assert await _exchange(reader, writer, turn) == first[index]

    async with asyncio.TaskGroup() as group:
        group.create_task(_come_and_go(worker, backends))
        group.create_task(keep_talking())
    assert not backends.wrong
    assert worker.stats().tcp_connections == CONNECTIONS
    for _, writer in opened:
        await _close(writer)
    await backends.close()


async def _come_and_go(worker: Worker, backends: Backends) -> None:
    for turn in range(20):
        gone = {backends.addresses[turn % 6], backends.addresses[(turn * 5 + 1) % 6]}
        backends.removed = set()
        await asyncio.to_thread(worker.apply, {frontend(VIP): backends.route(gone)})
        backends.removed = gone
        for _ in range(15):
            reader, writer = await asyncio.open_connection(VIP, 80)
            assert await _exchange(reader, writer, turn) not in gone
            await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> str:
    """Send a line; who answered it."""
    writer.write(b"%d\n" % number)
    async with asyncio.timeout(PATIENCE):
        address, echoed = (await reader.readline()).split()
    assert int(echoed) == number
    return address.decode()


def test_without_descriptors_clients_are_refused_and_later_served_again(
    start: Start, held: tuple[Held, Backend], loop: str
) -> None:
    _, backend = held
    worker = start(0, "--loop", loop, files=60)
    worker.apply({frontend(VIP): route(backend)})
    clients = []
    for _ in range(60):
        with contextlib.suppress(ConnectionResetError):  # before `connect` returned
            clients.append(connect(VIP))

    def refused() -> int:
        # Nobody sends anything: who has something to read was reset.
        return 60 - len(clients) + len(select.select(clients, [], [], 0)[0])

    until(lambda: refused() + worker.stats().tcp_connections == 60)
    assert 20 < refused() < 60
    assert worker.stats().exhausted >= refused()
    for client in clients:
        reset(client)
    until(lambda: worker.stats().tcp_connections == 0)
    again = [connect(VIP) for _ in range(10)]
    until(lambda: worker.stats().tcp_connections == 10)
    for client in again:
        client.close()


# --- policies --------------------------------------------------------------------------------------------------------


def test_source_ranges_keep_others_out_before_the_handshake(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    ranges = (parse_prefix("10.96.20.0/24"), parse_prefix("10.96.30.7/32"))
    worker.apply({frontend(VIP): route(backend, kind=Kind.LOAD_BALANCER, source_ranges=ranges)})
    assert ask(VIP, source="10.96.20.9") == ask(VIP, source="10.96.30.7") == "10.96.1.1"
    assert is_silent(VIP, source="10.96.30.8")
    worker.apply({frontend(VIP): route(backend, kind=Kind.LOAD_BALANCER)})
    assert ask(VIP, source="10.96.30.8") == "10.96.1.1"
    assert worker.stats().frontends[0].total == 3


def test_source_ranges_of_ipv6(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("fd00:10:96::2").backend
    ranges = (parse_prefix("fd00:10:96::20:0/112"),)
    worker.apply({frontend(VIP6): route(backend, kind=Kind.LOAD_BALANCER, source_ranges=ranges)}, family=Family.IPV6)
    assert ask(VIP6, source="fd00:10:96::20:1") == "fd00:10:96::2"
    assert is_silent(VIP6, source="fd00:10:96::21:1")


def test_ranges_too_many_for_a_filter_are_looked_at_after_the_handshake(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    ranges = (
        parse_prefix("10.96.20.0/24"),
        *(Prefix(bytes([172, 16 + n // 256, n % 256, 0]), 25) for n in range(1500)),
    )
    worker.apply({frontend(VIP): route(backend, kind=Kind.LOAD_BALANCER, source_ranges=ranges)})
    assert ask(VIP, source="10.96.20.9") == "10.96.1.1"
    with pytest.raises(ConnectionResetError):
        ask(VIP, source="10.96.30.8")


def _local(*local: Backend, everywhere: Backend) -> Route:
    return Route(
        kind=Kind.LOAD_BALANCER,
        backends=frozenset({everywhere, *local}),
        local_backends=frozenset(local),
        refusal=None if local else Refusal.DROP,
        label="default/local:port",
    )


NODE = WireNode(
    local_addresses=frozenset({parse_address("10.96.50.1")}), detector=SourcePrefix(parse_prefix("10.96.60.0/24"))
)


def test_policy_local_gives_outsiders_local_backends_and_pods_and_the_node_all(start: Start, serve: Serve) -> None:
    here, there = serve("10.96.1.1"), serve("10.96.1.2")
    start().apply({frontend(VIP): _local(here.backend, everywhere=there.backend)}, node=NODE)
    assert {ask(VIP, source="10.96.70.1") for _ in range(20)} == {"10.96.1.1"}
    for inside in ("10.96.60.1", "10.96.50.1", "127.0.0.1", VIP):
        assert len({ask(VIP, source=inside) for _ in range(40)}) == 2


def test_policy_local_without_local_endpoints_drops_outsiders_only(start: Start, serve: Serve) -> None:
    there = serve("10.96.1.2")
    worker = start()
    worker.apply({frontend(VIP): _local(everywhere=there.backend)}, node=NODE)
    assert is_silent(VIP, source="10.96.70.1")
    for inside in ("10.96.60.1", "10.96.50.1", "127.0.0.1", VIP):
        assert ask(VIP, source=inside) == "10.96.1.2"
    worker.apply(node=WireNode(local_addresses=frozenset({parse_address("10.96.70.1")})))
    assert ask(VIP, source="10.96.70.1") == "10.96.1.2"
    assert is_silent(VIP, source="10.96.60.1")


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("has_local", [False, True])
def test_local_pods_are_told_by_their_interface_too(
    start: Start, serve: Serve, has_local: bool, family: Family
) -> None:
    is_v4 = family is Family.IPV4
    vip, source, near, far = (
        (VIP, "10.96.70.1", "10.96.1.1", "10.96.1.2")
        if is_v4
        else (VIP6, "fd00:10:96::70:1", "fd00:10:96::1:1", "fd00:10:96::1:2")
    )
    here, there = serve(near), serve(far)
    worker = start()
    local = [here.backend] if has_local else []
    table = {frontend(vip): _local(*local, everywhere=there.backend)}
    worker.apply(table, family=family, node=WireNode(detector=InputInterface("lo")))
    assert far in {ask(vip, source=source) for _ in range(40)}
    worker.apply(family=family, node=WireNode(detector=InputInterface("eth9")))
    if has_local:
        assert {ask(vip, source=source) for _ in range(20)} == {near}
    else:
        assert is_silent(vip, source=source)


def test_without_endpoints_a_connection_is_refused_or_dropped_as_the_route_says(start: Start) -> None:
    start().apply(
        {
            frontend(VIP): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT),
            frontend(VIP, 81): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.DROP),
        }
    )
    with pytest.raises(ConnectionRefusedError):
        connect(VIP)
    assert is_silent(VIP, 81, source="10.96.70.1")


def test_node_ports_follow_the_nodes_addresses(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    nodes = [parse_address("10.96.50.1"), parse_address("10.96.50.2")]
    port = frontend("", 30080)
    worker.apply({port: route(backend, kind=Kind.NODE_PORT)}, node=WireNode(node_port_addresses=frozenset(nodes)))
    assert ask("10.96.50.1", 30080) == ask("10.96.50.2", 30080) == "10.96.1.1"
    with connect("10.96.50.2", 30080) as client:
        client.recv(100)
        worker.apply(node=WireNode(node_port_addresses=frozenset(nodes[:1])))
        with pytest.raises(ConnectionRefusedError):
            connect("10.96.50.2", 30080)
        assert ask("10.96.50.1", 30080) == "10.96.1.1"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    worker.apply(removed=[port])
    with pytest.raises(ConnectionRefusedError):
        connect("10.96.50.1", 30080)


def test_a_port_that_somebody_has_is_told_and_taken_when_it_is_free(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    with socket.create_server((VIP, 80), backlog=1):
        trouble = worker.apply({frontend(VIP): route(backend), frontend(VIP, 81): route(backend)})
        assert list(trouble) == [frontend(VIP)]
        assert "10.96.0.1:80/TCP: Address already in use" in trouble[frontend(VIP)]
        assert ask(VIP, 81) == "10.96.1.1"

    def is_served() -> bool:
        try:
            return ask(VIP) == "10.96.1.1"
        except ConnectionRefusedError:
            return False

    until(is_served)
    assert worker.apply({}) == {}


def test_backends_are_told_their_client_by_the_proxy_protocol(start: Start, held: tuple[Held, Backend]) -> None:
    holder, backend = held
    start().apply({frontend(VIP): route(backend, proxy_protocol=True)})
    with connect(VIP, source="10.96.70.1") as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        got = read_all(holder.newest())
        port = client.getsockname()[1]
    addresses = bytes([10, 96, 70, 1, 10, 96, 0, 1])
    expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + addresses + port.to_bytes(2) + (80).to_bytes(2)
    assert got == expected + b"hello"


def test_round_robin_takes_turns_and_least_connections_the_idlest(start: Start, serve: Serve) -> None:
    backends = [serve(f"10.96.1.{n}").backend for n in range(1, 4)]
    start().apply(
        {
            frontend(VIP): route(*backends, scheduler="round-robin"),
            frontend(VIP, 81): route(*backends, scheduler="least-connections"),
        }
    )
    names = [ask(VIP) for _ in range(9)]
    assert names == names[:3] * 3
    assert len(set(names)) == 3
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(VIP, 81)) for _ in range(6)]
        held_by = [client.recv(100).decode() for client in clients]
        assert set(Counter(held_by).values()) == {2}
        clients[2].close()
        until(lambda: ask(VIP, 81) == held_by[2])


# --- several workers -------------------------------------------------------------------------------------------------


def test_workers_share_the_connections_and_a_dead_one_is_not_missed(start: Start, serve: Serve) -> None:
    backend = serve("10.96.1.1").backend
    one, two = (start(n, "--workers", "2") for n in range(2))
    for worker in (one, two):
        worker.apply({frontend(VIP): route(backend)})
    for _ in range(60):
        assert ask(VIP) == "10.96.1.1"
    totals = [worker.stats().frontends[0].total for worker in (one, two)]
    assert sum(totals) == 60
    assert min(totals) > 5
    one.process.kill()
    one.process.wait(PATIENCE)
    for _ in range(20):
        assert ask(VIP) == "10.96.1.1"


def test_a_client_with_affinity_keeps_its_backend_whichever_worker_it_meets(start: Start, serve: Serve) -> None:
    backends = [serve(f"10.96.1.{n}").backend for n in range(1, 6)]
    workers = [start(n, "--workers", "2") for n in range(2)]
    clients = [f"10.96.80.{n}" for n in range(1, 20)]
    for worker in workers:
        worker.apply({frontend(VIP): route(*backends[:4], affinity=600)})
    first = {client: ask(VIP, source=client) for client in clients}
    assert len(set(first.values())) > 1
    for worker in workers:
        worker.apply({frontend(VIP): route(*backends, affinity=600)})
    assert {client: ask(VIP, source=client) for client in clients} == first
    # The kernel gave each client to one worker.
    per_worker = [worker.stats().frontends[0].total for worker in workers]
    assert sum(per_worker) == 2 * len(clients)
    assert all(count and count % 2 == 0 for count in per_worker)
    # One worker is as good as the other for a client that comes anew.
    workers[0].process.kill()
    workers[0].process.wait(PATIENCE)
    for worker in workers[1:]:
        worker.apply({frontend(VIP): route(*backends[:4], affinity=600)})
    kept = {client: ask(VIP, source=client) for client in clients}
    assert kept == first


def test_a_worker_that_drains_keeps_its_flows_and_loses_no_client(start: Start, serve: Serve) -> None:
    backend = serve("10.96.1.1").backend
    old = start(0)
    old.apply({frontend(VIP): route(backend)})
    refused: list[OSError] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            try:
                assert ask(VIP) == "10.96.1.1"
            except OSError as error:
                refused.append(error)

    with connect(VIP) as client:
        assert client.recv(100) == b"10.96.1.1"
        clients = [threading.Thread(target=keep_asking) for _ in range(4)]
        for each in clients:
            each.start()
        new = start(1)
        new.apply({frontend(VIP): route(backend)})
        until(lambda: new.stats().frontends[0].total > 10)
        assert old.connection.ask(Drain(PATIENCE)) == Done()
        with pytest.raises(ControlError):
            Connection(0)
        assert old.stats().draining
        before = new.stats().frontends[0].total
        until(lambda: new.stats().frontends[0].total > before + 20)
        over.set()
        for each in clients:
            each.join(PATIENCE)
        assert not refused
        assert old.process.poll() is None
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert old.wait() == 0


def test_a_worker_that_drains_serves_all_who_wait_to_be_accepted(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    worker.apply({frontend(VIP): route(backend)})
    with socket.socket(socket.AF_UNIX) as agent, contextlib.ExitStack() as stack:
        agent.connect(control_name(0))
        worker.process.send_signal(signal.SIGSTOP)
        clients = [stack.enter_context(connect(VIP)) for _ in range(300)]
        agent.sendall(frame(Drain(PATIENCE)))
        worker.process.send_signal(signal.SIGCONT)
        for client in clients:
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"10.96.1.1"
    assert worker.wait() == 0


def test_a_worker_that_drains_ends_at_its_deadline(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    worker.apply({frontend(VIP): route(backend)})
    with connect(VIP) as client:
        client.recv(100)
        worker.connection.ask(Drain(0.5))
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert worker.wait() == 0


# --- control ---------------------------------------------------------------------------------------------------------


def test_a_worker_tells_what_it_was_told_and_outlives_the_teller(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    routes = {frontend(VIP): route(backend), frontend("", 30080): route(backend, kind=Kind.NODE_PORT)}
    worker.apply(routes, node=NODE)
    worker.connection.close()
    assert ask(VIP) == "10.96.1.1"
    worker.connection = Connection(0)
    assert worker.connection.welcome.serials == {Family.IPV4: ""}
    assert worker.connection.welcome.pid == worker.process.pid
    answer = worker.connection.ask(AskTable(Family.IPV4))
    assert isinstance(answer, TableAnswer)
    assert dict(answer.routes) == routes
    assert answer.node == NODE
    worker.apply({frontend(VIP, 81): route(backend)}, reset=True)
    with pytest.raises(ConnectionRefusedError):
        connect(VIP)
    assert ask(VIP, 81) == "10.96.1.1"


def test_a_worker_has_its_own_session_and_lets_no_second_one_have_its_name(start: Start) -> None:
    worker = start()
    assert os.getsid(worker.process.pid) == worker.process.pid
    command = [sys.executable, "-m", "proxy.userspace.worker", "--index", "0"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert second.returncode == 1
    assert "there is one already" in second.stderr


def test_nonsense_is_answered_and_harms_nobody(start: Start) -> None:
    worker = start()
    assert isinstance(worker.connection.ask(Hello(version=99)), Failed)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(PATIENCE)
        stranger.connect("\0sluice-worker/0")
        stranger.sendall(b"\0\0\0\3abc")
        assert b"not understood" in stranger.recv(1000)
        stranger.sendall(b"\xff\xff\xff\xff")
        assert stranger.recv(1) == b""
    assert worker.stats().tcp_connections == 0


def test_a_worker_stops_when_told(start: Start, held: tuple[Held, Backend]) -> None:
    _, backend = held
    worker = start()
    worker.apply({frontend(VIP): route(backend)})
    with connect(VIP) as client:
        until(lambda: worker.stats().tcp_connections == 1)
        assert worker.connection.ask(Stop()) == Done()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert worker.wait() == 0


def test_control_has_its_turn_while_bytes_rush_through(start: Start, serve: Serve, loop: str) -> None:
    worker, backend = start(0, "--loop", loop), serve("10.96.1.1", read_all).backend
    worker.apply({frontend(VIP): route(backend)})
    over = threading.Event()

    def rush() -> None:
        with connect(VIP) as client:
            while not over.is_set():
                client.sendall(bytes(1 << 18))

    rushing = [threading.Thread(target=rush) for _ in range(4)]
    for each in rushing:
        each.start()
    try:
        until(lambda: worker.stats().frontends[0].bytes_in > 1 << 24)
        for number in range(20):
            worker.apply({frontend(VIP, 1000 + number): route(backend)})
    finally:
        over.set()
        for each in rushing:
            each.join(PATIENCE)


def test_hairpins_and_serial_are_kept(start: Start) -> None:
    worker = start()
    endpoints = [Endpoint(parse_address(f"10.96.1.{n}"), frontend(VIP).protocol, 80) for n in (1, 2)]
    worker.connection.ask(Apply(family=Family.IPV4, serial="s1", hairpins_added=endpoints))
    worker.connection.ask(Apply(family=Family.IPV4, serial="s2", hairpins_removed=endpoints[:1]))
    answer = worker.connection.ask(AskTable(Family.IPV4))
    assert isinstance(answer, TableAnswer)
    assert (answer.serial, answer.hairpins) == ("s2", endpoints[1:])
