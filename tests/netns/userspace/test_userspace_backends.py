"""Backends that fail, that come and go, and a worker that has no descriptor left for them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import select
import signal
import socket
from collections.abc import Iterator

import pytest

from proxy.userspace import filters
from proxy.userspace.control import Connection, TableAnswer
from proxy.userspace.control import Table as AskTable
from rules.forwarding import Backend, Family, Protocol, Route, parse_address
from tests.fakes.polling import eventually
from tests.netns.userspace.rig import (
    PATIENCE,
    VIP,
    Held,
    Serve,
    Start,
    Worker,
    ask,
    connect,
    frontend,
    read_all,
    reset,
    route,
    until,
)

CONNECTIONS = 1000
OTHER = "10.96.0.2"


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
    assert worker.carried().failures > 0


def test_the_next_backend_serves_who_got_no_answer(start: Start, serve: Serve, silent: Backend) -> None:
    good = serve("10.96.1.1").backend
    worker = start(0, "--connect-timeout", "0.2")
    worker.apply({frontend(VIP): route(good, silent)})
    until(lambda: ask(VIP) == "10.96.1.1" and worker.carried().failures)


def test_a_client_that_no_backend_takes_is_reset(start: Start) -> None:
    worker = start()
    worker.apply({frontend(VIP): route(Backend(parse_address("10.96.1.2"), 9))})
    with pytest.raises(ConnectionResetError):
        ask(VIP)
    assert worker.carried().open == 0


def test_a_client_that_gives_up_takes_its_attempt_with_it(start: Start, silent: Backend) -> None:
    worker = start(0, "--connect-timeout", "60")
    worker.apply({frontend(VIP): route(silent)})
    client = connect(VIP)
    until(lambda: worker.stats().tcp_connections == 1)
    reset(client)
    until(lambda: worker.stats().tcp_connections == 0)


def test_clients_that_are_gone_before_they_are_accepted_leave_nothing_and_harm_nobody(
    start: Start, serve: Serve, loop: str
) -> None:
    worker, backend = start(0, "--loop", loop), serve("10.96.1.1").backend
    worker.apply({frontend(VIP): route(backend)})
    worker.process.send_signal(signal.SIGSTOP)
    try:
        gone, closed, patient = ([connect(VIP) for _ in range(20)] for _ in range(3))
        for client in gone:
            reset(client)
        for client in closed:
            client.close()
    finally:
        worker.process.send_signal(signal.SIGCONT)
    for client in patient:
        with client:
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"10.96.1.1"
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


# --- backends that are frontends ---------------------------------------------------------------------------------


def test_a_backend_that_is_a_frontend_is_none_as_in_other_modes(start: Start, serve: Serve) -> None:
    worker = start()
    first, second = (Backend(parse_address(each), 80) for each in (VIP, OTHER))
    worker.apply({frontend(VIP): route(second), frontend(OTHER): route(first)})
    with pytest.raises(ConnectionResetError):
        ask(VIP)
    assert sum(each.total for each in worker.stats().frontends) == 1, "it went round"
    worker.apply({frontend(VIP): route(second, serve("10.96.1.1").backend)})
    assert {ask(VIP) for _ in range(20)} == {"10.96.1.1"}


def test_so_is_one_of_udp(start: Start) -> None:
    worker = start()
    place = frontend(VIP, 53, Protocol.UDP)
    worker.apply({place: route(Backend(parse_address(VIP), 53))})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((VIP, 53))
        client.send(b"round")
        until(lambda: any(each.failures for each in worker.stats().frontends))
    assert worker.stats().udp_flows == 0
    assert sum(each.total for each in worker.stats().frontends) == 0, "it went round"


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


@pytest.mark.parametrize("files", [60, 61])
def test_who_has_all_descriptors_for_clients_still_meets_the_next_agent(
    start: Start, held: tuple[Held, Backend], loop: str, files: int
) -> None:
    _, backend = held
    worker = start(0, "--loop", loop, files=files)
    worker.apply({frontend(VIP): route(backend)})
    with contextlib.ExitStack() as clients:
        while not worker.stats().exhausted:
            with contextlib.suppress(ConnectionResetError):
                clients.enter_context(connect(VIP))
        assert worker.apply({frontend(VIP, port): route(backend) for port in range(1000, 1020)})
        # One that gives no answer would be ended, and with it all its connections.
        with contextlib.closing(Connection(0, timeout=PATIENCE)) as another:
            assert isinstance(another.ask(AskTable(Family.IPV4)), TableAnswer)


def test_connections_to_backends_leave_those_descriptors_too(
    start: Start, held: tuple[Held, Backend], loop: str
) -> None:
    """Where one comes free at a time, a client gets that one, and its backend would get one of those."""
    _, backend = held
    worker = start(0, "--loop", loop, files=60)
    others = [frontend(VIP, port) for port in range(1000, 1010)]
    assert not worker.apply({frontend(VIP): route(backend), **dict.fromkeys(others, route(backend))})
    with contextlib.ExitStack() as clients:

        def fill() -> None:
            before = worker.stats().exhausted
            while worker.stats().exhausted == before:
                with contextlib.suppress(ConnectionResetError):
                    clients.enter_context(connect(VIP))

        fill()
        for each in others:
            assert not worker.apply(removed=[each])
            fill()
        with contextlib.closing(Connection(0, timeout=PATIENCE)) as another:
            assert isinstance(another.ask(AskTable(Family.IPV4)), TableAnswer)


def test_listeners_never_take_the_descriptors_of_all_connections(start: Start, serve: Serve) -> None:
    backend = serve("10.96.1.1").backend
    worker = start(0, files=80)
    places = [frontend(VIP, 1000 + number) for number in range(100)]
    trouble = worker.apply(dict.fromkeys(places, route(backend)))
    served = [place for place in places if place not in trouble]
    assert len(served) == 60
    assert "raise the limit of open files" in next(iter(trouble.values()))
    assert ask(VIP, served[0].port) == "10.96.1.1"
    # Room that comes is taken.
    worker.apply(removed=served[:30])
    until(lambda: len(worker.apply()) == 10)
