"""The HTTP server that strangers may reach: turns, budgets, and clients of bad will."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket

import pytest

from proxy.serving import http
from proxy.serving.http import Server, bind
from proxy.serving.messages import Response, text
from tests.fakes.polling import eventually

DEADLINE = 20.0
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def in_loop(test):
    """Run a coroutine function as a test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def bounded():
            async with asyncio.timeout(DEADLINE):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


class Clock:
    """Monotonic seconds that pass when told to, and a little at each look."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@contextlib.contextmanager
def served(handler=lambda _request: text("ok"), *, body_bytes=0, **bounds):
    server = Server(**bounds)
    listener = server.listen(bind("127.0.0.1", 0), handler, body_bytes=body_bytes)
    try:
        yield server, listener.port
    finally:
        listener.close()


async def ask(port, request=REQUEST):
    """Everything that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    try:
        return await reader.read()
    finally:
        writer.close()


@in_loop
async def test_a_connection_serves_one_request_and_is_closed():
    with served() as (server, port):
        answer = await ask(port, REQUEST * 2)
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 1
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(b"\r\n\r\nok")
        assert (server.accepted, server.dropped) == (1, 0)


@in_loop
async def test_a_request_in_pieces_is_answered():
    with served() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in (b"GE", b"T / HTTP/1.1\r", b"\nHost: x\r\n\r", b"\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.03)
        assert (await reader.read()).endswith(b"ok")
        writer.close()


@in_loop
async def test_a_long_answer_reaches_a_client_that_takes_its_time():
    body = bytes(range(256)) * 40_000
    with served(lambda _request: Response(200, body)) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        await asyncio.sleep(0.1)
        assert (await reader.read()).endswith(body)
        writer.close()


@in_loop
async def test_an_answer_survives_a_body_that_nobody_reads():
    with served() as (_, port):
        answer = await ask(port, b"POST / HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000))
        assert answer.endswith(b"ok")


@in_loop
async def test_a_short_body_is_read_where_one_is_wanted():
    with served(lambda request: text(f"<{request.body.decode()}>"), body_bytes=8) as (_, port):
        assert (await ask(port, b"PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")).endswith(b"<abc>")
        assert (await ask(port, b"PUT / HTTP/1.1\r\nContent-Length: 30\r\n\r\nabc")).endswith(b"<>")


@in_loop
async def test_head_is_answered_without_a_body():
    with served() as (_, port):
        answer = await ask(port, b"HEAD / HTTP/1.1\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n")
        assert b"Content-Length: 2\r\n" in answer


@in_loop
async def test_an_answer_that_takes_its_time_holds_up_nobody():
    slow = asyncio.Event()

    async def later():
        await slow.wait()
        return text("late")

    with served(lambda request: later() if request.path == "/slow" else text("ok")) as (_, port):
        waiting = asyncio.create_task(ask(port, b"GET /slow HTTP/1.1\r\n\r\n"))
        assert (await ask(port)).endswith(b"ok")
        assert not waiting.done()
        slow.set()
        assert (await waiting).endswith(b"late")


@in_loop
async def test_only_some_answers_may_take_their_time_at_once():
    slow = asyncio.Event()

    async def later():
        await slow.wait()
        return text("late")

    with served(lambda _request: later()) as (server, port):
        waiting = [asyncio.create_task(ask(port)) for _ in range(http.ANSWERS)]
        await eventually(lambda: len(server._unfinished) == http.ANSWERS)
        assert b" 503 " in await ask(port)
        slow.set()
        assert all(answer.endswith(b"late") for answer in await asyncio.gather(*waiting))
        assert (await ask(port)).endswith(b"late")


@in_loop
async def test_a_bug_in_an_answer_is_a_500_and_a_line():
    async def fail():
        raise RuntimeError("later")

    def handler(request):
        if request.path == "/later":
            return fail()
        raise RuntimeError("now")

    with served(handler) as (_, port):
        for path in (b"/now", b"/later"):
            assert b"HTTP/1.1 500 " in await ask(port, b"GET %b HTTP/1.1\r\n\r\n" % path)


# --- clients of bad will ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("garbage", "status"),
    [
        (b"\0" * 100 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/9\r\n\r\n", b"400"),
        (b"GET  / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", b"400"),
        (b"X" * 100_000, b"431"),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", b"431"),
    ],
)
@in_loop
async def test_garbage_is_refused_and_the_server_lives(garbage, status, caplog):
    with served() as (_, port):
        assert (await ask(port, garbage)).startswith(b"HTTP/1.1 " + status)
        assert (await ask(port)).endswith(b"ok")
    assert not caplog.records  # strangers must not be able to fill the log


@in_loop
async def test_half_a_request_is_put_out_at_its_deadline():
    clock = Clock()
    with served(deadline=10.0, clock=clock) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        await eventually(lambda: server._unfinished)
        clock.now += 9.9
        await asyncio.sleep(5 * http.TICK)
        assert server._unfinished
        clock.now += 0.2
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert (server.dropped, len(server._unfinished)) == (1, 0)
        writer.close()


@in_loop
async def test_a_client_that_talks_slowly_for_ever_gains_no_time():
    clock = Clock()
    with served(deadline=10.0, clock=clock) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(6):
            writer.write(b"G")
            await asyncio.sleep(2 * http.TICK)
            clock.now += 2.0
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert server.dropped == 1
        writer.close()


@in_loop
async def test_a_client_that_takes_no_answer_is_put_out():
    clock = Clock()
    with served(lambda _request: Response(200, bytes(30_000_000)), deadline=10.0, clock=clock) as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(REQUEST)
        await eventually(lambda: server._unfinished)
        clock.now += 11
        await eventually(lambda: not server._unfinished)
        assert server.dropped == 1
        writer.close()


@in_loop
async def test_the_longest_unfinished_makes_room_and_answers_under_way_do_not():
    slow = asyncio.Event()

    async def later():
        await slow.wait()
        return text("late")

    with served(lambda _request: later(), connections=3, deadline=600) as (server, port):
        asked = asyncio.create_task(ask(port))
        await eventually(lambda: server._unfinished)
        halves = []
        for _ in range(10):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /")
            halves.append(writer)
        await eventually(lambda: server.accepted == 11)
        assert len(server._unfinished) == 3
        slow.set()
        assert (await asked).endswith(b"late")
        for writer in halves:
            writer.close()


@in_loop
async def test_a_thousand_clients_that_say_nothing_keep_nobody_waiting():
    silent = []
    with served(deadline=600) as (server, port):
        try:
            for number in range(1000):
                sock = socket.socket()
                silent.append(sock)
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(("127.0.0.1", port))
                if number % 2:
                    with contextlib.suppress(OSError):
                        sock.send(b"GET / HTTP/1.1\r\nX: ")
            for _ in range(20):
                assert (await ask(port)).endswith(b"ok")
            assert len(server._unfinished) <= http.CONNECTIONS
        finally:
            for sock in silent:
                sock.close()


# --- turns -----------------------------------------------------------------------------------------------------


@in_loop
async def test_after_a_turn_the_server_rests_for_a_multiple_of_what_it_took(monkeypatch):
    clock = Clock()
    rests = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def handler(_request):
        clock.now += 0.0002
        return text("ok")

    with served(handler, clock=clock) as (server, port):
        monkeypatch.setattr(
            loop, "call_later", lambda pause, *rest, **more: (rests.append(pause), call_later(pause, *rest, **more))[1]
        )
        clients = await connected(port, 8)
        for client in clients:
            client.send(REQUEST)
        await eventually(lambda: server.accepted == 8)
        for client in clients:
            client.close()
    turns = [pause for pause in rests if 0 < pause < 0.005]
    # A turn ends with the connection that passes the half millisecond, the third of 0.2 ms each.
    assert len(turns) >= 3
    assert all(0.0002 * http.REST <= pause < 0.00061 * http.REST for pause in turns)


@in_loop
async def test_sockets_take_turns_whoever_is_flooded():
    clock = Clock()
    order = []

    def handler(name):
        def answer(_request):
            order.append(name)
            clock.now += http.SLICE  # one connection is a turn
            return text("ok")

        return answer

    server = Server(clock=clock)
    listeners = [server.listen(bind("127.0.0.1", 0), handler(name)) for name in ("flooded", "quiet")]
    clients = await connected(listeners[0].port, 30) + await connected(listeners[1].port, 2)
    for client in clients:
        client.send(REQUEST)
    await eventually(lambda: len(order) == 32)
    for each in (*clients, *listeners):
        each.close()
    assert [number for number, name in enumerate(order) if name == "quiet"][-1] < 8


@in_loop
async def test_turns_wait_while_a_sync_is_at_work():
    at_work = True
    with served(busy=lambda: at_work) as (server, port):
        asking = asyncio.ensure_future(ask(port))
        await eventually(lambda: server._gave_way)
        assert server.accepted == 0
        at_work = False
        assert (await asking).endswith(b"ok")


@in_loop
async def test_they_wait_so_long_and_no_longer():
    clock = Clock()
    with served(busy=lambda: True, clock=clock) as (server, port):
        for count in (1, 2):
            asking = asyncio.ensure_future(ask(port))
            await eventually(lambda: server._gave_way)
            clock.now += http.GIVE_WAY - 0.001
            await asyncio.sleep(http.GLANCE * 5)
            assert server.accepted == count - 1
            clock.now += 0.002
            assert (await asking).endswith(b"ok")


@in_loop
async def test_what_it_takes_of_the_event_loop_is_counted():
    clock = Clock()

    def handler(_request):
        clock.now += 0.25
        return text("ok")

    with served(handler, clock=clock) as (server, port):
        await ask(port)
        await ask(port)
        assert server.seconds == 0.5


async def connected(port, count):
    """Connections that are through."""
    clients = []
    for _ in range(count):
        client = socket.socket()
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        clients.append(client)
    return clients


@in_loop
async def test_without_descriptors_connections_wait(monkeypatch):
    monkeypatch.setattr(http, "_NO_DESCRIPTORS", 0.05)
    with served() as (_server, port):
        failures = iter([OSError(errno.EMFILE, "Too many open files")] * 2)
        accept = socket.socket.accept

        def failing(sock):
            if sock.getsockname()[1] == port:
                for error in failures:
                    raise error
            return accept(sock)

        monkeypatch.setattr(socket.socket, "accept", failing)
        assert (await ask(port)).endswith(b"ok")
        assert next(failures, None) is None


@in_loop
async def test_a_listener_closes_once_and_takes_what_is_unfinished_with_it():
    server = Server()
    listener = server.listen(bind("127.0.0.1", 0), lambda _request: text("ok"))
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    writer.write(b"GET /")
    await eventually(lambda: server._unfinished)
    listener.close()
    listener.close()
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    assert not server._unfinished
    with pytest.raises(ConnectionRefusedError):
        await ask(listener.port)
    writer.close()
