"""Addresses and ports of a packet, from the bytes that the kernel shows of it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from rules.forwarding import Address, Protocol

_PORTS = struct.Struct("!HH")
_PROTOCOLS = {int(protocol): protocol for protocol in Protocol}
_IPV6_BYTES = 40


class Headers(NamedTuple):
    """Addresses and ports of a packet."""

    source: Address
    source_port: int
    destination: Address
    port: int
    protocol: Protocol


def headers_of(network: bytes, transport: bytes) -> Headers | None:
    """From the beginnings of both headers; None: there is too little of them, or the packet has no ports."""
    if len(transport) < _PORTS.size or not network:
        return None
    if network[0] >> 4 == 4 and len(network) >= 20:
        number, source, destination = network[9], network[12:16], network[16:20]
    elif network[0] >> 4 == 6 and len(network) >= _IPV6_BYTES:
        number, source, destination = network[6], network[8:24], network[24:40]
    else:
        return None
    if number not in _PROTOCOLS:
        return None
    source_port, port = _PORTS.unpack_from(transport)
    return Headers(source, source_port, destination, port, _PROTOCOLS[number])


def headers_of_packet(packet: bytes) -> Headers | None:
    """From the beginning of a packet; None as above, and for an IPv6 packet with headers in between."""
    if not packet:
        return None
    length = (packet[0] & 0x0F) * 4 if packet[0] >> 4 == 4 else _IPV6_BYTES
    return headers_of(packet[:length], packet[length:])
