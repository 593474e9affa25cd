"""The addresses of the node's interfaces, and when they change (DESIGN 4.13).

Two dumps of rtnetlink, read here and not with pyroute2: two attributes of two messages are all that is wanted of it,
and every start of an agent would pay 0.1 s and 13 MB for the import.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from rules.forwarding import Address
from rules.ipvs import DEVICE, KUBE_PROXYS_DEVICE
from rules.netlink.attributes import (
    DUMP,
    DUMP_INTERRUPTED,
    REQUEST,
    DecodeError,
    attributes,
    message,
    messages,
)
from rules.netlink.errors import error_code

SETTLE = 0.05
"""Seconds in which a burst of changes (an interface comes up) is one change."""

RETRY = 1.0
"""Seconds after which addresses that could not be read are read again."""

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NEW_LINK, _GET_LINK, _NEW_ADDRESS, _GET_ADDRESS = 16, 18, 20, 22
_LINK_NAME = 3
_ADDRESS, _LOCAL = 1, 2
_GROUP_IPV4_ADDRESSES, _GROUP_IPV6_ADDRESSES = 0x10, 0x100

_LINK_HEADER = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change mask."""
_ADDRESS_HEADER = struct.Struct("=BBBBi")
"""struct ifaddrmsg: family, prefix length, flags, scope, index of the interface."""

_TRIES = 10


def read_addresses() -> Mapping[str, tuple[Address, ...]]:
    """The addresses by interface name, in the order of the interfaces; it blocks.

    They are those of the network namespace of the calling thread.

    Raises:
        OSError: the kernel refused, or they changed again and again while they were read.
        DecodeError: an answer is none.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        for _ in range(_TRIES):
            try:
                return _read(netlink)
            except _ChangedError:
                continue
    raise OSError(errno.EINTR, "the interfaces changed again and again while they were read")


class _ChangedError(Exception):
    """What was being read changed meanwhile."""


def _read(netlink: socket.socket) -> Mapping[str, tuple[Address, ...]]:
    names: dict[int, str] = {}
    for payload in _dump(netlink, _GET_LINK, _NEW_LINK, _LINK_HEADER):
        index = _LINK_HEADER.unpack_from(payload)[2]
        # Almost any bytes are a name to the kernel.
        name = attributes(payload[_LINK_HEADER.size :]).get(_LINK_NAME, b"").partition(b"\0")[0]
        names[index] = name.decode(errors="replace")
    found: dict[str, list[Address]] = defaultdict(list)
    for payload in _dump(netlink, _GET_ADDRESS, _NEW_ADDRESS, _ADDRESS_HEADER):
        index = _ADDRESS_HEADER.unpack_from(payload)[4]
        values = attributes(payload[_ADDRESS_HEADER.size :])
        # A point-to-point address has its own end in IFA_LOCAL.
        address = values.get(_LOCAL) or values.get(_ADDRESS)
        interface = names.get(index) or str(index)
        # What mode ipvs binds is Services' and not the node's (IPVS-8).
        if address and interface not in {DEVICE, KUBE_PROXYS_DEVICE}:
            found[interface].append(address)
    return {name: tuple(addresses) for name, addresses in found.items()}


def _dump(netlink: socket.socket, request: int, answer: int, header: struct.Struct) -> Iterator[bytes]:
    """The payloads of all answers to a request for all objects of a kind, each at least as long as its header."""
    netlink.send(message(request, REQUEST | DUMP, bytes(header.size)))
    interrupted = False
    while True:
        for each in messages(netlink.recv(1 << 16)):
            interrupted = interrupted or bool(each.flags & DUMP_INTERRUPTED)
            if each.kind == _NLMSG_ERROR:
                code = error_code(each.payload)
                raise OSError(code, "the interfaces cannot be read")
            if each.kind == _NLMSG_DONE:
                if interrupted:
                    raise _ChangedError
                return
            if each.kind == answer:
                if len(each.payload) < header.size:
                    raise DecodeError("a message of rtnetlink without its header")
                yield each.payload


async def watch_addresses(on_change: Callable[[Mapping[str, tuple[Address, ...]]], None]) -> None:
    """Call `on_change` with the addresses whenever one comes or goes, until cancelled.

    Addresses that cannot be read are read again soon: those that were told hold until then.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE) as events:
        events.bind((0, _GROUP_IPV4_ADDRESSES | _GROUP_IPV6_ADDRESSES))
        loop.add_reader(events, _drain, events, changed)
        try:
            last = await _read_in_time()
            on_change(last)
            while True:
                await changed.wait()
                await asyncio.sleep(SETTLE)
                changed.clear()
                addresses = await _read_in_time()
                if addresses != last:
                    last = addresses
                    on_change(addresses)
        finally:
            loop.remove_reader(events)


async def _read_in_time() -> Mapping[str, tuple[Address, ...]]:
    """The addresses, as soon as they can be read: a process has no descriptor left, or interfaces come and go."""
    told = False
    while True:
        try:
            return await asyncio.to_thread(read_addresses)
        except (OSError, DecodeError) as error:
            from proxy.logs import get_logger  # noqa: PLC0415  # 60 ms that verbs which read once do without

            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            tell = get_logger("sluice.agent").debug if told else get_logger("sluice.agent").warning
            tell("the node's addresses cannot be read: trying again", reason=reason)
            told = True
        await asyncio.sleep(RETRY)


def _drain(events: socket.socket, changed: asyncio.Event) -> None:
    changed.set()
    try:
        while events.recv(65536):
            pass
    except BlockingIOError:
        pass
    except OSError:  # ENOBUFS: events were lost, which is a change too
        pass
