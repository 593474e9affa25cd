"""A worker's listener in its poller."""

from __future__ import annotations

import socket
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
