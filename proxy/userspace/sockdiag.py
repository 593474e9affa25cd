"""Which sockets wait for clients, as the kernel knows it (sock_diag), and whose they are.

A dump of inet_diag lists all sockets of a protocol and a family in the network namespace of the calling thread, with
the inode by which /proc names the processes that have them open.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from rules.forwarding import Address, Family, Protocol
from rules.netlink.attributes import DUMP, REQUEST, DecodeError, message, messages
from rules.netlink.errors import error_code

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20
_ERROR, _DONE = 2, 3
_REQUEST = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2: family, protocol, extensions, states, and an id that a dump needs not."""
_ANSWER = struct.Struct("=BBBB2s2s16s16sIII16xI")
"""struct inet_diag_msg up to its end: family, state, two bytes, ports and addresses, interface, cookie; the inode."""
_WAITING = {Protocol.TCP: 1 << 10, Protocol.UDP: 1 << 7}
"""States as bits: TCP_LISTEN, and what an unconnected UDP socket has, TCP_CLOSE."""
_CONNECTED = sum(1 << state for state in (1, 3, 4, 5, 8, 9, 11))
"""From the handshake (SYN_RECV) to the last acknowledgement, without TIME_WAIT."""


class Listener(NamedTuple):
    """Where a socket waits for clients."""

    protocol: Protocol
    address: Address
    port: int


def read_listeners(family: Family) -> dict[Listener, frozenset[int]]:
    """All sockets of a family that wait for clients, and the inodes of each; of TCP and UDP.

    Raises:
        OSError: the kernel refused, or lacks inet_diag.
        DecodeError: an answer is none.
    """
    found: dict[Listener, set[int]] = {}
    for protocol, states in _WAITING.items():
        for listener, inode in _dump(family, protocol, states):
            found.setdefault(listener, set()).add(inode)
    return {listener: frozenset(inodes) for listener, inodes in found.items()}


def addresses_in_use(family: Family) -> frozenset[Address]:
    """The node's ends of all TCP connections of a family, whoever has them.

    Raises:
        OSError: the kernel refused, or lacks inet_diag.
        DecodeError: an answer is none.
    """
    return frozenset(listener.address for listener, _ in _dump(family, Protocol.TCP, _CONNECTED))


def inodes_of(pid: int) -> frozenset[int] | None:
    """The sockets that a process has open; None: it is not there, or another user's."""
    found = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # closed meanwhile
                    kind, _, inode = os.readlink(entry.path).partition(":[")  # noqa: PTH115  # ten thousands of them
                    if kind == "socket":
                        found.add(int(inode[:-1]))
    except OSError:
        return None
    return frozenset(found)


def _dump(family: Family, protocol: Protocol, states: int) -> Iterator[tuple[Listener, int]]:
    """The node's ends of all sockets in some states, and their inodes."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    with netlink:
        netlink.bind((0, 0))
        netlink.send(message(_BY_FAMILY, REQUEST | DUMP, _REQUEST.pack(family.af, protocol, 0, states)))
        yield from _answers(netlink, family, protocol)


def _answers(netlink: socket.socket, family: Family, protocol: Protocol) -> Iterator[tuple[Listener, int]]:
    while True:
        for each in messages(netlink.recv(1 << 17)):
            if each.kind == _ERROR:
                code = error_code(each.payload)
                raise OSError(code, f"the sockets of {protocol.name} cannot be read: {os.strerror(code)}")
            if each.kind == _DONE:
                return
            if each.kind == _BY_FAMILY:
                if len(each.payload) < _ANSWER.size:
                    raise DecodeError("a socket without its description")
                fields = _ANSWER.unpack_from(each.payload)
                if fields[0] == family.af:
                    address = fields[6][: family.address_bytes]
                    yield Listener(protocol, address, int.from_bytes(fields[4])), fields[11]
