"""Addresses that are the node's own without being any interface's: `local` routes (AnyIP).

Theory of operation
-------------------
A packet to an address for which the table `local` has a route of type `local` is delivered to the node itself, where a
listener that was bound with IP_FREEBIND takes it.  No interface has the address, so nothing announces it, and no other
program needs to know of it.

Each route of ours has the routing protocol `PROTOCOL`, by which the next agent, `sluice cleanup` and people (`ip route
show table local proto 83`) know it.  The kernel's own routes for the addresses of interfaces are never touched: an
address that some interface has is local already, and gets none of ours.

A network of ClusterIPs takes one route, whatever Services come and go in it; other addresses take one each, which
stands for as long as any frontend has the address, or any flow uses it.

The messages are packed here and not with pyroute2: two kinds of them, of four attributes, are all that is wanted.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from rules.forwarding import Address, Family, Prefix
from rules.netlink.attributes import (
    ACK,
    CREATE,
    DUMP,
    DUMP_INTERRUPTED,
    EXCLUSIVE,
    REQUEST,
    DecodeError,
    attribute,
    attributes,
    message,
    messages,
)
from rules.netlink.errors import error_code

PROTOCOL = 83
"""Who made a route, as `ip route` says it.  /etc/iproute2/rt_protos has no name for 83, nor does the kernel."""

_LOOPBACK_INDEX = 1
"""`lo` is the first interface of every network namespace."""
_TABLE_LOCAL = 255
_TYPE_LOCAL = 2
_SCOPE_HOST = 254
_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26
_ERROR, _DONE = 2, 3
_DESTINATION, _INTERFACE, _PREFERRED_SOURCE, _TABLE = 1, 4, 7, 15
_REPLACE = 0x100
_SOL_NETLINK, _STRICT_CHECK = 270, 12
_HEADER = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags."""
_BATCH = 100
"""Messages that are sent before their answers are read: those fit into the socket's buffer."""
_TRIES = 10
GROUPS = {
    Family.IPV4: 0x10 | 0x40,
    Family.IPV6: 0x100 | 0x400,
}
"""What rtnetlink tells of a family to those who listen: addresses of interfaces, and routes."""


class LocalRoutes(NamedTuple):
    """The `local` routes of one family."""

    ours: frozenset[Prefix]
    others: frozenset[Prefix]
    """Those of the kernel, which interfaces' addresses have, and of anybody else."""

    def changed(self, added: Iterable[Prefix], removed: Iterable[Prefix]) -> LocalRoutes:
        """The routes after some of ours came and others went."""
        return self._replace(ours=self.ours.union(added).difference(removed))

    def covering(self) -> Callable[[Address], bool]:
        """The test whether packets to an address are delivered to the node."""
        everything = self.ours | self.others
        networks = [prefix for prefix in everything if prefix.length < len(prefix.address) * 8]
        singles = {prefix.address for prefix in everything if prefix.length == len(prefix.address) * 8}
        return lambda address: address in singles or any(address in network for network in networks)


class RouteError(OSError):
    """A route was refused; `prefix` says which."""

    def __init__(self, code: int, prefix: Prefix) -> None:
        super().__init__(code, os.strerror(code))
        self.prefix = prefix


def needed(
    addresses: Iterable[Address], service_cidrs: Iterable[Prefix], others: Collection[Prefix]
) -> frozenset[Prefix]:
    """The routes that the addresses of frontends take, beside those that others have made.

    Networks of ClusterIPs count whether a Service is in them or not: then no route comes or goes with a Service.
    """
    networks = [prefix for prefix in service_cidrs if prefix not in others]
    covering = {*networks, *(prefix for prefix in others if prefix.length < len(prefix.address) * 8)}
    own = {prefix.address for prefix in others if prefix.length == len(prefix.address) * 8}
    singles = (
        Prefix(address, len(address) * 8)
        for address in addresses
        if address and address not in own and not any(address in network for network in covering)
    )
    return frozenset([*networks, *singles])


def read_routes(family: Family) -> LocalRoutes:
    """The `local` routes of a family, in the network namespace of the calling thread.

    Raises:
        OSError: the kernel refused, or they changed again and again while they were read.
        DecodeError: an answer is none.
    """
    with _socket() as netlink:
        for _ in range(_TRIES):
            found = _read(netlink, family)
            if found is not None:
                return found
    raise OSError(errno.EINTR, "the routes changed again and again while they were read")


def change_routes(family: Family, add: Iterable[Prefix], remove: Iterable[Prefix]) -> list[RouteError]:
    """Add and remove routes of ours, and return those that were refused.

    One that is there already, or not there any more, is no error.

    Raises:
        OSError: the kernel cannot be asked.
    """
    return _write(
        [
            *((prefix, _request(family, _NEW_ROUTE, CREATE | EXCLUSIVE, prefix)) for prefix in add),
            *((prefix, _request(family, _DELETE_ROUTE, 0, prefix)) for prefix in remove),
        ]
    )


def prefer_source(family: Family, routes: Iterable[Prefix], source: Address) -> None:
    """Have the node's own new connections to addresses of ours come from another address of the node.

    Otherwise IPv4 takes as their source the very address that they go to, and they end with its route.

    Raises:
        OSError: the kernel cannot be asked.
    """
    _write([(prefix, _request(family, _NEW_ROUTE, _REPLACE, prefix, source)) for prefix in routes])


def _write(requests: Sequence[tuple[Prefix, bytes]]) -> list[RouteError]:
    refused = []
    with _socket() as netlink:
        for start in range(0, len(requests), _BATCH):
            batch = requests[start : start + _BATCH]
            netlink.send(b"".join(data for _, data in batch))
            for code, (prefix, _) in zip(_acknowledgements(netlink, len(batch)), batch, strict=True):
                if code not in (0, errno.EEXIST, errno.ESRCH):
                    refused.append(RouteError(code, prefix))
    return refused


def _socket() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    netlink.bind((0, 0))
    return netlink


def _request(family: Family, kind: int, flags: int, prefix: Prefix, source: Address = b"") -> bytes:
    header = _HEADER.pack(family.af, prefix.length, 0, 0, _TABLE_LOCAL, PROTOCOL, _SCOPE_HOST, _TYPE_LOCAL, 0)
    payload = (
        header
        + attribute(_DESTINATION, prefix.address)
        + attribute(_INTERFACE, _LOOPBACK_INDEX.to_bytes(4, sys.byteorder))
        + (attribute(_PREFERRED_SOURCE, source) if source else b"")
    )
    return message(kind, REQUEST | ACK | flags, payload)


def _acknowledgements(netlink: socket.socket, count: int) -> Iterator[int]:
    """The errno of each of `count` requests, in their order; 0 for success."""
    while count:
        for each in messages(netlink.recv(1 << 16)):
            if each.kind == _ERROR:
                count -= 1
                yield error_code(each.payload)


def _read(netlink: socket.socket, family: Family) -> LocalRoutes | None:
    """The routes; None: they changed meanwhile."""
    netlink.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)
    # With the strict check the kernel looks at table and type, and keeps back what is not asked for.
    header = _HEADER.pack(family.af, 0, 0, 0, _TABLE_LOCAL, 0, 0, _TYPE_LOCAL, 0)
    netlink.send(message(_GET_ROUTE, REQUEST | DUMP, header))
    ours: set[Prefix] = set()
    others: set[Prefix] = set()
    interrupted = False
    while True:
        for each in messages(netlink.recv(1 << 16)):
            interrupted = interrupted or bool(each.flags & DUMP_INTERRUPTED)
            if each.kind == _ERROR:
                code = error_code(each.payload)
                if code == errno.ENOENT:  # no such table: no address either
                    return LocalRoutes(frozenset(), frozenset())
                raise OSError(code, "the routes cannot be read")
            if each.kind == _DONE:
                return None if interrupted else LocalRoutes(frozenset(ours), frozenset(others))
            if each.kind == _NEW_ROUTE:
                route = _decode(each.payload, family)
                if route is not None:
                    (ours if route[1] == PROTOCOL else others).add(route[0])


def _decode(payload: bytes, family: Family) -> tuple[Prefix, int] | None:
    """The destination of a `local` route, and who made it; None: it is another kind of route."""
    if len(payload) < _HEADER.size:
        raise DecodeError("a route without its header")
    af, length, _, _, table, protocol, _, kind, _ = _HEADER.unpack_from(payload)
    found = attributes(payload[_HEADER.size :])
    if _TABLE in found:
        table = int.from_bytes(found[_TABLE], sys.byteorder)
    if (af, table, kind) != (family.af, _TABLE_LOCAL, _TYPE_LOCAL):
        return None
    return Prefix(found.get(_DESTINATION, bytes(family.address_bytes)), length), protocol
