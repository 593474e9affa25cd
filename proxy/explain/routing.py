"""The node's addresses, and where packets leave it: two questions to rtnetlink, in the calling thread's namespace.

By a plain socket, as pyroute2 costs a short-lived command more time than all of its answer.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rules.forwarding import Address, family_of
from rules.netlink.attributes import DUMP, REQUEST, U32, DecodeError, attribute, attributes, message, messages

_DONE, _ERROR = 3, 2
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_NEW_ROUTE, _GET_ROUTE = 24, 26
_ADDRESS_HEADER = struct.Struct("=BBBBI")
_ROUTE_HEADER = struct.Struct("=BBBBBBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_DEPRECATED = 0x20
_RTA_DESTINATION, _RTA_INTERFACE, _RTA_GATEWAY, _RTA_SOURCE = 1, 4, 5, 7
_CODE = struct.Struct("=i")
_NOWHERE = {
    errno.ENETUNREACH: "there is no route",
    errno.EHOSTUNREACH: "the route is unreachable",
    errno.EACCES: "the route is prohibit",
    errno.EINVAL: "the route is blackhole",
}
"""What the kernel answers where it sends nothing."""
_SECONDS = 5.0
_RECEIVE = 1 << 16


class Way(NamedTuple):
    """Where packets to an address leave the node."""

    interface: str
    source: Address | None
    """The address of the node that they have unless they say otherwise."""
    gateway: Address | None = None
    """The router that they are handed to; None: they are there with the next hop."""


def own_addresses() -> list[Address]:
    """The addresses of all interfaces; none where they cannot be read.

    In the kernel's order, but those last that it does not choose as a source of its own accord.
    """
    found: list[Address] = []
    deprecated: list[Address] = []
    with contextlib.suppress(DecodeError):
        for payload in _ask(_GET_ADDRESS, DUMP, _ADDRESS_HEADER.pack(0, 0, 0, 0, 0), _NEW_ADDRESS):
            values = attributes(payload[_ADDRESS_HEADER.size :])
            # A point-to-point address has its own end in IFA_LOCAL.
            address = _address(values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS))
            if address is not None:
                flags = _ADDRESS_HEADER.unpack_from(payload)[2]
                (deprecated if flags & _DEPRECATED else found).append(address)
    return found + deprecated


def way_to(address: Address) -> Way | None:
    """Where packets to an address leave the node; None: there is no route, or nobody could say."""
    return ways_to([address])[0].get(address)


def ways_to(addresses: Iterable[Address]) -> tuple[dict[Address, Way], dict[Address, str]]:
    """Where packets to each address leave the node, and of those that the node sends nowhere, why.

    An address of which nobody could say is in neither.
    """
    ways: dict[Address, Way] = {}
    nowhere: dict[Address, str] = {}
    with contextlib.suppress(OSError, DecodeError, struct.error), _netlink() as netlink:
        for address in dict.fromkeys(addresses):
            header = _ROUTE_HEADER.pack(family_of(address).af, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
            question = header + attribute(_RTA_DESTINATION, address)
            netlink.sendto(message(_GET_ROUTE, REQUEST, question), (0, 0))
            for each in messages(netlink.recv(_RECEIVE)):
                if each.kind == _NEW_ROUTE:
                    values = attributes(each.payload[_ROUTE_HEADER.size :])
                    name = ""
                    with contextlib.suppress(OSError, struct.error):
                        name = socket.if_indextoname(U32.unpack(values.get(_RTA_INTERFACE, b""))[0])
                    ways[address] = Way(name, _address(values.get(_RTA_SOURCE)), _address(values.get(_RTA_GATEWAY)))
                elif each.kind == _ERROR and (code := -_CODE.unpack_from(each.payload)[0]) in _NOWHERE:
                    nowhere[address] = _NOWHERE[code]
    return ways, nowhere


def _address(value: bytes | None) -> Address | None:
    return value if value is not None and len(value) in (4, 16) else None


def _ask(kind: int, flags: int, payload: bytes, answer: int) -> Iterator[bytes]:
    """The payloads of the answers of a kind, up to the end or the first thing that is wrong."""
    with contextlib.suppress(OSError, DecodeError), _netlink() as netlink:
        netlink.sendto(message(kind, REQUEST | flags, payload), (0, 0))
        while True:
            for each in messages(netlink.recv(_RECEIVE)):
                if each.kind in (_DONE, _ERROR):
                    return
                if each.kind == answer:
                    yield each.payload
            if not flags & DUMP:
                return


@contextlib.contextmanager
def _netlink() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_SECONDS)
        netlink.bind((0, 0))
        yield netlink
