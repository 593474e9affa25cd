"""UDP: one connected socket per client and frontend, and what comes back goes out from the frontend's own address.

Theory of operation
-------------------
A listener is bound to one address, so what it sends has that address as its source.  The first datagram of a client
makes a `UdpFlow`: a backend is chosen, and a socket connected to it, so that the kernel sorts the answers by client and
reports the backend's refusals.  A flow ends when nothing has moved for a while: 30 s, or 180 s once it is a stream,
that is, was answered and is older than two seconds, as conntrack has it.  When its backend leaves the route, it ends at
once (CT-3), and the client's next datagram finds another.  A refusal ends it too, and is passed on (see `icmp`).

Flows are bounded; at the bound, or when descriptors run out, the one that was idle longest goes.  Their order by last
use is kept to the second, which costs next to nothing per datagram.

Sockets are watched level-triggered: a wake-up may leave datagrams behind, and will hear of them again.  A flow reads
twice as many per wake-up when it found as many as it asked for, up to BURST, and half as many when it found none left:
an exchange of single datagrams makes no read in vain, and a stream shares the cost of a wake-up.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable

from proxy.userspace import sockets
from proxy.userspace.choose import Target
from proxy.userspace.icmp import Refuser
from proxy.userspace.poller import Poller
from proxy.userspace.table import Bind, Served
from proxy.userspace.tracing import Watchers
from rules.forwarding import Address, Family, Protocol

BURST = 64
"""Datagrams read from one socket in a wake-up."""
STREAM_AFTER = 2.0
"""Seconds after which an answered flow is a stream."""
MAX_DATAGRAM = 65536

_NOBODY = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH)
"""What the kernel says when the network has said so."""


class UdpFlow:
    """What one client has with one backend."""

    __slots__ = (
        "answered",
        "backend",
        "began",
        "burst",
        "client",
        "descriptor",
        "last",
        "listener",
        "receive",
        "send",
        "served",
        "socket",
        "source",
    )

    def __init__(
        self,
        listener: UdpListener,
        client: tuple[str, int],
        source: Address,
        target: Target,
        connection: sockets.Socket,
    ) -> None:
        self.listener = listener
        self.served = listener.served
        self.client = client
        self.source = source
        self.backend = target.backend
        self.socket = connection
        self.descriptor = connection.fileno()
        self.send = connection.send
        self.receive = connection.recv_into
        self.burst = 1
        self.answered = False
        self.began = self.last = time.monotonic()

    def forward(self, size: int, now: float) -> None:
        """Send the backend what has just come from the client, so many bytes in the buffer."""
        udp = self.listener.udp
        if now - self.last > udp.exactness:
            udp.used(self, now)
        self.served.counters.bytes_in += size
        try:
            self.send(udp.view[:size])
        except BlockingIOError:
            return  # the network takes no more: a datagram is lost, as on any way
        except OSError as error:
            udp.failed(self, error)

    def ready(self, _events: int) -> None:
        """The backend has answered, or refused."""
        udp, counters = self.listener.udp, self.served.counters
        view, receive, reply, client = udp.view, self.receive, self.listener.reply, self.client
        now = time.monotonic()
        if now - self.last > udp.exactness:
            udp.used(self, now)
        self.answered = True
        try:
            for _ in range(self.burst):
                size = receive(view)
                counters.bytes_out += size
                try:
                    reply(view[:size], client)
                except OSError:
                    continue  # the client is out of reach, or takes no more
        except BlockingIOError:
            self.burst = (self.burst + 1) // 2
        except OSError as error:
            udp.failed(self, error)
        else:
            self.burst = min(self.burst * 2, BURST)


class UdpListener:
    """Where clients of one frontend send their datagrams, at one address."""

    def __init__(self, udp: Udp, bind: Bind, served: Served, listener: sockets.Socket) -> None:
        """The socket is bound already, and is the listener's from now on."""
        self.udp = udp
        self.bind = bind
        self.served = served
        self.socket = listener
        self.filtered = False
        self.reply = listener.sendto
        self.flows: dict[tuple[str, int], UdpFlow] = {}
        self._descriptor = listener.fileno()
        udp.poller.add(self._descriptor, select.EPOLLIN, self._ready)

    def follow(self, served: Served) -> None:
        """The route has changed: flows to backends that it no longer has end."""
        self.served = served
        for flow in [each for each in self.flows.values() if not served.has(each.backend)]:
            self.udp.end(flow)

    def close(self, *, emptied: bool = False) -> None:
        """Receive no more, and end all flows; `emptied`: pass on what has arrived first."""
        if emptied:
            self._ready(0)
        for flow in list(self.flows.values()):
            self.udp.end(flow)
        self.udp.poller.remove(self._descriptor)
        self.socket.close()

    def _ready(self, _events: int) -> None:
        if self.served.asks_interface:
            self._receive_with_interface()
            return
        udp, flows, view, receive = self.udp, self.flows, self.udp.view, self.socket.recvfrom_into
        now = time.monotonic()
        for _ in range(BURST):
            try:
                size, client = receive(view)
            except BlockingIOError:
                return
            except OSError:
                continue
            flow = flows.get(client) or udp.begin(self, client, None)
            if flow is not None:
                flow.forward(size, now)

    def _receive_with_interface(self) -> None:
        now = time.monotonic()
        for _ in range(BURST):
            try:
                size, control, _, client = self.socket.recvmsg_into([self.udp.view], 128)
            except BlockingIOError:
                return
            except OSError:
                continue
            interface = sockets.input_interface_of_datagram(self.socket.family, control)
            flow = self.flows.get(client) or self.udp.begin(self, client, interface)
            if flow is not None:
                flow.forward(size, now)


class Udp:
    """All UDP flows of a worker."""

    def __init__(
        self,
        poller: Poller,
        *,
        limit: int,
        idle: float,
        stream_idle: float,
        last: int,
        listens: Callable[[Bind], bool],
    ) -> None:
        """Of a worker.

        Args:
            poller: where sockets are watched.
            limit: how many flows there are at most.
            idle: seconds after which one that is idle ends.
            stream_idle: likewise, of a stream.
            last: descriptors from this one on are not for clients.
            listens: whether the worker itself is what listens at a place.
        """
        self.poller = poller
        self.view = memoryview(bytearray(MAX_DATAGRAM))
        self.exactness = min(1.0, idle / 10)
        """Seconds to which it is known when a flow was used last."""
        self.evicted = 0
        """How many flows had to go for others."""
        self.exhausted = 0
        """How often no descriptor was left for a flow."""
        self.watchers = Watchers()
        self._flows: OrderedDict[UdpFlow, None] = OrderedDict()
        self._limit = limit
        self._idle = idle
        self._stream_idle = stream_idle
        self._last = last
        self._listens = listens
        self._refusers = {family: Refuser(family) for family in Family}

    def __len__(self) -> int:
        return len(self._flows)

    def begin(self, listener: UdpListener, client: tuple[str, int], interface: str | None) -> UdpFlow | None:
        """A flow for a client's first datagram; None: it gets no backend."""
        served = listener.served
        source = sockets.packed(client)
        chooser = served.chooser(source, listener.bind.address, interface)
        if chooser is None:
            served.counters.failures += 1
            if self.watchers.active:
                self.watchers.saw(served, listener.bind, (source, client[1]), why="no backend is for this client")
            return None
        target = chooser.choose(source, time.monotonic())
        if len(self._flows) >= self._limit:
            self._evict()
        try:
            connection = self._connect(served.family, target)
            flow = UdpFlow(listener, client, source, target, connection)
            self.poller.add(flow.descriptor, select.EPOLLIN, flow.ready)
        except OSError:
            served.counters.failures += 1
            return None
        self._flows[flow] = None
        listener.flows[client] = flow
        served.counters.begin()
        served.counters.take(target.backend)
        if self.watchers.active:
            own = sockets.own_place(connection)
            self.watchers.saw(served, listener.bind, (source, client[1]), backend=target.backend, own=own)
        return flow

    def used(self, flow: UdpFlow, now: float) -> None:
        """Something has moved."""
        flow.last = now
        self._flows.move_to_end(flow)

    def failed(self, flow: UdpFlow, error: OSError) -> None:
        """A datagram didn't reach the backend.  Where nobody is, the client is told, and the flow ends."""
        flow.served.counters.failures += 1
        if error.errno in _NOBODY:
            bind = flow.listener.bind
            self._refusers[flow.served.family].refuse(flow.client, flow.source, (bind.address, bind.port))
            self.end(flow)

    def end(self, flow: UdpFlow) -> None:
        """Forget a flow."""
        del self._flows[flow]
        flow.listener.flows.pop(flow.client, None)
        flow.served.counters.leave(flow.backend)
        flow.served.counters.end()
        self.poller.forget(flow.descriptor)
        flow.socket.close()

    def look_around(self, now: float) -> None:
        """End what has been idle too long."""
        over = []
        for flow in self._flows:
            quiet = now - flow.last
            if quiet < self._idle:
                break  # the others were used later
            is_stream = flow.answered and flow.last - flow.began > STREAM_AFTER
            if quiet >= (self._stream_idle if is_stream else self._idle):
                over.append(flow)
        for flow in over:
            self.end(flow)

    def close(self) -> None:
        for flow in list(self._flows):
            self.end(flow)
        for refuser in self._refusers.values():
            refuser.close()

    def _connect(self, family: Family, target: Target) -> sockets.Socket:
        try:
            return self._open(family, target)
        except OSError as error:
            if not sockets.is_exhaustion(error) or not self._flows:
                raise
            self.exhausted += 1
            self._evict()
            return self._open(family, target)

    def _open(self, family: Family, target: Target) -> sockets.Socket:
        if self._listens(Bind(target.backend.address, Protocol.UDP, target.backend.port)):
            # It would come back, again and again, by a flow more each time.
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return sockets.connect(family.af, socket.SOCK_DGRAM, target.address, self._last)

    def _evict(self) -> None:
        """The flow that was idle longest goes."""
        self.evicted += 1
        self.end(next(iter(self._flows)))
