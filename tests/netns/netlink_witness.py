"""Sees every netlink request that somebody in a network namespace makes of the kernel, and tells which of them write.

The kernel copies all netlink messages of a namespace to its nlmon devices: the agent's, and those of the programs that
it starts.  What is done by setsockopt (all that iptables-legacy writes) or in /proc is not seen.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from proxy.demo.namespaces import Namespace
from rules.netlink.generic import NETLINK_GENERIC, family_number
from rules.netlink.transaction import NetfilterSocket

_DEVICE = "witness"
_HEADER = struct.Struct("=IHHII")
_REQUEST = 0x1
_BUFFER = 64 << 20
_SO_RCVBUFFORCE = 33
_ALL_PROTOCOLS = 0x0003
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_STATISTICS = struct.Struct("=II")

_ROUTE, _NETFILTER, _SOCK_DIAG = 0, 12, 4
_FIRST_REQUEST = 16
"""Types below say how a conversation goes."""
_BATCH = (16, 17)
"""The bounds of a batch of nfnetlink's, which change nothing by themselves."""
_GENERIC_CONTROL = 16
"""Asks by which number a family of generic netlink goes."""
_READS_OF_NETFILTER = {
    1: {1, 4, 5, 6, 7},  # conntrack: entries and statistics
    2: {1, 3},  # expectations
    6: {1, 7, 8, 12, 13, 14, 15},  # ipset: the protocol, lists, headers and types of sets
    10: {1, 4, 7, 10, 13, 16, 19, 23},  # nftables: tables, chains, rules, sets, elements, the generation, objects
    11: {0},  # what xtables extensions the kernel has
}
_READS_OF_IPVS = {4, 8, 13, 15}
"""Virtual servers, real servers, timeouts, the version."""


class Request(NamedTuple):
    """A request by the numbers of linux/netlink.h and its like."""

    protocol: int
    kind: int
    command: int = 0
    """Of generic netlink."""


class Witness:
    """A namespace's netlink requests since it was made."""

    def __init__(self, packets: socket.socket, ipvs: int | None) -> None:
        self._packets = packets
        self._ipvs = ipvs

    def requests(self) -> list[Request]:
        """Those that came since the last call, in order.

        Raises:
            AssertionError: there were more than could be kept.
        """
        found: list[Request] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self._packets.recvfrom(1 << 20)
                found += _requests(address[1], data)
        statistics = self._packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size)
        _, lost = _STATISTICS.unpack(statistics)
        assert not lost, f"{lost} messages were not seen"
        return found

    def writes(self) -> list[Request]:
        """The requests since the last call that may have changed something."""
        return [each for each in self.requests() if not self._reads(each)]

    def _reads(self, request: Request) -> bool:
        protocol, kind, command = request
        if kind < _FIRST_REQUEST:
            return True
        if protocol == _ROUTE:
            return kind % 4 == 2  # every object has NEW, DEL, GET and SET
        if protocol == _NETFILTER:
            return kind in _BATCH or kind & 0xFF in _READS_OF_NETFILTER.get(kind >> 8, ())
        if protocol == NETLINK_GENERIC:
            return kind == _GENERIC_CONTROL or (kind == self._ipvs and command in _READS_OF_IPVS)
        return protocol == _SOCK_DIAG


@contextlib.contextmanager
def witness(namespace: Namespace) -> Iterator[Witness]:
    """Watch a namespace for as long as the block lasts; skips where the kernel has no nlmon."""

    def begin() -> tuple[socket.socket, int | None]:
        made = _ip("add", _DEVICE, "type", "nlmon")
        if made.returncode:
            pytest.skip(f"this kernel has no nlmon: {made.stderr.strip()}")
        _ip("set", _DEVICE, "up")
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        packets.bind((_DEVICE, _ALL_PROTOCOLS))
        with contextlib.closing(NetfilterSocket(NETLINK_GENERIC)) as generic:
            return packets, family_number(generic, "IPVS")

    packets, ipvs = namespace.inside(begin)
    try:
        found = Witness(packets, ipvs)
        assert found.requests(), "the witness is blind"
        yield found
    finally:
        packets.close()
        namespace.inside(lambda: _ip("delete", _DEVICE))


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", "link", *arguments], capture_output=True, text=True, check=False)


def _requests(protocol: int, data: bytes) -> Iterator[Request]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        if flags & _REQUEST:
            generic = protocol == NETLINK_GENERIC and at + _HEADER.size < len(data)
            yield Request(protocol, kind, data[at + _HEADER.size] if generic else 0)
        at += length + 3 & ~3
