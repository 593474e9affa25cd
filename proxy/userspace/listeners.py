"""The listeners of a worker: opened, changed and closed one by one as the table wants them.

Theory of operation
-------------------
Every worker has a socket of its own for every place, with SO_REUSEPORT: the kernel spreads connections over them by the
hash of addresses and ports, and a worker that dies takes only its own away.  Where a route has affinity, a small
program in the kernel spreads them by the client's address alone, so that a client keeps its worker, and the worker's
memory of it, as long as the workers are the same.

A place that somebody else has, or that the process may not have, is trouble of that place only: it is remembered, told
to the agent, and tried again now and then.  So is one too many: of the descriptors that a worker may have, some are for
connections.  Closing a listener leaves its accepted connections alone.
"""

from __future__ import annotations

import errno

from proxy.userspace import filters, sockets
from proxy.userspace.admission import Admission, admission
from proxy.userspace.filters import Instruction
from proxy.userspace.table import Bind, Served, Table
from proxy.userspace.tcp import Tcp, TcpListener
from proxy.userspace.udp import Udp, UdpListener
from rules.forwarding import Family, Frontend, Protocol, format_host


class Listeners:
    """All listeners of a worker, of both families."""

    def __init__(self, tcp: Tcp, udp: Udp, *, workers: int, most: int, last: int) -> None:
        """Of a worker.

        Args:
            tcp: whose clients they are.
            udp: likewise.
            workers: how many there are in all, this one included.
            most: how many listeners it may have.
            last: descriptors from this one on are for others.
        """
        self.trouble: dict[Bind, tuple[Frontend, str]] = {}
        self._most = most
        self._last = last
        self._tcp = tcp
        self._udp = udp
        self._workers = workers
        self._open: dict[Bind, TcpListener | UdpListener] = {}
        self._admissions: dict[Bind, Admission] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, bind: object) -> bool:
        return bind in self._open

    def settle(self, table: Table, bind: Bind) -> None:
        """Have what the table wants at a place."""
        served = table.owner(bind)
        wanted = Admission(listens=False)
        if served is not None:
            wanted = admission(served.route, table.sources, bind.address)
        self.trouble.pop(bind, None)
        if served is None or not wanted.listens:
            self._close(bind)
            return
        listener = self._open.get(bind)
        try:
            if listener is None:
                self._start(bind, served, wanted)
            else:
                self._change(listener, served, wanted)
        except OSError as error:
            place = f"{format_host(bind.address)}:{bind.port}/{bind.protocol.name}"
            self.trouble[bind] = served.frontend, f"{place}: {error.strerror or error}"

    def trouble_of(self, family: Family) -> list[tuple[Frontend, str]]:
        """The frontends of a family that lack a listener, each once, and why."""
        found: dict[Frontend, str] = {}
        for bind, (frontend, why) in self.trouble.items():
            if len(bind.address) == family.address_bytes:
                found.setdefault(frontend, why)
        return list(found.items())

    def troubled(self, table: Table) -> list[Bind]:
        """Places of a family that are worth another try."""
        return [bind for bind in self.trouble if len(bind.address) == table.family.address_bytes]

    def close(self, *, emptied: bool = False) -> None:
        """Close all; `emptied`: once what waits in them has been taken up."""
        for listener in self._open.values():
            listener.close(emptied=emptied)
        self._open.clear()
        self._admissions.clear()
        self.trouble.clear()

    def stop_new(self, protocol: Protocol) -> None:
        """Let no new client in at all; what waits is still taken up."""
        for bind, listener in self._open.items():
            if bind.protocol is protocol:
                filters.attach(listener.socket, filters.NO_SYN)
                listener.filtered = True

    def _start(self, bind: Bind, served: Served, wanted: Admission) -> None:
        if len(self._open) >= self._most:
            raise OSError(errno.EMFILE, f"more than {self._most} listeners: raise the limit of open files")
        opened = sockets.new_listener(served.family, bind.protocol, self._last)
        listener: TcpListener | UdpListener
        try:
            # Before it is bound: nothing shall wait in it that the filter would have kept out.
            filtered = _filter(opened, served.family, wanted)
            sockets.start_listener(opened, bind.protocol, bind.address, bind.port)
            self._spread(opened, served)
            if bind.protocol is Protocol.TCP:
                listener = TcpListener(self._tcp, bind, served, opened)
            else:
                listener = UdpListener(self._udp, bind, served, opened)
        except OSError:
            opened.close()
            raise
        listener.filtered = filtered
        self._open[bind] = listener
        self._admissions[bind] = wanted

    def _change(self, listener: TcpListener | UdpListener, served: Served, wanted: Admission) -> None:
        bind, before = listener.bind, listener.served
        if self._admissions[bind] != wanted:
            listener.filtered = _filter(listener.socket, served.family, wanted) or listener.filtered
            self._admissions[bind] = wanted
        if bool(before.route.affinity) != bool(served.route.affinity):
            self._spread(listener.socket, served)
        if served is not before:
            listener.follow(served)

    def _close(self, bind: Bind) -> None:
        listener = self._open.pop(bind, None)
        self._admissions.pop(bind, None)
        if listener is not None:
            listener.close()

    def _spread(self, listener: sockets.Socket, served: Served) -> None:
        if self._workers > 1:
            program = filters.by_client(served.family, self._workers) if served.route.affinity else None
            filters.spread(listener, program)


def _filter(listener: sockets.Socket, family: Family, wanted: Admission) -> bool:
    """Have the kernel filter what a listener gets; whether it does."""
    program: list[Instruction] | None = filters.assemble(family, wanted.stages) if wanted.stages else None
    if program is None:
        filters.detach(listener)
        return False
    filters.attach(listener, program)
    return True
