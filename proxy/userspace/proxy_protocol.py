"""The PROXY protocol, version 2: what a backend is told of the client whose connection it gets.

A header of 16 bytes and the addresses goes ahead of a connection's bytes, or of each datagram's.
"""

from __future__ import annotations

import struct

from rules.forwarding import Address, Protocol

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_VERSION_AND_COMMAND = 0x21
"""Version 2, PROXY: on behalf of somebody else."""
_FAMILIES = {4: 0x10, 16: 0x20}
_TRANSPORTS = {Protocol.TCP: 0x1, Protocol.UDP: 0x2}
_HEAD = struct.Struct("!12sBBH")
_PORTS = struct.Struct("!HH")


def header(protocol: Protocol, source: tuple[Address, int], destination: tuple[Address, int]) -> bytes:
    """What goes ahead, for a client's address and port and those that it connected to, both of one family."""
    body = source[0] + destination[0] + _PORTS.pack(source[1], destination[1])
    kind = _FAMILIES[len(source[0])] | _TRANSPORTS[protocol]
    return _HEAD.pack(_SIGNATURE, _VERSION_AND_COMMAND, kind, len(body)) + body
