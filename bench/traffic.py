"""Traffic through a proxy: sources and sinks in processes of their own, each in a network namespace.

They do as little as they can per byte and per connection, as they share the machine with what is measured: a sink lets
the kernel throw bytes away (MSG_TRUNC) instead of copying them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec

from proxy.demo.namespaces import Namespace

T = TypeVar("T")
Place = tuple[str, int]

_ABORT = struct.pack("ii", 1, 0)
_BLOCK = bytes(1 << 20)
_WORD = b"x" * 64


class Child(Generic[T]):
    """A function that runs in a forked process in a namespace; this process has one thread."""

    def __init__(self, namespace: Namespace, function: Callable[[], T], of: type[T]) -> None:
        """`of` is what the function returns: something that msgspec can carry."""
        self._of = of
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            status = 1
            try:
                # What enters is a thread; the sockets that it opens are in the namespace.
                os.write(write, msgspec.msgpack.encode(namespace.inside(function)))
                status = 0
            except BaseException:  # noqa: BLE001  # there is nobody above
                sys.stderr.write(traceback.format_exc())
            finally:
                os._exit(status)
        os.close(write)

    def result(self) -> T:
        """What the function returned, once it has."""
        with open(self._read, "rb") as pipe:  # noqa: PTH123  # a descriptor
            answer = pipe.read()
        os.waitpid(self.pid, 0)
        if not answer:
            raise RuntimeError("a part of the traffic has failed")
        return msgspec.msgpack.decode(answer, type=self._of)

    def kill(self) -> None:
        """End a function that would go on."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._read)


class Exchanges(NamedTuple):
    """Connections that were opened, used for one word and closed."""

    number: int
    seconds: float
    median: float
    p99: float


def sink(port: int) -> None:
    """Take whatever comes, for ever."""
    with socket.create_server(("", port), backlog=1024) as listener, select.epoll() as ready:
        ready.register(listener.fileno(), select.EPOLLIN)
        open_: dict[int, socket.socket] = {}
        unused = bytearray(1 << 22)
        while True:
            for descriptor, _ in ready.poll():
                if descriptor == listener.fileno():
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    open_[connection.fileno()] = connection
                    ready.register(connection.fileno(), select.EPOLLIN)
                    continue
                try:
                    more = open_[descriptor].recv_into(unused, 0, socket.MSG_TRUNC)
                except BlockingIOError:
                    continue
                except OSError:
                    more = 0
                if not more:
                    open_.pop(descriptor).close()


def echo(port: int) -> None:
    """Answer the first word of each connection and wait for its end, for ever, one connection after the other."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("", port))
    listener.listen(4096)
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(connection.recv(1000))
            connection.recv(1)


def hold(port: int) -> None:
    """Accept connections and do nothing with them, for ever."""
    held = []
    with socket.create_server(("", port), backlog=4096) as listener:
        while True:
            held.append(listener.accept()[0])


def stream(place: Place, seconds: float) -> int:
    """Send as much as goes; how many bytes went."""
    sent = 0
    with socket.create_connection(place) as connection:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sent += connection.send(_BLOCK)
    return sent


def exchange(place: Place, seconds: float) -> Exchanges:
    """Connect, say a word, hear it and close, again and again."""
    taken: list[float] = []
    begin = time.monotonic()
    now = begin
    while now < begin + seconds:
        with socket.create_connection(place) as connection:
            connection.sendall(_WORD)
            connection.recv(1000)
        before, now = now, time.monotonic()
        taken.append(now - before)
    taken.sort()
    return Exchanges(len(taken), now - begin, taken[len(taken) // 2], taken[len(taken) * 99 // 100])


def sit(place: Place, count: int, ready: int, over: int) -> int:
    """Open connections, write to `ready`, and hold them until `over` can be read."""
    held = [socket.create_connection(place) for _ in range(count)]
    os.write(ready, b".")
    os.read(over, 1)
    for each in held:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        each.close()
    return count


def flood(place: Place, seconds: float, *, sockets: int = 32) -> int:
    """Send datagrams of 64 bytes as fast as it goes; how many."""
    opened = _senders(place, sockets)
    count = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for send in opened:
            for _ in range(8):
                with contextlib.suppress(OSError):
                    send(_WORD)
        count += 8 * sockets
    return count


def pace(place: Place, seconds: float, rate: int, *, sockets: int = 64) -> int:
    """Send so many datagrams of 64 bytes a second; how many in all."""
    opened = itertools.cycle(_senders(place, sockets))
    sent = 0
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < seconds:
        for send in itertools.islice(opened, max(0, int(passed * rate) - sent)):
            with contextlib.suppress(OSError):
                send(_WORD)
            sent += 1
        time.sleep(0.0005)
    return sent


def _senders(place: Place, count: int) -> list[Callable[[bytes], int]]:
    opened: list[Callable[[bytes], int]] = []
    for _ in range(count):
        each = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        each.connect(place)
        opened.append(each.send)
    return opened


def count_datagrams(port: int, ready: int, quiet: float) -> int:
    """Take datagrams until none has come for so many seconds; how many there were."""
    taken = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE
        listener.bind(("", port))
        os.write(ready, b".")
        buffer = bytearray(2048)
        receive = listener.recv_into
        listener.settimeout(10.0)
        receive(buffer)
        # A kernel timeout costs nothing per datagram, other than Python's.
        listener.settimeout(None)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, int(quiet * 1e6)))
        with contextlib.suppress(BlockingIOError):
            while True:
                taken += 1
                receive(buffer)
    return taken


def cpu_seconds(pids: list[int]) -> float:
    """What processes have used so far, all their threads, by the scheduler's clock."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def private_memory(pids: list[int]) -> int:
    """The bytes that belong to processes alone."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_"):
                total += int(line.split()[1]) * 1024
    return total
