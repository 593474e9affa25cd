"""Connection tracking over netlink: requests and entries, to bytes and back.

Theory of operation
-------------------
The kernel keeps an entry for every flow: its original tuple (whom the client addressed) and its reply tuple (who
answers, and to whom).  Where destination NAT has chosen a backend the reply source is that backend; where it hasn't,
the reply source is the original destination.  An established entry is never balanced again, so that a UDP client that
keeps its socket goes on sending to a backend that is gone, until its entry is deleted.

A `Match` describes entries in terms that the kernel can compare; `rules.netlink.conntrack_table` has it list or delete
them.

IPv6 addresses are never left to the kernel: up to 6.18 at least it takes equal ones for different ones, and others for
equal, so that it would delete everybody else's flows.  IPv6 entries are asked for by port, and looked at here.

One entry of a dump costs about a microsecond: the attributes of a plain entry have always the same places, which one
comparison of all their headers confirms; anything else goes the long way.  Whatever comes in may be anything: decoding
raises `DecodeError` and nothing else.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from rules.forwarding import Address, Backend, Family, Protocol
from rules.netlink.attributes import (
    U32,
    DecodeError,
    attribute,
    attributes,
    be32,
    be32_of,
    nested,
    parse_u8,
    u8,
)
from rules.netlink.transaction import attributes_of, netfilter_message

_SUBSYSTEM = 1
_GET, _DELETE = 1, 2

_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _ID, _ZONE, _FILTER, _STATUS_MASK = 1, 2, 3, 12, 18, 25, 26
_PROTOCOL_STATE, _COUNTERS_ORIGINAL, _COUNTERS_REPLY = 4, 9, 10
_KEPT = frozenset({_PROTOCOL_STATE, _COUNTERS_ORIGINAL, _COUNTERS_REPLY, _ID})
_TUPLE_IP, _TUPLE_PROTOCOL, _TUPLE_ZONE = 1, 2, 3
_PROTOCOL_NUMBER, _SOURCE_PORT, _PORT = 1, 2, 3
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
# What a filter compares.
_BY_SOURCE, _BY_DESTINATION, _BY_PROTOCOL, _BY_SOURCE_PORT, _BY_PORT = 1, 2, 8, 16, 32

ANSWERED = 1 << 1
"""A status bit: packets were seen in both directions."""
SOURCE_NAT = 1 << 4
"""A status bit: the source is rewritten."""
DESTINATION_NAT = 1 << 5
"""A status bit: the destination is rewritten."""


class Flow(NamedTuple):
    """One entry, as far as Services are concerned."""

    source: Address
    destination: Address
    protocol: int
    source_port: int
    port: int
    """The original destination's."""
    reply_source: Address
    reply_destination: Address
    reply_source_port: int
    reply_port: int
    status: int
    rest: bytes
    """The attributes after the status, undecoded."""

    @property
    def backend(self) -> Backend:
        """Who answers."""
        return Backend(self.reply_source, self.reply_source_port)

    @property
    def translated(self) -> bool:
        """Whether the one who answers is another than the client addressed."""
        return self.reply_source_port != self.port or self.reply_source != self.destination

    @property
    def masqueraded(self) -> bool:
        """Whether the one who answers sees another client."""
        return self.reply_port != self.source_port or self.reply_destination != self.source


class Match(NamedTuple):
    """Entries of the default zone that have all of this in common."""

    family: Family
    protocol: Protocol
    address: Address = b""
    """The original destination; empty: any."""
    port: int = 0
    """The original destination's; 0: any."""
    backend: Backend | None = None
    """The reply source; None: any."""
    status: int = 0
    """Status bits that are set, of those in `mask`."""
    mask: int = 0

    def admits(self, flow: Flow) -> bool:
        """Whether an entry of the family matches."""
        return (
            flow.protocol == self.protocol
            and (not self.address or flow.destination == self.address)
            and (not self.port or flow.port == self.port)
            and (self.backend is None or flow.backend == self.backend)
            and flow.status & self.mask == self.status
        )

    @property
    def comparable(self) -> bool:
        """Whether kernels compare it rightly: they do no IPv6 address."""
        return self.family is Family.IPV4 or not (self.address or self.backend)

    @property
    def coarse(self) -> Match:
        """What every kernel that filters at all compares rightly: of the original tuple, without IPv6 addresses."""
        address = self.address if self.family is Family.IPV4 else b""
        return self._replace(address=address, backend=None, status=0, mask=0)


# --- to bytes ------------------------------------------------------------------------------------------------


def list_request(match: Match) -> bytes:
    """A request for the entries that match; older kernels leave out parts of the match, so look at what comes.

    Raises:
        ValueError: the match is not comparable.
    """
    return netfilter_message(_GET, 0, match.family.af, _filter(match), _SUBSYSTEM)


def delete_request(match: Match) -> bytes:
    """A request to delete all entries that match.

    Raises:
        ValueError: the match is not comparable, or has no port: nothing here deletes all flows of a protocol.
    """
    if not match.port:
        raise ValueError("a match without a port is too wide to delete by")
    return netfilter_message(_DELETE, 0, match.family.af, _filter(match), _SUBSYSTEM)


def delete_one_request(family: Family, flow: Flow) -> bytes:
    """A request to delete one entry; an entry of the same original tuple that came since stays, mostly.

    The kernel tells the two apart by a number that it makes of the tuple and the entry's place in memory.

    Raises:
        DecodeError: the rest of the entry is malformed.
    """
    payload = nested(
        _TUPLE_ORIGINAL,
        _addresses(flow.source, flow.destination),
        _ports(flow.protocol, flow.source_port, flow.port),
    )
    identity = attributes(flow.rest).get(_ID)
    if identity is not None:
        payload += attribute(_ID, identity)
    return netfilter_message(_DELETE, 0, family.af, payload, _SUBSYSTEM)


def _addresses(source: Address = b"", destination: Address = b"") -> bytes:
    """The part of a tuple that holds addresses; attribute types differ by family."""
    pairs = ((source, 1, 3), (destination, 2, 4))
    return nested(_TUPLE_IP, *(attribute(v4 if len(each) == 4 else v6, each) for each, v4, v6 in pairs if each))


def _ports(protocol: int, source_port: int | None = None, port: int | None = None) -> bytes:
    """The part of a tuple that holds the protocol and its ports."""
    pairs = ((_SOURCE_PORT, source_port), (_PORT, port))
    ports = (attribute(kind, value.to_bytes(2)) for kind, value in pairs if value is not None)
    return nested(_TUPLE_PROTOCOL, u8(_PROTOCOL_NUMBER, protocol), *ports)


def _filter(match: Match) -> bytes:
    if not match.comparable:
        raise ValueError("kernels compare IPv6 addresses the wrong way round")
    by_original, by_reply = _BY_PROTOCOL, 0
    by_original |= _BY_DESTINATION if match.address else 0
    by_original |= _BY_PORT if match.port else 0
    addresses = _addresses(destination=match.address) if match.address else b""
    payload = nested(_TUPLE_ORIGINAL, addresses, _ports(match.protocol, port=match.port or None))
    if match.backend is not None:
        by_reply = _BY_SOURCE | _BY_PROTOCOL | _BY_SOURCE_PORT
        addresses = _addresses(source=match.backend.address)
        payload += nested(_TUPLE_REPLY, addresses, _ports(match.protocol, source_port=match.backend.port))
    if match.mask:
        payload += be32(_STATUS, match.status) + be32(_STATUS_MASK, match.mask)
    payload += attribute(_ZONE, b"\0\0")
    flags = attribute(_FILTER_ORIGINAL, U32.pack(by_original))
    return payload + nested(_FILTER, flags, attribute(_FILTER_REPLY, U32.pack(by_reply)) if by_reply else b"")


# --- from bytes ----------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """How the payload of a plain entry of one family begins: headers where they always are, values in between."""

    values: struct.Struct
    headers: int
    """The bytes with every value zero, as one number."""
    mask: int
    """Ones where headers are."""


def _shape(family: Family, *, event: bool = False) -> _Shape:
    """The places of a plain entry's values: where two entries without a common bit in their values are alike.

    In an event the entry's number stands before its status.
    """
    size = family.address_bytes

    def entry(filler: int) -> int:
        address, port, status = bytes((filler,)) * size, filler * 0x101, filler * 0x1010101
        one = _addresses(address, address) + _ports(filler, port, port)
        head = bytes((family.af, 0, 0, 0))
        number = be32(_ID, status) if event else b""
        whole = head + nested(_TUPLE_ORIGINAL, one) + nested(_TUPLE_REPLY, one) + number + be32(_STATUS, status)
        return int.from_bytes(whole)

    first, second = entry(0b01010101), entry(0b10101010)
    addresses = f"8x 4x{size}s 4x{size}s 4x"
    number = "8x" if event else ""
    values = struct.Struct(f">4x {addresses} 4xB3x 4xH2x 4xH2x {addresses} 8x 4xH2x 4xH2x {number} 4xI")
    mask = (1 << 8 * values.size) - 1 ^ first ^ second
    return _Shape(values, first & mask, mask)


_SHAPES = {family.af: _shape(family) for family in Family}
_EVENT_SHAPES = {family.af: _shape(family, event=True) for family in Family}
_NUMBER = slice(-16, -8)
"""Where an event has the entry's number: before the status."""


def decode(data: bytes, start: int, end: int, *, event: bool = False) -> Flow | None:
    """The entry whose payload is `data[start:end]`; None: a flow without ports (ICMP), or one of another zone.

    Args:
        data: what holds it.
        start: its place.
        end: likewise.
        event: whether it is what an event tells, and no part of a dump.

    Raises:
        DecodeError: the bytes are no entry.
    """
    shapes = _EVENT_SHAPES if event else _SHAPES
    if start < end and (shape := shapes.get(data[start])) is not None:
        values = shape.values
        rest = start + values.size
        if rest <= end and int.from_bytes(data[start:rest]) & shape.mask == shape.headers:
            kept = data[start:rest][_NUMBER] + data[rest:end] if event else data[rest:end]
            # source, destination, protocol, two ports; reply source and destination, two ports; status
            return tuple.__new__(Flow, (*values.unpack_from(data, start), kept))
    return _decode_slowly(data[start:end])


def _decode_slowly(payload: bytes) -> Flow | None:
    found = attributes(attributes_of(payload))
    if any(found.get(_ZONE, b"")):
        return None
    original = _decode_tuple(found, _TUPLE_ORIGINAL)
    reply = _decode_tuple(found, _TUPLE_REPLY)
    if original is None or reply is None:
        return None
    source, destination, protocol, source_port, port = original
    reply_source, reply_destination, _, reply_source_port, reply_port = reply
    rest = b"".join(attribute(kind, value) for kind, value in found.items() if kind in _KEPT)
    return Flow(
        source,
        destination,
        protocol,
        source_port,
        port,
        reply_source,
        reply_destination,
        reply_source_port,
        reply_port,
        be32_of(found, _STATUS, 0),
        rest,
    )


def _decode_tuple(found: dict[int, bytes], kind: int) -> tuple[Address, Address, int, int, int] | None:
    """Addresses, protocol and ports of one direction; None: it has no ports, or a zone of its own."""
    if kind not in found:
        raise DecodeError(f"an entry without tuple {kind}")
    parts = attributes(found[kind])
    if any(parts.get(_TUPLE_ZONE, b"")):
        return None
    try:
        addresses, protocol = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTOCOL])
        number = parse_u8(protocol[_PROTOCOL_NUMBER])
    except KeyError as error:
        raise DecodeError(f"tuple {kind} of an entry lacks {error}") from None
    source = addresses.get(1) or addresses.get(3) or b""
    destination = addresses.get(2) or addresses.get(4) or b""
    if len(source) != len(destination) or len(source) not in (4, 16):
        raise DecodeError(f"addresses of {len(source)} and {len(destination)} bytes")
    ports = protocol.get(_SOURCE_PORT), protocol.get(_PORT)
    if ports[0] is None or ports[1] is None:
        return None
    return source, destination, number, _parse_port(ports[0]), _parse_port(ports[1])


def _parse_port(value: bytes) -> int:
    if len(value) != 2:
        raise DecodeError(f"a port of {len(value)} bytes")
    return int.from_bytes(value)
