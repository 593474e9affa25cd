"""The hosts of the demo cluster: servers and clients inside the network namespaces, in one small process.

A socket belongs to the namespace in which it was opened, so that one process can stand for every host: it enters a
namespace to open a socket and serves all of them in one loop.  It is run as a script and uses the standard library
only.

It takes requests from its standard input, one JSON object a line, and answers each with one line; it ends when its
input does, so that it cannot outlive its parent.  `proxy.demo.probes` is the other side:

    {"do": "open", "servers": [[host, protocol, address, port], ...]}     listen; address "" is every address
    {"do": "close", "servers": [...]}                                     and no longer
    {"do": "probe", "probes": [{...}, ...]}                               connect; answered when all are done
    {"do": "start", "name": name, "probe": {...}, "interval": seconds}    connect again and again
    {"do": "stop", "name": name}                                          and no longer; answers what came of it

Every server answers a line (TCP) or a datagram (UDP) with one line that says who it is and which peer it sees.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import heapq
import ipaddress
import itertools
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_CLONE_NEWNET = 0x40000000
_IP_PKTINFO = 8
_IP_RECVERR = 11
_IP_FREEBIND = 15
_IP_TRANSPARENT = 19
_IPV6_RECVERR = 25
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78
_FROM_ICMP = (2, 3)
_EXTENDED_ERROR = struct.Struct("=IBBBBII")

_PORTS = (33000, 60000)
"""Where clients connect from: above the node ports."""

_CONCURRENT = 128
"""Attempts under way at once: enough that a hundred refusals take the time of one."""

_OF_A_STREAM = 4
"""Attempts of one stream under way at once.  A machine that cannot keep a stream's pace makes fewer, and none waits for
those that were to come before it."""

_AT_ONCE = 128
"""How many clients of a server are taken in a round of the loop.  In a busy one that must be more than come to it in a
round, or clients of this one host wait ever longer, until they take silence for a lost packet."""


class Hosts:
    """The loop, and what it watches."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.selector = selectors.DefaultSelector()
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.namespaces = {name: os.open(path, os.O_RDONLY) for name, path in paths.items()}
        self.servers: dict[tuple[str, str, str, int], list[socket.socket]] = {}
        self.streams: dict[str, Stream] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.waiting: list[Attempt] = []
        self.running = 0
        self.ports: dict[str, itertools.cycle[int]] = {}
        self.input = b""
        self.ended = False

    # --- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        os.set_blocking(0, False)
        self.watch(0, selectors.EVENT_READ, self.read_input)
        while not self.ended:
            timeout = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else None
            for key, _ in self.selector.select(timeout):
                # Something that an earlier event of this round closed is no longer watched.
                if self.selector.get_map().get(key.fd) is key:
                    key.data()
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()

    def watch(self, fileobj: socket.socket | int, events: int, callback: Callable[[], None]) -> None:
        self.selector.register(fileobj, events, callback)

    def drop(self, sock: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self.selector.unregister(sock)
        sock.close()

    def after(self, moment: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (moment, next(self.order), callback))

    def read_input(self) -> None:
        data = os.read(0, 1 << 20)
        if not data:
            self.ended = True
            return
        *lines, self.input = (self.input + data).split(b"\n")
        for line in lines:
            self.serve_request(json.loads(line))

    def answer(self, **fields: object) -> None:
        data = memoryview(json.dumps(fields).encode() + b"\n")
        while data:
            data = data[os.write(1, data) :]

    def serve_request(self, request: dict[str, Any]) -> None:
        what = request["do"]
        if what == "open":
            self.answer(errors=[error for server in request["servers"] if (error := self.open(*server))])
        elif what == "close":
            for server in request["servers"]:
                for sock in self.servers.pop(tuple(server), ()):
                    self.drop(sock)
            self.answer()
        elif what == "probe":
            Batch(self, request["probes"])
        elif what == "start":
            self.streams[request["name"]] = Stream(self, request["probe"], request["interval"])
            self.answer()
        elif what == "stop":
            self.streams.pop(request["name"]).stop()

    def open_socket(self, host: str, family: socket.AddressFamily, protocol: str) -> socket.socket:
        """A non-blocking socket inside a host."""
        if self.libc.setns(self.namespaces[host], _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        sock = socket.socket(family, socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM)
        sock.setblocking(False)
        return sock

    def bind_unused(self, sock: socket.socket, host: str, source: str) -> None:
        """Bind to a port that the host has not used for long.

        Left to the kernel, connections to two frontends may come from one port.  Both being translated to one backend,
        NAT has to give the second one another port, and it looks masqueraded.
        """
        ports = self.ports.setdefault(host, itertools.cycle(ports_from_now_on()))
        for port in itertools.islice(ports, 1000):
            try:
                sock.bind((source, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    # --- servers -------------------------------------------------------------------------------------------------

    def open(self, host: str, protocol: str, address: str, port: int) -> str | None:
        """Listen; None, or what is wrong.  Listening twice is listening once."""
        key = (host, protocol, address, port)
        if key in self.servers:
            return None
        families = (family_of(address),) if address else (socket.AF_INET, socket.AF_INET6)
        socks = []
        try:
            for family in families:
                with contextlib.suppress(NoFamily):
                    socks.append(self.listen(host, protocol, family, address, port))
        except OSError as error:
            for sock in socks:
                self.drop(sock)
            return f"{host} {address or '*'}:{port}/{protocol}: {error.strerror}"
        self.servers[key] = socks
        return None

    def listen(self, host: str, protocol: str, family: socket.AddressFamily, address: str, port: int) -> socket.socket:
        try:
            sock = self.open_socket(host, family, protocol)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                raise NoFamily from error
            raise
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            answer_from_any_address(sock, family)
            sock.bind((address, port))
            if protocol == "TCP":
                sock.listen(1024)
                self.watch(sock, selectors.EVENT_READ, lambda: self.accept(host, sock))
            else:
                level, option = (
                    (socket.IPPROTO_IP, _IP_PKTINFO)
                    if family == socket.AF_INET
                    else (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)
                )
                sock.setsockopt(level, option, 1)
                self.watch(sock, selectors.EVENT_READ, lambda: self.serve_datagram(host, sock))
        except OSError:
            sock.close()
            raise
        return sock

    def accept(self, host: str, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            for _ in range(_AT_ONCE):
                sock, _ = listener.accept()
                sock.setblocking(False)
                self.watch(sock, selectors.EVENT_READ, functools.partial(self.serve_line, host, sock))

    def serve_line(self, host: str, sock: socket.socket) -> None:
        try:
            data = sock.recv(4096)
            if data.endswith(b"\n"):
                sock.send(describe(host, sock.getsockname(), sock.getpeername()))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(sock)

    def serve_datagram(self, host: str, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_AT_ONCE):
                self.answer_datagram(host, sock)

    def answer_datagram(self, host: str, sock: socket.socket) -> None:
        _, ancillary, _, peer = sock.recvmsg(4096, 256)
        # The answer must come from the address that was asked, whichever it is.
        level, kind, info = ancillary[0]
        if sock.family == socket.AF_INET:
            address = socket.inet_ntop(socket.AF_INET, info[8:12])
            info = struct.pack("=I4s4s", 0, info[8:12], bytes(4))
        else:
            address = socket.inet_ntop(socket.AF_INET6, info[:16])
            info = info[:16] + bytes(4)
        line = describe(host, (address, sock.getsockname()[1]), peer)
        sock.sendmsg([line], [(level, kind, info)], 0, peer)

    # --- clients -------------------------------------------------------------------------------------------------

    def submit(self, attempt: Attempt) -> None:
        """Begin an attempt as soon as there is room."""
        self.waiting.append(attempt)
        self.admit()

    def admit(self) -> None:
        while self.waiting and self.running < _CONCURRENT:
            self.running += 1
            self.waiting.pop(0).begin()

    def done(self) -> None:
        self.running -= 1
        self.admit()


class Attempt:
    """One connection: from its first packet to an outcome."""

    def __init__(self, hosts: Hosts, probe: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
        self.hosts = hosts
        self.probe = probe
        self.report = report
        self.sock: socket.socket | None = None
        self.connected = False
        self.finished = False
        self.started = 0.0

    def begin(self) -> None:
        probe = self.probe
        self.started = time.monotonic()
        self.hosts.after(self.started + probe["timeout"], lambda: self.finish(kind="silent"))
        family = family_of(probe["address"])
        try:
            self.sock = sock = self.hosts.open_socket(probe["host"], family, probe["protocol"])
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe["source_port"]:
                sock.bind((probe["source"], probe["source_port"]))
            else:
                self.hosts.bind_unused(sock, probe["host"], probe["source"])
            number = sock.connect_ex((probe["address"], probe["port"]))
            if number not in (0, errno.EINPROGRESS):
                self.fail(sock, number)
                return
            self.hosts.watch(sock, selectors.EVENT_WRITE, lambda: self.step(sock))
        except OSError as error:
            self.finish(kind="failed", reason=error.strerror)

    def step(self, sock: socket.socket) -> None:
        """The socket is writable, readable or in error."""
        # The queue comes first: it says which ICMP message it was, where the socket's own error only says "refused",
        # and it holds messages that found the connecting socket busy.
        refusal = read_error_queue(sock)
        if refusal:
            self.finish(**refusal)
            return
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self.fail(sock, number)
            return
        try:
            if not self.connected:
                sock.send(b"?\n")
                self.connected = True
                self.hosts.selector.modify(sock, selectors.EVENT_READ, lambda: self.step(sock))
                return
            line = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(sock, error.errno or 0)
            return
        if line:
            self.finish(kind="answered", local=sock.getsockname()[:2], **json.loads(line))
        else:
            self.finish(kind="failed", reason="closed without an answer")

    def fail(self, sock: socket.socket, number: int) -> None:
        refusal = read_error_queue(sock)
        if refusal:
            self.finish(**refusal)
        elif number in (errno.ECONNREFUSED, errno.ECONNRESET):
            self.finish(kind="reset")
        else:
            self.finish(kind="failed", reason=os.strerror(number))

    def finish(self, **outcome: Any) -> None:
        if self.finished:
            return
        self.finished = True
        if self.sock is not None:
            self.hosts.drop(self.sock)
        outcome["began"] = self.started
        outcome["seconds"] = time.monotonic() - self.started
        self.report(outcome)
        self.hosts.done()


class Batch:
    """Probes that were asked for together, and their outcomes."""

    def __init__(self, hosts: Hosts, probes: list[dict[str, Any]]) -> None:
        self.hosts = hosts
        self.results: list[list[dict[str, Any]]] = [[] for _ in probes]
        self.missing = sum(probe["count"] for probe in probes)
        if not self.missing:
            hosts.answer(results=self.results)
        for probe, result in zip(probes, self.results, strict=True):
            for _ in range(probe["count"]):
                hosts.submit(Attempt(hosts, probe, functools.partial(self.add, result)))

    def add(self, result: list[dict[str, Any]], outcome: dict[str, Any]) -> None:
        result.append(outcome)
        self.missing -= 1
        if not self.missing:
            self.hosts.answer(results=self.results)


class Stream:
    """A connection every so often, until it is stopped."""

    def __init__(self, hosts: Hosts, probe: dict[str, Any], interval: float) -> None:
        self.hosts = hosts
        self.probe = probe
        self.interval = interval
        self.outcomes: list[dict[str, Any]] = []
        self.open = 0
        self.stopped = False
        self.tick(time.monotonic())

    def tick(self, moment: float) -> None:
        if self.stopped:
            return
        if self.open < _OF_A_STREAM:
            self.open += 1
            self.hosts.submit(Attempt(self.hosts, self.probe, self.add))
        following = max(moment + self.interval, time.monotonic())
        self.hosts.after(following, lambda: self.tick(following))

    def add(self, outcome: dict[str, Any]) -> None:
        self.outcomes.append(outcome)
        self.open -= 1
        if self.stopped and not self.open:
            self.hosts.answer(outcomes=self.outcomes)

    def stop(self) -> None:
        self.stopped = True
        if not self.open:
            self.hosts.answer(outcomes=self.outcomes)


class NoFamily(Exception):  # noqa: N818  # it ends nothing: the other family listens
    """The kernel is without the address family."""


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


def ports_from_now_on() -> list[int]:
    """All ports for clients, ten further on each second.

    Where the hosts live longer than this process, as they do in virtual machines, its successor must not begin with the
    ports of connections that the node still remembers.
    """
    ports = range(*_PORTS)
    start = int(time.time() * 10) % len(ports)
    return [*ports[start:], *ports[:start]]


def answer_from_any_address(sock: socket.socket, family: socket.AddressFamily) -> None:
    """Let a server answer from addresses that no interface has (`upstream` has them all)."""
    if family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)


def describe(host: str, own: tuple[Any, ...], peer: tuple[Any, ...]) -> bytes:
    return json.dumps({"host": host, "address": own[0], "port": own[1], "peer": peer[:2]}).encode() + b"\n"


def read_error_queue(sock: socket.socket) -> dict[str, Any] | None:
    """What an ICMP message said to the socket, or None."""
    try:
        _, ancillary, _, _ = sock.recvmsg(512, 512, socket.MSG_ERRQUEUE)
    except OSError:
        return None
    for _, _, data in ancillary:
        _, origin, kind, code, _, _, _ = _EXTENDED_ERROR.unpack_from(data)
        if origin in _FROM_ICMP:
            # A sockaddr follows: the family, the port, for IPv6 the flow, then the address of who sent the message.
            sender = data[_EXTENDED_ERROR.size :]
            sender = sender[4:8] if origin == _FROM_ICMP[0] else sender[8:24]
            return {"kind": "icmp", "icmp": (kind, code), "sender": str(ipaddress.ip_address(sender))}
    return None


def main() -> None:
    Hosts(dict(argument.split("=", 1) for argument in sys.argv[1:])).run()


if __name__ == "__main__":
    main()
