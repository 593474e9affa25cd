"""What a worker tells of new connections to who asks for it, while he does.

A watcher belongs to a connection of the control socket and ends with it, however its process ends.  While there is none
a new connection costs a look at an empty list.  Each gets so many connections at most, and none after those; what the
kernel refuses never comes to a worker, and nobody hears of it.
"""

from __future__ import annotations

from proxy.userspace.control import Answer, Done, Relayed, Trace, Traces, TracesAnswer
from proxy.userspace.table import Bind, Served
from rules.forwarding import Address, Backend

MOST = 1000
"""Connections that one watcher is told of at most."""


class Watchers:
    """All watchers of a worker."""

    def __init__(self) -> None:
        self.active: list[Watcher] = []

    def saw(
        self,
        served: Served,
        bind: Bind,
        client: tuple[Address, int],
        *,
        backend: Backend | None = None,
        own: tuple[Address, int] = (b"", 0),
        tried: tuple[Backend, ...] = (),
        seconds: float = 0.0,
        why: str = "",
    ) -> None:
        """A client has got a backend, or will get none.

        Args:
            served: the frontend's.
            bind: where it connected to.
            client: its address and port.
            backend: that it got; None: none.
            own: the address and port from which the worker connected to it.
            tried: backends before that, which could not be reached.
            seconds: that it took to connect.
            why: it got none.
        """
        told = Relayed(
            frontend=served.frontend,
            client=client,
            address=(bind.address, bind.port),
            backend=backend,
            own=own,
            tried=list(tried),
            seconds=seconds,
            why=why,
        )
        for each in self.active:
            each.saw(told)


class Watcher:
    """One conversation's wish to be told, if it has any."""

    def __init__(self, watchers: Watchers) -> None:
        self._watchers = watchers
        self._wanted: Trace | None = None
        self._left = 0
        self._told: list[Relayed] = []

    def answer(self, request: Trace | Traces) -> Answer:
        """Begin, or begin anew; or give what was seen since the last time."""
        if isinstance(request, Traces):
            told, self._told = self._told, []
            return TracesAnswer(connections=told)
        self.end()
        self._wanted, self._left, self._told = request, min(request.most, MOST), []
        self._watchers.active.append(self)
        return Done()

    def saw(self, told: Relayed) -> None:
        """Remember a connection, if it is wanted."""
        if self._left and self._wanted is not None and _is_wanted(self._wanted, told):
            self._left -= 1
            self._told.append(told)

    def end(self) -> None:
        """The conversation is over."""
        if self in self._watchers.active:
            self._watchers.active.remove(self)


def _is_wanted(wanted: Trace, told: Relayed) -> bool:
    address, port = told.address
    if len(address) != wanted.family.address_bytes or wanted.source not in {b"", told.client[0]}:
        return False
    if wanted.frontends is None:
        return wanted.address in {b"", address} and wanted.port in {0, port}
    return told.frontend in wanted.frontends
