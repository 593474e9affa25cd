"""An HTTP server that strangers may reach, on the event loop that syncs run on.

The ports for health stand open to the world, so that no number of clients, and nothing that they do, may hold up a
sync or the answer to an honest probe.  Whoever is to be served takes his turn:

    listening socket, readable ─▶ queue of sockets ─▶ one turn: a few connections, or half a millisecond
                                        ▲                  │
                                        └── rest, a multiple of what the turn took

* Connections are taken in turns, and after each the server rests for `REST` times as long as it took.  So all
  sockets of one `Server` together get at most a fifth of the event loop's time; what is offered beyond that waits in
  the kernel's backlog, which costs the agent nothing.
* While a sync is at work a turn waits for it, for `GIVE_WAY` at most: probes bear that, changes of rules need not.
* The kernel hands a connection over when its request has come (TCP_DEFER_ACCEPT).  Then it is served at once, by one
  read and one write: no task, no transport, some 30 µs.
* A request that comes in pieces, or an answer that nobody takes, is looked at again every `TICK`, however much is sent
  to or by it, for `DEADLINE` at most.  When `CONNECTIONS` of them are open, the one that has waited longest gives way.

Every connection serves one request and is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable

from proxy import logs
from proxy.serving.messages import HEAD_BYTES, Request, RequestError, Response, compose, parse, text

DEADLINE = 10.0
"""Seconds for which a connection may be unfinished."""
CONNECTIONS = 128
"""Unfinished connections at a time, of all listening sockets together."""
BACKLOG = 128
"""Connections that may wait in the kernel, of each listening socket: not so many that they have given up before."""
BATCH = 20
"""Connections in one turn at most."""
SLICE = 0.0005
"""Seconds after which a turn takes no further one."""
REST = 4.0
"""How many times as long as a turn the server rests after it."""
GIVE_WAY = 0.005
"""Seconds for which a turn waits, at most, for who comes first."""
GLANCE = 0.001
"""Seconds between two looks whether he has finished."""
TICK = 0.02
"""Seconds between two looks at unfinished connections."""
LINGER = 1.0
"""Seconds for a client to take its answer where it has sent more than was read: closing at once would take it away."""
ANSWERS = 4
"""Answers that take their time (profiles), at once."""

_NO_DESCRIPTORS = 1.0
"""Seconds without new connections after one could not be taken."""

Handler = Callable[[Request], Response | Awaitable[Response]]
"""What answers.  Whatever can be said at once should be: only profiles take their time."""

_log = logs.get_logger("sluice.http")


class _Connection:
    """A connection that could not be served in one go."""

    __slots__ = ("answer", "deadline", "draining", "listener", "method", "more", "output", "received", "sock")

    def __init__(self, sock: socket.socket, listener: Listener, deadline: float) -> None:
        self.sock = sock
        self.listener = listener
        self.deadline = deadline
        self.received = bytearray()
        self.method = ""
        self.more = False
        """Whether the client has sent, or may send, more than is read."""
        self.answer: asyncio.Future[Response] | None = None
        self.output: memoryview | None = None
        self.draining = False


class Server:
    """Serves any number of listening sockets, within one budget of the event loop's time."""

    def __init__(
        self,
        *,
        connections: int = CONNECTIONS,
        deadline: float = DEADLINE,
        busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A server without sockets yet; see the head of this module.

        Args:
            connections: how many may be unfinished at a time.
            deadline: seconds for which one may be.
            busy: whether something is at work on the event loop that comes first.
            clock: monotonic seconds.
        """
        self._busy = busy
        self._gave_way = 0.0
        """Since when a turn waits, by the clock; 0: none does."""
        self._limit = connections
        self._patience = deadline
        self._clock = clock
        self._queue: deque[Listener] = deque()
        self._resting: asyncio.TimerHandle | None = None
        self._unfinished: dict[_Connection, None] = {}
        """In the order in which they came."""
        self._ticking: asyncio.TimerHandle | None = None
        self._answers = 0
        self.accepted = 0
        """Connections that were taken."""
        self.dropped = 0
        """Connections that were ended without an answer."""
        self.seconds = 0.0
        """Seconds of the event loop that all this took."""

    def listen(self, sock: socket.socket, handler: Handler, *, body_bytes: int = 0) -> Listener:
        """Serve a bound socket, which belongs to the result from now on, until that is closed.

        Args:
            sock: the socket.
            handler: answers its requests.
            body_bytes: how long a body may be that is waited for; others are passed over.

        Raises:
            OSError: another socket listens there already; this one is closed.
        """
        try:
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # without it such connections are unfinished ones for a moment
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        return Listener(self, sock, handler, body_bytes)

    # --- turns ---

    def queue(self, listener: Listener) -> None:
        """A listening socket has connections: it gets its turn."""
        self._queue.append(listener)
        if self._resting is None:
            self._turn()

    def _turn(self) -> None:
        self._resting = None
        if self._queue and self._gives_way():
            self._resting = asyncio.get_running_loop().call_later(GLANCE, self._turn)
            return
        while self._queue:
            listener = self._queue.popleft()
            if listener.closed:
                continue
            start = self._clock()
            pause = self._take(listener, start + SLICE)
            spent = self._clock() - start
            self.seconds += spent
            loop = asyncio.get_running_loop()
            if pause:
                loop.call_later(pause, listener.resume)
            else:
                listener.resume()
            self._resting = loop.call_later(spent * REST, self._turn)
            return

    def _gives_way(self) -> bool:
        """Whether a turn waits for who comes first; it does not wait again before it has been had."""
        now = self._clock()
        if not self._busy() or (self._gave_way and now - self._gave_way >= GIVE_WAY):
            self._gave_way = 0.0
            return False
        self._gave_way = self._gave_way or now
        return True

    def _take(self, listener: Listener, until: float) -> float:
        """Take some connections; seconds to leave the socket alone, where that failed."""
        for _ in range(BATCH):
            try:
                sock, _ = listener.sock.accept()
            except BlockingIOError:
                break
            except ConnectionError:
                continue  # it has gone meanwhile
            except OSError as error:  # no descriptors or no memory: others need theirs
                listener.complain(error)
                return _NO_DESCRIPTORS
            self.accepted += 1
            connection = _Connection(sock, listener, self._clock() + self._patience)
            if not self._advance(connection):
                self._keep(connection)
            if self._clock() >= until:
                break
        return 0.0

    # --- connections ---

    def _keep(self, connection: _Connection) -> None:
        while len(self._unfinished) >= self._limit:
            # Who has not asked yet goes first, then who does not take an answer.
            silent = (each for each in self._unfinished if each.answer is None and each.output is None)
            self._end(next(silent, next(iter(self._unfinished))))
            self.dropped += 1
        self._unfinished[connection] = None
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        now = self._clock()
        for connection in tuple(self._unfinished):
            if self._advance(connection):
                del self._unfinished[connection]
            elif now >= connection.deadline and connection.answer is None:
                self._end(connection)
                self.dropped += not connection.draining
        self.seconds += self._clock() - now
        if self._unfinished and self._ticking is None:
            self._ticking = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _end(self, connection: _Connection) -> None:
        self._unfinished.pop(connection, None)
        if connection.answer is not None:
            connection.answer.cancel()
        connection.sock.close()

    def forget(self, listener: Listener) -> None:
        """End what a listening socket has left unfinished."""
        for connection in [each for each in self._unfinished if each.listener is listener]:
            self._end(connection)

    def _advance(self, connection: _Connection) -> bool:
        """Do what can be done at once; whether the connection is finished, and closed."""
        try:
            if connection.output is None and not connection.draining and not self._respond(connection):
                return False
            return self._send(connection) and self._drain(connection)
        except BlockingIOError:
            return False
        except OSError:
            connection.sock.close()
            return True

    def _respond(self, connection: _Connection) -> bool:
        """Whether there is an answer to send; BlockingIOError: not before the client has said more."""
        if connection.answer is not None:
            if not connection.answer.done():
                return False
            self._compose(connection, _result(connection.answer))
            connection.answer = None
            return True
        data = connection.sock.recv(HEAD_BYTES, socket.MSG_DONTWAIT)
        if not data:
            raise ConnectionResetError  # it left before it asked
        connection.received += data
        try:
            found = parse(connection.received, connection.listener.body_bytes)
        except RequestError as error:
            connection.more = True
            self._compose(connection, text(f"{error}\n", error.status))
            return True
        if found is None:
            return False
        connection.method, connection.more = found.request.method, found.more
        response = self._ask(connection.listener.handler, found.request)
        if isinstance(response, Response):
            self._compose(connection, response)
            return True
        connection.answer = response
        return False

    def _ask(self, handler: Handler, request: Request) -> Response | asyncio.Future[Response]:
        try:
            response = handler(request)
        except Exception:  # noqa: BLE001  # a bug in an answer must not end the agent
            _log.exception("an answer failed", path=request.path)
            return text("internal error\n", 500)
        if isinstance(response, Response):
            return response
        task = asyncio.ensure_future(response)
        if self._answers >= ANSWERS:
            task.cancel()
            return text("too many of these are asked for at once\n", 503)
        self._answers += 1
        task.add_done_callback(self._answered)
        return task

    def _answered(self, _task: asyncio.Future[Response]) -> None:
        self._answers -= 1

    def _compose(self, connection: _Connection, response: Response) -> None:
        connection.output = memoryview(compose(response, connection.method, time.time()))
        connection.deadline = self._clock() + self._patience

    def _send(self, connection: _Connection) -> bool:
        output = connection.output
        while output:
            sent = connection.sock.send(output, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            connection.output = output = output[sent:]
        return True

    def _drain(self, connection: _Connection) -> bool:
        """Close, or first let the client take its answer; BlockingIOError: it may still send."""
        if connection.more:
            if not connection.draining:
                connection.draining = True
                connection.deadline = self._clock() + LINGER
                connection.sock.shutdown(socket.SHUT_WR)
            if connection.sock.recv(HEAD_BYTES, socket.MSG_DONTWAIT):
                return False
        connection.sock.close()
        return True


class Listener:
    """A listening socket of a `Server`."""

    def __init__(self, server: Server, sock: socket.socket, handler: Handler, body_bytes: int) -> None:
        self.sock = sock
        self.handler = handler
        self.body_bytes = body_bytes
        self.closed = False
        self.port = int(sock.getsockname()[1])
        self._descriptor = sock.fileno()
        self._server = server
        self._complained = False
        self.resume()

    def resume(self) -> None:
        """Wait for connections (again)."""
        if not self.closed:
            asyncio.get_running_loop().add_reader(self._descriptor, self._readable)

    def _readable(self) -> None:
        # Not looked at again before its turn: else the loop would spin for as long as anything waits.
        asyncio.get_running_loop().remove_reader(self._descriptor)
        self._server.queue(self)

    def complain(self, error: OSError) -> None:
        """A connection could not be taken."""
        if not self._complained:
            self._complained = True
            _log.warning("connections wait", port=self.port, reason=error.strerror)

    def close(self) -> None:
        """Stop listening, and end what is open; more than once is as good as once."""
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().remove_reader(self._descriptor)
            self.sock.close()
            self._server.forget(self)


def _result(answer: asyncio.Future[Response]) -> Response:
    """What an answer that took its time came to."""
    if answer.cancelled():
        return text("no answer\n", 503)
    if (error := answer.exception()) is not None:
        _log.error("an answer failed", exc_info=error)
        return text("internal error\n", 500)
    return answer.result()


def bind(host: str, port: int, *, both_families: bool = False) -> socket.socket:
    """A TCP socket bound to an address, of its family alone.

    With `both_families` an unspecified address of either family stands for all addresses of both, as it does to Go
    programs: kube-proxy at its default 0.0.0.0:10256 answers probes by IPv6 too.

    Raises:
        OSError: it cannot be bound.
    """
    if both_families and host in {"0.0.0.0", "::"}:  # noqa: S104  # only compared
        try:
            return _bind(socket.AF_INET6, "::", port, only=False)
        except OSError as error:
            if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
                raise
            return _bind(socket.AF_INET, "0.0.0.0", port, only=True)  # noqa: S104  # as configured
    return _bind(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port, only=True)


def _bind(family: socket.AddressFamily, host: str, port: int, *, only: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
