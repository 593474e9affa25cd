"""Telling a UDP client that nobody is there: an ICMP port unreachable from the frontend's own address.

A process cannot have the kernel send one for it, so it is made by hand and sent by a raw socket, which needs
CAP_NET_RAW; without that the client hears nothing.  It quotes the headers of a datagram as the client sent it, as far
as a client's kernel looks at them to find the socket.
"""

from __future__ import annotations

import socket
import struct

from proxy.userspace.sockets import IP_FREEBIND, IP_PKTINFO, IPV6_FREEBIND
from rules.forwarding import Address, Family, Protocol

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")
_ICMP = struct.Struct("!BBHI")
_PKTINFO_V4 = struct.Struct("=i4s4s")
_PKTINFO_V6 = struct.Struct("=16si")
_PORT_UNREACHABLE = {Family.IPV4: (3, 3), Family.IPV6: (1, 4)}


def port_unreachable(family: Family, client: tuple[Address, int], frontend: tuple[Address, int]) -> bytes:
    """The message, for a datagram that a client sent to a frontend; the checksum is there for IPv4 only."""
    udp = _UDP.pack(client[1], frontend[1], _UDP.size, 0)
    if family is Family.IPV4:
        length = _IPV4.size + _UDP.size
        quoted = _IPV4.pack(0x45, 0, length, 0, 0, 64, Protocol.UDP, 0, client[0], frontend[0])
        quoted = quoted[:10] + checksum(quoted).to_bytes(2) + quoted[12:]
    else:
        quoted = _IPV6.pack(6 << 28, _UDP.size, Protocol.UDP, 64, client[0], frontend[0])
    kind, code = _PORT_UNREACHABLE[family]
    message = _ICMP.pack(kind, code, 0, 0) + quoted + udp
    if family is Family.IPV4:
        message = message[:2] + checksum(message).to_bytes(2) + message[4:]
    return message


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Refuser:
    """Sends the messages of one family, if the process may."""

    def __init__(self, family: Family) -> None:
        self.family = family
        try:
            protocol = socket.IPPROTO_ICMP if family is Family.IPV4 else socket.IPPROTO_ICMPV6
            raw = socket.socket(family.af, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            # It only sends; what it would receive is nobody's.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
            if family is Family.IPV4:
                raw.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            else:
                raw.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        except OSError:
            self._raw = None
        else:
            self._raw = raw

    def refuse(self, client: tuple[str, int], source: Address, frontend: tuple[Address, int]) -> bool:
        """Tell a client at an address, packed in `source`, that the frontend's port is closed; whether it was sent."""
        if self._raw is None:
            return False
        if self.family is Family.IPV4:
            level, kind, info = socket.IPPROTO_IP, IP_PKTINFO, _PKTINFO_V4.pack(0, frontend[0], bytes(4))
        else:
            level, kind, info = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _PKTINFO_V6.pack(frontend[0], 0)
        message = port_unreachable(self.family, (source, client[1]), frontend)
        try:
            self._raw.sendmsg([message], [(level, kind, info)], 0, (client[0], 0))
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._raw is not None:
            self._raw.close()
