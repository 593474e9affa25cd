"""Bytes through a worker: all of them, at the pace of the slower end, to the last word or the reset."""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rules.forwarding import Backend, Family
from tests.netns.descriptors import sockets, targets
from tests.netns.userspace.rig import (
    PATIENCE,
    VIP,
    VIP6,
    Held,
    Serve,
    Start,
    connect,
    echo,
    frontend,
    read_all,
    reset,
    route,
    until,
)

SLOW = 10
"""Clients whose backends do not read."""
TRANSFER = {"asyncio": 1 << 30, "uvloop": 64 << 20}
"""Bytes each way, by the event loop; the first is what workers have unless told otherwise."""


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


def send_all(connection: socket.socket, seed: int, total: int, *, pauses: int = 200) -> None:
    """Send the chunks of a seed with some random pauses, then the end."""
    chance, sent = random.Random(seed), 0
    step = total // pauses + 1
    pause_at = step
    for piece in chunks(seed, total):
        connection.sendall(piece)
        sent += len(piece)
        if sent > pause_at:
            pause_at += step
            time.sleep(chance.random() * 0.01)
    connection.shutdown(socket.SHUT_WR)


def receive_all(connection: socket.socket, seed: int, total: int, *, pauses: int = 200) -> None:
    """Receive the chunks of a seed and nothing else, with some random pauses, to the end."""
    chance, received = random.Random(seed), 0
    step = total // pauses + 1
    pause_at = step
    expected, piece = chunks(seed, total), b""
    while data := connection.recv(chance.choice([1000, 1 << 14, 1 << 18])):
        received += len(data)
        while data:
            piece = piece or next(expected, b"")
            size = min(len(piece), len(data))
            assert size, "more came than was sent"
            assert data[:size] == piece[:size], f"byte {received - len(data)} or one behind it is another"
            data, piece = data[size:], piece[size:]
        if received > pause_at:
            pause_at += step
            time.sleep(chance.random() * 0.01)
    assert received == total


def both(connection: socket.socket, sends: int, receives: int, total: int) -> None:
    """Send and receive at once, each by its seed."""
    sender = threading.Thread(target=send_all, args=(connection, sends, total))
    sender.start()
    receive_all(connection, receives, total)
    sender.join(PATIENCE)


def test_bytes_cross_unchanged_in_both_directions_at_once(start: Start, serve: Serve, loop: str) -> None:
    total = TRANSFER[loop]
    right: list[bool] = []

    def at_backend(connection: socket.socket) -> None:
        both(connection, 2, 3, total)
        right.append(True)

    server = serve("10.96.1.1", at_backend)
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP): route(server.backend)})
    with connect(VIP) as client:
        both(client, 3, 2, total)
        until(lambda: right)
    figures = worker.carried()
    assert (figures.bytes_in, figures.bytes_out) == (total, total)


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
        clients = [stack.enter_context(connect(VIP)) for _ in range(SLOW)]
        holder.newest(SLOW)
        before = worker.memory()
        written = [fill(client) for client in clients]
        # A direction holds one buffer, or a pipe in the kernel; the rest waits in the sockets of its ends.
        assert worker.memory() - before < SLOW * (1 << 18) + (4 << 20)
        for client, total in zip(clients, written, strict=True):
            client.settimeout(PATIENCE)
            client.shutdown(socket.SHUT_WR)
            assert total > 0
        assert sum(len(read_all(each)) for each in holder.connections) == sum(written)


def test_only_a_flow_that_carries_much_is_spliced(start: Start, held: tuple[Held, Backend], loop: str) -> None:
    holder, backend = held
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP): route(backend)})

    def pipes() -> int:
        return sum(target.startswith("pipe:") for target in targets(worker.process.pid).values())

    before = pipes()
    with connect(VIP) as client:
        server = holder.newest()
        for _ in range(20):
            client.sendall(bytes(1000))
            left = 1000
            while left:
                left -= len(server.recv(left))
        assert pipes() == before
        # What the backend doesn't take waits in a pipe.
        assert fill(client)
        assert pipes() == before + 2


def test_both_sockets_of_a_flow_find_dead_peers_and_never_wait_for_more_to_send(
    start: Start, held: tuple[Held, Backend]
) -> None:
    holder, backend = held
    worker = start()
    worker.apply({frontend(VIP): route(backend)})
    with connect(VIP):
        holder.newest()
        until(lambda: worker.stats().tcp_connections == 1)
        found = []
        for each in sockets(worker.process.pid):
            # Listeners have no peer, and neither have others.
            with contextlib.suppress(OSError):
                if each.family == socket.AF_INET and each.getpeername():
                    keep_alive = each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    found.append((keep_alive, each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        assert found == [(1, 1), (1, 1)]


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


def fill(connection: socket.socket) -> int:
    """Write until nothing more is taken; how many bytes were."""
    connection.setblocking(False)
    total, quiet_since = 0, time.monotonic()
    while time.monotonic() - quiet_since < 0.05:
        with contextlib.suppress(BlockingIOError):
            total += connection.send(bytes(1 << 16))
            quiet_since = time.monotonic()
    connection.settimeout(PATIENCE)
    return total


def _not_reading(early: socket.socket, late: socket.socket) -> None:
    """The other one writes more than anybody takes."""
    assert fill(late)


def _not_heard(early: socket.socket, late: socket.socket) -> None:
    """It writes more than the other one takes."""
    assert fill(early)


def _stuck_both_ways(early: socket.socket, late: socket.socket) -> None:
    assert fill(late)
    assert fill(early)


def _half_closed_and_not_reading(early: socket.socket, late: socket.socket) -> None:
    _half_closed_by_it(early, late)
    assert fill(late)


def _last_word_on_its_way(early: socket.socket, late: socket.socket) -> None:
    """The other one has ended behind more than anybody takes."""
    assert fill(late)
    late.shutdown(socket.SHUT_WR)


def _busy(early: socket.socket, late: socket.socket) -> None:
    """Much has gone both ways, so both directions are spliced."""
    for sender, receiver in ((early, late), (late, early)):
        for _ in range(20):
            sender.sendall(bytes(10_000))
            got = 0
            while got < 10_000:
                got += len(receiver.recv(1 << 16))


STATES = (
    _idle,
    _busy,
    _half_closed_by_it,
    _half_closed_by_the_other,
    _not_reading,
    _not_heard,
    _stuck_both_ways,
    _half_closed_and_not_reading,
    _last_word_on_its_way,
)
"""Of a connection between handshake and end; those before are in test_userspace_backends.py."""


def test_a_reset_reaches_the_other_end_in_every_state(start: Start, held: tuple[Held, Backend], loop: str) -> None:
    holder, backend = held
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP): route(backend)})
    cases = [(state, who) for state in STATES for who in ("client", "backend")]
    for number, (state, who) in enumerate(cases, 1):
        with connect(VIP) as client:
            server = holder.newest(number)
            server.settimeout(PATIENCE)
            early, late = (client, server) if who == "client" else (server, client)
            state(early, late)
            reset(early)
            # It learns so without reading or writing: an orderly end would be no error.
            watched = select.poll()
            watched.register(late, 0)
            assert watched.poll(PATIENCE * 1000), f"{state.__name__}, by the {who}: the other end hears nothing"
            assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.ECONNRESET, errno.EPIPE), state
    until(lambda: worker.stats().tcp_connections == 0)
