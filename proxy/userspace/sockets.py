"""The sockets of a worker: how they are opened, and what the kernel is told about them.

TCP options that a listener has are those of the sockets accepted from it, so they cost no call per connection.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from rules.forwarding import Address, Family, Protocol, format_address

BACKLOG = 4096

# The socket module has no names for these.
IP_FREEBIND = 15
IPV6_FREEBIND = 78
IP_PKTINFO = 8

_IP_PKTOPTIONS = 9
_IPV6_RECVPKTINFO = 49
_IPV6_2292PKTOPTIONS = 6
_RCVBUFFORCE = 33
_BURST_BYTES = 4 << 20
_ABORT = struct.pack("ii", 1, 0)
_CONTROL_HEAD = struct.Struct("Nii")
_INDEX = struct.Struct("I")

Socket = socket.SocketType
"""The plain socket, without the module's Python layer, whose construction costs more than the system call."""


def _new(family: int, kind: int, last: int) -> Socket:
    """A socket, with a descriptor below `last`: the others are kept for what is more important."""
    opened = socket.SocketType(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if opened.fileno() >= last:  # the system always gives the least number that is free
        opened.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return opened


def new_listener(family: Family, protocol: Protocol, last: int) -> Socket:
    """A socket for `start_listener`.

    Raises:
        OSError: no descriptor below `last` is left, or the kernel lacks the family.
    """
    listener = _new(family.af, socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM, last)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family is Family.IPV6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            listener.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        if protocol is Protocol.TCP:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            _hold_bursts(listener)
    except OSError:
        listener.close()
        raise
    return listener


def _hold_bursts(receiver: Socket) -> None:
    """UDP has no backpressure: what a burst brings must wait somewhere.  All sockets together are bound by udp_mem."""
    try:
        receiver.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BURST_BYTES)
    except PermissionError:  # without CAP_NET_ADMIN the kernel's maximum (rmem_max) must do
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BURST_BYTES)


def start_listener(listener: Socket, protocol: Protocol, address: Address, port: int) -> None:
    """Bind a new listener, wherever its address may be, and listen.

    Raises:
        OSError: somebody else has the port, or the process may not have it.
    """
    listener.bind((format_address(address), port))
    if protocol is Protocol.TCP:
        listener.listen(BACKLOG)


def accept(listener: Socket) -> tuple[Socket, tuple[str, int]]:
    """The next connection, and the client's address and port.

    Raises:
        BlockingIOError: there is none.
        OSError: it is gone already, or no descriptor is left.
    """
    descriptor, address = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  # what socket.accept calls
    os.set_blocking(descriptor, False)
    return socket.SocketType(listener.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, descriptor), address[:2]


def connect(family: int, kind: int, address: tuple[str, int], last: int) -> Socket:
    """A socket that is connecting (TCP) or connected (UDP).

    Raises:
        OSError: no descriptor below `last` or no port is left, or the address is out of reach.
    """
    connection = _new(family, kind, last)
    try:
        if kind == socket.SOCK_STREAM:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = connection.connect_ex(address)
    except OSError:
        connection.close()
        raise
    if error not in (0, errno.EINPROGRESS):
        connection.close()
        raise OSError(error, os.strerror(error))
    return connection


def abort(connection: Socket) -> None:
    """Close a TCP connection with a reset."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    finally:
        connection.close()


def pending_error(connection: Socket) -> int:
    """The errno that has come to a socket from the network, or 0."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def input_interface(connection: Socket) -> str | None:
    """The interface by which an accepted connection came in; None if the kernel doesn't tell."""
    level, option, place = socket.IPPROTO_IP, _IP_PKTOPTIONS, 0
    if connection.family == socket.AF_INET6:
        level, option, place = socket.IPPROTO_IPV6, _IPV6_2292PKTOPTIONS, 16
    try:
        return _interface(connection.getsockopt(level, option, 128)[_CONTROL_HEAD.size + place :])
    except OSError:
        return None


def input_interface_of_datagram(family: int, control: list[tuple[int, int, bytes]]) -> str | None:
    """The interface in the ancillary data of a datagram."""
    place = 16 if family == socket.AF_INET6 else 0
    return _interface(control[0][2][place:]) if control else None


def _interface(index: bytes) -> str | None:
    try:
        return socket.if_indextoname(_INDEX.unpack_from(index)[0])
    except (OSError, struct.error):
        return None


def packed(address: tuple[str, int]) -> Address:
    """The packed form of what `accept` and `recvfrom` call an address; a zone is left out."""
    host = address[0]
    if ":" not in host:
        return socket.inet_aton(host)
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])


def own_place(connection: Socket) -> tuple[Address, int]:
    """The address and port from which a socket is connected; none where the kernel doesn't tell."""
    try:
        address = connection.getsockname()
    except OSError:
        return b"", 0
    return packed(address), address[1]


def is_exhaustion(error: OSError) -> bool:
    """Whether a call failed because the process or the system has no descriptors or memory left."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
