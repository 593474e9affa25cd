"""Bytes between the two sockets of a TCP connection, both ways.

Theory of operation
-------------------
A `Flow` has two `End`s, the client's and the backend's.  `pump` moves what one end has to say to the other, until
nothing is left, the other end takes no more, or its turn is over.

Sockets are watched edge-triggered: an event says that something has changed, and `readable` remembers it until a read
finds less than it asked for.  So a flow costs the kernel one registration per socket, and a flow that is stuck costs
nothing.  Room to write is watched from the first time that a send came to nothing.

At first bytes are copied through one buffer that all flows share; what the other end doesn't take is kept, at most
CHUNK bytes per direction, and nothing more is read before it is gone.  A direction that has carried SPLICE_AFTER bytes
is worth a pipe and two system calls per turn: from then on it is spliced.

An end that has said its last word (a read of nothing) has the other end's writing side shut down once everything is
delivered; the flow ends when both have.  A reset, or any other error, resets the other end, once that has got what it
takes of what came before: what a client or a backend can tell of its peer through a network without us, it can tell
through us.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from proxy.userspace import sockets
from proxy.userspace.poller import Poller
from proxy.userspace.splice import FLAGS, SPLICE_BYTES, Pipe, Pipes
from proxy.userspace.stats import Counters
from rules.forwarding import Backend

CHUNK = 128 << 10
SPLICE_AFTER = 64 << 10
TURNS = 4
"""Reads of one direction before others have their turn."""

IN = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
IN_AND_OUT = IN | select.EPOLLOUT

_OUT = select.EPOLLOUT
_INPUT = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_HANGUP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_ERROR = select.EPOLLERR


class Shop:
    """What all flows of a worker share."""

    def __init__(self, poller: Poller, last: int) -> None:
        """`last` is for `Pipes`."""
        self.poller = poller
        self.pipes = Pipes(last)
        self.buffer = bytearray(CHUNK)
        self.view = memoryview(self.buffer)


class End:
    """One socket of a flow, and what is on its way from there to the other end."""

    __slots__ = (
        "carried",
        "descriptor",
        "failed",
        "finished",
        "flow",
        "hangup",
        "peer",
        "pending",
        "pipe",
        "readable",
        "socket",
        "spliced",
        "watches_room",
    )

    peer: End
    flow: Flow

    def __init__(self, connection: sockets.Socket, *, watches_room: bool) -> None:
        self.socket = connection
        self.descriptor = connection.fileno()
        self.carried = 0
        """Bytes that came from here."""
        self.readable = False
        self.hangup = False
        """Whether the socket has said that an end or an error is to be read."""
        self.failed = False
        """Whether the connection was reset, or broke: no more will come than what has arrived."""
        self.finished = False
        """Whether the end was read here."""
        self.pending: memoryview | None = None
        """Bytes from here that the other end did not take yet."""
        self.pipe: Pipe | None = None
        """Where such bytes are, once they are spliced."""
        self.spliced = 0
        """How many are in the pipe."""
        self.watches_room = watches_room
        """Whether the socket is watched for room to write."""

    def ready(self, events: int) -> None:
        """The socket's state has changed."""
        flow, peer = self.flow, self.peer
        if events & _OUT and (peer.pending is not None or peer.spliced):
            pump(peer)
        if events & _INPUT and not flow.closed:
            self.readable = True
            if events & _HANGUP:
                self.hangup = True
                if events & _ERROR:
                    self.failed = True
            pump(self)

    def go_on(self) -> None:
        """Others have had their turn."""
        if self.socket.fileno() >= 0:
            pump(self)


class Flow:
    """One connection of a client to a backend."""

    __slots__ = (
        "backend",
        "client",
        "closed",
        "counters",
        "idle",
        "shop",
        "target",
        "told_in",
        "told_out",
        "when_closed",
    )

    def __init__(
        self,
        shop: Shop,
        client: End,
        backend: End,
        *,
        counters: Counters,
        target: Backend,
        when_closed: Callable[[Flow], None],
    ) -> None:
        """Join two sockets that the shop's poller watches; `when_closed` is called once, when both are closed."""
        self.shop = shop
        self.client = client
        self.backend = backend
        self.counters = counters
        self.target = target
        self.when_closed = when_closed
        self.closed = False
        self.idle = 0.0
        """For how many seconds nothing has moved, by whoever looks now and then."""
        self.told_in = self.told_out = 0
        client.peer, backend.peer = backend, client
        client.flow = backend.flow = self

    def start(self) -> None:
        """Move what there is already."""
        self.shop.poller.hand_over(self.client.descriptor, self.client.ready)
        self.shop.poller.hand_over(self.backend.descriptor, self.backend.ready)
        if self.backend.pending is not None or self.backend.readable:
            pump(self.backend)
        if not self.closed and (self.client.pending is not None or self.client.readable):
            pump(self.client)

    def account(self) -> bool:
        """Add to the counters what has come since the last time; whether it was anything."""
        came, went = self.client.carried - self.told_in, self.backend.carried - self.told_out
        self.counters.bytes_in += came
        self.counters.bytes_out += went
        self.told_in += came
        self.told_out += went
        return bool(came or went)

    def abort(self) -> None:
        """Reset both ends."""
        self._close(sockets.abort)

    def end(self) -> None:
        """Both ends have said their last word and got the other's."""
        self._close(sockets.Socket.close)

    def _close(self, close: Callable[[sockets.Socket], None]) -> None:
        if self.closed:
            return
        self.closed = True
        self.account()
        for each in (self.client, self.backend):
            self.shop.poller.forget(each.descriptor)
            if each.pipe is not None:
                self.shop.pipes.give_back(each.pipe, empty=not each.spliced)
                each.pipe = None
            each.pending = None
            try:  # noqa: SIM105  # a context manager costs as much as the call
                close(each.socket)
            except OSError:
                pass  # what the network had to say came with the close
            # The two refer to each other and to the flow: without this, they would wait for the garbage collector.
            del each.peer, each.flow
        self.counters.leave(self.target)
        self.counters.end()
        self.when_closed(self)


def pump(source: End) -> None:
    """Move bytes from one end to the other, as many as both admit in a turn."""
    flow = source.flow
    try:
        if source.pipe is not None or (source.carried >= SPLICE_AFTER and source.pending is None):
            more = _splice(source, flow)
        else:
            more = _copy(source, flow)
    except OSError:
        # Whatever is wrong with one end, the other end shall know.
        flow.abort()
        return
    if flow.closed:
        return
    if more:
        flow.shop.poller.again(source.go_on)
    elif source.failed:
        # The other end takes no more for now: it is not to wait for the news until it does.
        flow.abort()


def _copy(source: End, flow: Flow) -> bool:
    """Move bytes through the process; whether there is more to move at once."""
    target, shop = source.peer, flow.shop
    if source.pending is not None and not _deliver(source, target, shop.poller):
        return False
    for _ in range(TURNS):
        if source.finished or not source.readable:
            break
        try:
            size = source.socket.recv_into(shop.buffer)
        except BlockingIOError:
            source.readable = False
            return False
        source.finished = not size
        if size < CHUNK and not source.hangup:
            # Less than asked for: nothing is left, and an end of the stream would be an event of its own.
            source.readable = False
        source.carried += size
        if size:
            source.pending = shop.view[:size]
            if not _deliver(source, target, shop.poller):
                # The buffer is everybody's: what is left needs a place of its own.
                source.pending = memoryview(bytes(source.pending))
                return False
    if source.finished:
        _finish(source, flow)
        return False
    return source.readable


def _deliver(source: End, target: End, poller: Poller) -> bool:
    """Send what is pending; whether all of it is gone."""
    pending = source.pending
    assert pending is not None
    try:
        sent = target.socket.send(pending)
    except BlockingIOError:
        sent = 0
    if sent < len(pending):
        source.pending = pending[sent:]
        _watch_room(target, poller)
        return False
    source.pending = None
    return True


def _splice(source: End, flow: Flow) -> bool:
    """Move bytes inside the kernel; whether there is more to move at once."""
    target, shop = source.peer, flow.shop
    if source.finished and not source.spliced:
        return False
    pipe = source.pipe or shop.pipes.borrow()
    if pipe is None:
        return _copy(source, flow)
    source.pipe = pipe
    for _ in range(TURNS):
        if not source.spliced and not _fill(source, pipe):
            break
        try:
            source.spliced -= os.splice(pipe.reading, target.descriptor, source.spliced, flags=FLAGS)
        except BlockingIOError:
            _watch_room(target, shop.poller)
            return False
    if source.spliced:
        return True
    source.pipe = None
    shop.pipes.give_back(pipe, empty=True)
    if source.finished:
        _finish(source, flow)
        return False
    return source.readable


def _fill(source: End, pipe: Pipe) -> bool:
    """Fill an empty pipe; whether there was anything."""
    if source.finished or not source.readable:
        return False
    try:
        size = os.splice(source.descriptor, pipe.writing, SPLICE_BYTES, flags=FLAGS)
    except BlockingIOError:
        source.readable = False
        return False
    source.carried += size
    source.spliced = size
    source.finished = not size
    return size > 0


def _finish(source: End, flow: Flow) -> None:
    """Everything is delivered: pass on that no more will come."""
    target = source.peer
    if target.finished and target.pending is None and not target.spliced:
        flow.end()
        return
    try:
        target.socket.shutdown(socket.SHUT_WR)
    except OSError as error:
        # Not connected any more: a reset that has not been told yet, or an orderly end.
        if error.errno != errno.ENOTCONN:
            raise


def _watch_room(target: End, poller: Poller) -> None:
    if not target.watches_room:
        target.watches_room = True
        poller.change(target.descriptor, IN_AND_OUT)
