"""A worker's listener in its poller."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from proxy.userspace.poller import Poller
from proxy.userspace.table import Bind
from proxy.userspace.tcp import TcpListener
from rules.forwarding import Protocol


def test_a_listener_that_somebody_has_closed_is_not_looked_at_for_ever() -> None:
    poller = Poller()
    tcp: Any = SimpleNamespace(poller=poller)
    nobody: Any = None
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    listener = TcpListener(tcp, Bind(b"\x7f\0\0\1", Protocol.TCP, 1), nobody, listening)
    listening.shutdown(socket.SHUT_RDWR)  # what a socket of the kernel's is left as by `ss -K`, too
    told = poller.epoll.poll(0)
    assert told
    poller.handle(told)
    assert not poller.epoll.poll(0)
    listener.close(emptied=True)
    poller.epoll.close()


class Short(Poller):
    """A poller that the kernel lets watch nothing more for a while, and whose time passes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.short = False
        self.waiting: list[Callable[[], None]] = []

    def add(self, descriptor: int, events: int, handler: Callable[[int], None]) -> None:
        if self.short:
            raise OSError(errno.ENOSPC, "too many are watched")
        super().add(descriptor, events, handler)

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        self.waiting.append(work)


def test_a_listener_that_rests_is_watched_again_as_soon_as_the_kernel_can() -> None:
    poller = Short()
    tcp: Any = SimpleNamespace(poller=poller, refuse_one=lambda _: False)
    nobody: Any = None
    listening: Any = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    exhausted = SimpleNamespace(fileno=listening.fileno, close=listening.close, _accept=_no_descriptor)
    listener = TcpListener(tcp, Bind(b"\x7f\0\0\1", Protocol.TCP, 1), nobody, exhausted)  # type: ignore[arg-type]
    with socket.create_connection(listening.getsockname()):
        poller.handle(poller.epoll.poll(1))
        assert not poller.epoll.poll(0)
        poller.short = True
        for _ in range(3):
            poller.waiting.pop()()
        poller.short = False
        poller.waiting.pop()()
        assert poller.epoll.poll(1)
    listener.close()
    poller.epoll.close()


def _no_descriptor() -> None:
    raise OSError(errno.EMFILE, "no descriptor is left")
