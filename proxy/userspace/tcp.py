"""TCP connections: accepted, given a backend, joined.

Theory of operation
-------------------
A listener that is ready is emptied, up to ACCEPTS connections at a time.  Each gets a backend and a connecting socket;
both sockets are watched from then on.  A backend that refuses or doesn't answer in time makes room for another of the
same list, as no byte was exchanged yet, up to ATTEMPTS; then the client is reset.  A client that gives up meanwhile
takes its attempt with it.  Once connected, the pair is a `Flow` (see `relay`).

Descriptors run out where connections are many.  One is held in reserve: given back, it lets the waiting connections be
accepted and reset, so that clients learn at once what is the matter and the listener doesn't spin.  Where even that
fails, listeners rest for a while.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable, Mapping

from proxy.userspace import filters, proxy_protocol, sockets
from proxy.userspace.choose import Chooser, Target
from proxy.userspace.poller import Poller
from proxy.userspace.relay import IN, IN_AND_OUT, End, Flow, Shop
from proxy.userspace.table import Bind, Served
from proxy.userspace.tracing import Watchers
from rules.forwarding import Address, Family, Frontend, Protocol

ACCEPTS = 32
ATTEMPTS = 8

_REST = 0.1
"""Seconds that a listener rests when the system has no descriptors."""

_INPUT = select.EPOLLIN | select.EPOLLRDHUP
_TROUBLE = select.EPOLLERR | select.EPOLLHUP


class TcpListener:
    """Where clients of one frontend connect, at one address."""

    def __init__(self, tcp: Tcp, bind: Bind, served: Served, listener: sockets.Socket) -> None:
        """The socket listens already, and is the listener's from now on."""
        self.bind = bind
        self.served = served
        self.socket = listener
        self.filtered = False
        """Whether the socket has a filter, which those accepted from it inherit."""
        self._tcp = tcp
        self._accepts = 1
        self._descriptor = listener.fileno()
        tcp.poller.add(self._descriptor, select.EPOLLIN, self._ready)

    def follow(self, served: Served) -> None:
        """The route has changed: it is for those who come from now on."""
        self.served = served

    def close(self, *, emptied: bool = False) -> None:
        """Accept no more; `emptied`: serve those that wait first."""
        while emptied and self._accept():
            pass
        self._tcp.poller.remove(self._descriptor)
        self.socket.close()

    def _ready(self, _events: int) -> None:
        # As many as there are likely to be: to find out that there are no more costs a call and an exception.
        for _ in range(self._accepts):
            if not self._accept():
                self._accepts = (self._accepts + 1) // 2
                return
        self._accepts = min(self._accepts * 2, ACCEPTS)

    def _accept(self) -> bool:
        """Serve one connection; whether there may be more."""
        try:
            client, address = sockets.accept(self.socket)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EINVAL:
                # Somebody has closed the listener itself (`ss -K`), and the kernel would tell of that for ever.
                self._tcp.poller.remove(self._descriptor)
                return False
            if not sockets.is_exhaustion(error):
                return True  # it was gone before it could be accepted
            if self._tcp.refuse_one(self):
                return True
            self._tcp.poller.remove(self._descriptor)
            self._tcp.poller.later(_REST, self._go_on)
            return False
        if self.filtered:
            filters.detach(client)
        self._tcp.serve(self, client, address)
        return True

    def _go_on(self) -> None:
        if self.socket.fileno() < 0:
            return
        try:
            self._tcp.poller.add(self._descriptor, select.EPOLLIN, self._ready)
        except OSError:  # the kernel's limit of what is watched
            self._tcp.poller.later(_REST, self._go_on)


class Attempt:
    """A client that was accepted and waits for its backend."""

    __slots__ = (
        "address",
        "backend",
        "bind",
        "chooser",
        "client",
        "deadline",
        "served",
        "since",
        "source",
        "target",
        "tcp",
        "tried",
    )

    def __init__(
        self,
        tcp: Tcp,
        listener: TcpListener,
        chooser: Chooser,
        client: End,
        *,
        address: tuple[str, int],
        source: Address,
    ) -> None:
        """Of a client at an address, which is also given as `source`."""
        self.tcp = tcp
        self.served = listener.served
        self.bind = listener.bind
        self.chooser = chooser
        self.client = client
        self.address = address
        self.source = source
        self.tried: list[Target] = []
        self.target: Target | None = None
        self.backend: End | None = None
        self.since = 0.0
        self.deadline = 0.0

    def client_ready(self, events: int) -> None:
        """The client has said something, or has gone."""
        if events & _TROUBLE:
            self.tcp.give_up(self, "the client gave up")
            return
        self.client.readable = True
        if events & select.EPOLLRDHUP:
            self.client.hangup = True

    def backend_ready(self, events: int) -> None:
        """The attempt has come to an end."""
        backend = self.backend
        assert backend is not None
        if events & _TROUBLE and (error := sockets.pending_error(backend.socket)):
            self.tcp.failed(self, OSError(error, ""))
            return
        if events & _INPUT:
            backend.readable = True
            backend.hangup = bool(events & (select.EPOLLRDHUP | _TROUBLE))
        self.tcp.join(self)


class Tcp:
    """All TCP connections of a worker."""

    def __init__(
        self, poller: Poller, *, connect_timeout: float, idle_limit: float, last: int, listens: Callable[[Bind], bool]
    ) -> None:
        """Of a worker.

        Args:
            poller: where sockets are watched.
            connect_timeout: seconds for a backend to answer.
            idle_limit: seconds after which a silent connection ends; 0: never.
            last: descriptors from this one on are not for clients.
            listens: whether the worker itself is what listens at a place.
        """
        self.poller = poller
        self._last = last
        self._listens = listens
        self.flows: set[Flow] = set()
        self.attempts: set[Attempt] = set()
        self.watchers = Watchers()
        self.exhausted = 0
        """How often a connection was refused because no descriptor was left."""
        self._shop = Shop(poller, last)
        self._connect_timeout = connect_timeout
        self._idle_limit = idle_limit
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def __len__(self) -> int:
        return len(self.flows) + len(self.attempts)

    # --- from accepted to joined ---------------------------------------------------------------------------------

    def serve(self, listener: TcpListener, connection: sockets.Socket, address: tuple[str, int]) -> None:
        """Give a client that was just accepted a backend, or reset it."""
        if connection.fileno() >= self._last:  # the system always gives the least number that is free
            self.exhausted += 1
            _abort(connection)
            return
        served = listener.served
        served.counters.begin()
        source = sockets.packed(address)
        interface = sockets.input_interface(connection) if served.asks_interface else None
        chooser = served.chooser(source, listener.bind.address, interface)
        if chooser is None:
            served.counters.failures += 1
            served.counters.end()
            _abort(connection)
            if self.watchers.active:
                self.watchers.saw(served, listener.bind, (source, address[1]), why="no backend is for this client")
            return
        client = End(connection, watches_room=False)
        attempt = Attempt(self, listener, chooser, client, address=address, source=source)
        self.attempts.add(attempt)
        try:
            self.poller.add(connection.fileno(), IN, attempt.client_ready)
        except OSError:
            self.give_up(attempt)
            return
        self._connect(attempt, chooser.choose(source, time.monotonic()))

    def _connect(self, attempt: Attempt, target: Target) -> None:
        attempt.target = target
        attempt.served.counters.take(target.backend)
        attempt.tried.append(target)
        attempt.since = time.monotonic()
        attempt.deadline = attempt.since + self._connect_timeout
        try:
            if self._listens(Bind(target.backend.address, Protocol.TCP, target.backend.port)):
                # It would come back, again and again.  Rules translate no packet twice, so nobody would answer there.
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))  # noqa: TRY301  # as if the kernel had refused
            connection = sockets.connect(attempt.served.family.af, socket.SOCK_STREAM, target.address, self._last)
        except OSError as error:
            self.failed(attempt, error)
            return
        attempt.backend = End(connection, watches_room=True)
        try:
            self.poller.add(attempt.backend.descriptor, IN_AND_OUT, attempt.backend_ready)
        except OSError as error:
            self.failed(attempt, error)

    def failed(self, attempt: Attempt, error: OSError) -> None:
        """A backend cannot be reached: try the next one, unless the fault is ours."""
        attempt.served.counters.failures += 1
        self._let_go(attempt)
        if sockets.is_exhaustion(error):
            self.exhausted += 1
            self.give_up(attempt, "the worker has no file descriptor left")
            return
        self._try_another(attempt)

    def _try_another(self, attempt: Attempt) -> None:
        target = attempt.chooser.pool.another(attempt.tried) if len(attempt.tried) < ATTEMPTS else None
        if target is None:
            self.give_up(attempt, "no backend could be reached")
            return
        attempt.chooser.settle(attempt.source, target, time.monotonic())
        self._connect(attempt, target)

    def join(self, attempt: Attempt) -> None:
        """The backend has answered: let the bytes flow."""
        client, backend, target, served = attempt.client, attempt.backend, attempt.target, attempt.served
        assert backend is not None
        assert target is not None
        self.attempts.discard(attempt)
        counters = served.counters
        seconds = time.monotonic() - attempt.since
        counters.connected(seconds)
        if self.watchers.active:
            self.watchers.saw(
                served,
                attempt.bind,
                (attempt.source, attempt.address[1]),
                backend=target.backend,
                own=sockets.own_place(backend.socket),
                tried=tuple(each.backend for each in attempt.tried[:-1]),
                seconds=seconds,
            )
        flow = Flow(
            self._shop, client, backend, counters=counters, target=target.backend, when_closed=self.flows.discard
        )
        self.flows.add(flow)
        if served.route.proxy_protocol:
            header = proxy_protocol.header(
                Protocol.TCP, (attempt.source, attempt.address[1]), (attempt.bind.address, attempt.bind.port)
            )
            client.pending = memoryview(header)
        flow.start()

    def give_up(self, attempt: Attempt, why: str = "the worker could not serve it") -> None:
        """No backend: reset the client."""
        self.attempts.discard(attempt)
        if self.watchers.active:
            client = attempt.source, attempt.address[1]
            tried = tuple(each.backend for each in attempt.tried)
            self.watchers.saw(attempt.served, attempt.bind, client, tried=tried, why=why)
        self._let_go(attempt)
        attempt.served.counters.end()
        self.poller.forget(attempt.client.descriptor)
        _abort(attempt.client.socket)

    def _let_go(self, attempt: Attempt) -> None:
        """Leave the attempt's backend."""
        backend, attempt.backend = attempt.backend, None
        target, attempt.target = attempt.target, None
        if target is not None:
            attempt.served.counters.leave(target.backend)
        if backend is not None:
            self.poller.forget(backend.descriptor)
            _abort(backend.socket)

    # --- what happens to all of them -----------------------------------------------------------------------------

    def changed(self, family: Family, current: Mapping[Frontend, Served]) -> None:
        """A family's routes have changed: whoever waits for a backend that its route no longer has gets another."""
        for attempt in list(self.attempts):
            if attempt.served.family is not family:
                continue
            served = current.get(attempt.served.frontend)
            if served is not attempt.served:
                self._reconsider(attempt, served)

    def _reconsider(self, attempt: Attempt, served: Served | None) -> None:
        if served is None:
            self.give_up(attempt, "its frontend is gone")
            return
        interface = sockets.input_interface(attempt.client.socket) if served.asks_interface else None
        chooser = served.chooser(attempt.source, attempt.bind.address, interface)
        if chooser is None:
            self.give_up(attempt, "its frontend has lost its backends")
            return
        if attempt.target is not None and attempt.target.backend in chooser.pool:
            attempt.served, attempt.chooser = served, chooser
            return
        self._let_go(attempt)
        attempt.served, attempt.chooser = served, chooser
        attempt.tried = []
        self._connect(attempt, chooser.choose(attempt.source, time.monotonic()))

    def look_around(self, now: float, passed: float) -> None:
        """End attempts whose time is over, and flows that have been idle too long; `passed` seconds after the last."""
        for attempt in [each for each in self.attempts if each.deadline <= now]:
            self.failed(attempt, TimeoutError())
        if not self._idle_limit:
            return
        for flow in list(self.flows):
            flow.idle = 0.0 if flow.account() else flow.idle + passed
            if flow.idle >= self._idle_limit:
                flow.abort()

    def account(self) -> None:
        """Bring the counters up to date."""
        for flow in self.flows:
            flow.account()

    def close(self) -> None:
        """Reset everything."""
        for attempt in list(self.attempts):
            self.give_up(attempt)
        for flow in list(self.flows):
            flow.abort()
        self._shop.pipes.close()
        if self._reserve >= 0:
            os.close(self._reserve)

    def refuse_one(self, listener: TcpListener) -> bool:
        """Accept a connection with the descriptor in reserve and reset it; whether that went well."""
        self.exhausted += 1
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
        refused = False
        try:
            _abort(sockets.accept(listener.socket)[0])
            refused = True
        except OSError:
            pass
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        return refused


def _abort(connection: sockets.Socket) -> None:
    with contextlib.suppress(OSError):
        sockets.abort(connection)
