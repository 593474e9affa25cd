"""What has passed each flow: the counters of connection tracking, and the flows that have ended.

The kernel counts packets and bytes of a flow where `net.netfilter.nf_conntrack_acct` was 1 when the flow began, and
tells them with the entry.  When an entry goes, an event tells its last figures; `EndedFlows` hears of those whose
destination was rewritten, which is what going through a Service is: a filter in the kernel drops all others.  Events
that find no room in the socket's buffer are lost, and the kernel says so (ENOBUFS) without saying how many.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

from rules.forwarding import Protocol
from rules.netlink.attributes import (
    HEAD,
    HEADER,
    NESTED,
    DecodeError,
    attribute,
    attributes,
    messages,
    parse_be32,
    parse_be64,
)
from rules.netlink.closing import Closing
from rules.netlink.conntrack import DESTINATION_NAT, Flow, decode
from rules.netlink.filters import (
    EVERYTHING,
    FIND_ATTRIBUTE,
    JUMP_EQUAL,
    JUMP_IF_ANY,
    LOAD_AT_X,
    LOAD_BYTE,
    LOAD_CONSTANT,
    LOAD_X_CONSTANT,
    RETURN,
    X_FROM_A,
    Instruction,
)
from rules.netlink.listening import Listening

_PROTOCOL_STATE, _COUNTERS_ORIGINAL, _COUNTERS_REPLY, _ID = 4, 9, 10, 12
_PACKETS, _BYTES = 1, 2
_TCP_STATE = HEAD.pack(5, 1)
_STATE_PLACE = 2 * HEAD.size
_CLOSED = frozenset({7, 8})
"""The states TIME_WAIT and CLOSE, as connection tracking numbers them."""
_STATUS = 3


class Counts(NamedTuple):
    """What has passed a flow, as the kernel counts it: packets, and bytes with their IP headers."""

    packets_in: int
    """From the client."""
    bytes_in: int
    packets_out: int
    """To the client."""
    bytes_out: int


class Measured(NamedTuple):
    """What accounting needs of a flow beside its tuples."""

    identity: int | None
    """The kernel's number for the entry; None: it told none."""
    counts: Counts | None
    """None: the kernel did not count when the flow began."""
    closed: bool = False
    """Whether it is a TCP connection that both sides have closed, or that was reset, and is kept for last packets."""


def measure(flow: Flow) -> Measured:
    """An entry's number and counters, from the rest of it; raises DecodeError."""
    rest = flow.rest
    position, end = 0, len(rest)
    identity: int | None = None
    sent: tuple[int, int] | None = None
    answered: tuple[int, int] | None = None
    closed = False
    while position < end:
        if end - position < HEAD.size:
            raise DecodeError("an attribute is cut short")
        length, kind = HEAD.unpack_from(rest, position)
        if length < HEAD.size or position + length > end:
            raise DecodeError(f"an attribute of {length} bytes does not fit")
        kind &= ~NESTED
        if kind == _COUNTERS_ORIGINAL:
            sent = _parse_counters(rest[position + HEAD.size : position + length])
        elif kind == _COUNTERS_REPLY:
            answered = _parse_counters(rest[position + HEAD.size : position + length])
        elif kind == _ID:
            identity = parse_be32(rest[position + HEAD.size : position + length])
        elif kind == _PROTOCOL_STATE:
            # Within it the protocol's own attribute, which of TCP's begins with the state; SCTP's states are not looked
            # at: an association ends by being forgotten.
            state = position + HEAD.size + _STATE_PLACE
            if length > HEAD.size + _STATE_PLACE and rest[state - HEAD.size : state] == _TCP_STATE:
                closed = flow.protocol == Protocol.TCP and rest[state] in _CLOSED
        position += length + 3 & ~3
    if sent is None or answered is None:
        return Measured(identity, None, closed)
    return Measured(identity, Counts(*sent, *answered), closed)


_COUNTERS = struct.Struct(">4xQ4xQ")
_COUNTERS_HEADS = attribute(_PACKETS, bytes(8)) + attribute(_BYTES, bytes(8))
_COUNTERS_MASK = int.from_bytes((b"\xff" * 4 + bytes(8)) * 2)
_COUNTERS_PLAIN = int.from_bytes(_COUNTERS_HEADS)


def _parse_counters(value: bytes) -> tuple[int, int]:
    """Packets and bytes of one direction."""
    if len(value) == _COUNTERS.size and int.from_bytes(value) & _COUNTERS_MASK == _COUNTERS_PLAIN:
        packets, length = _COUNTERS.unpack(value)
        return packets, length
    found = attributes(value)
    try:
        return parse_be64(found[_PACKETS]), parse_be64(found[_BYTES])
    except KeyError as error:
        raise DecodeError(f"counters lack {error}") from None


# --- flows that have ended ---------------------------------------------------------------------------------------

_GROUP_DESTROYED = 3
"""Entries that go (NFNLGRP_CONNTRACK_DESTROY)."""
ROOM = 16 << 20
"""Bytes that events may wait in; one takes 1 to 2 kB of it."""

# The status is found wherever it stands, and looked at for the bit; an event without one is let through.
_TRANSLATED = (
    Instruction(LOAD_CONSTANT, 0, 0, HEADER.size + 4),
    Instruction(LOAD_X_CONSTANT, 0, 0, _STATUS),
    Instruction(LOAD_BYTE, 0, 0, FIND_ATTRIBUTE),
    Instruction(JUMP_EQUAL, 3, 0, 0),
    Instruction(X_FROM_A, 0, 0, 0),
    Instruction(LOAD_AT_X, 0, 0, HEAD.size),
    Instruction(JUMP_IF_ANY, 0, 1, DESTINATION_NAT),
    Instruction(RETURN, 0, 0, EVERYTHING),
    Instruction(RETURN, 0, 0, 0),
)


class EndedFlows(Closing):
    """A socket that becomes readable when a translated flow has ended.

    It belongs to the network namespace of the thread that made it.
    """

    def __init__(self, *, every: bool = False) -> None:
        """Listen from now on; to the end of every flow, where what translates is not NAT (IPVS).

        Raises:
            OSError: the kernel refuses the socket, its group or its filter.
        """
        self._listening = Listening(ROOM, _GROUP_DESTROYED, () if every else _TRANSLATED)

    @property
    def lost(self) -> int:
        """How often events were lost."""
        return self._listening.lost

    def close(self) -> None:
        self._listening.close()

    def fileno(self) -> int:
        """The descriptor, to wait on."""
        return self._listening.fileno()

    def take(self) -> list[Flow]:
        """The flows that have ended since the last call, at most some of them; none: those were all.

        Raises:
            OSError: the socket cannot be read.
        """
        return [flow for datagram in self._listening.datagrams() for flow in _ended(datagram)]


def _ended(data: bytes) -> Iterator[Flow]:
    """The flows that a datagram tells of; what is no event is passed over, and so is the rest of its datagram."""
    with contextlib.suppress(DecodeError):
        for each in messages(data):
            flow = decode(each.payload, 0, len(each.payload), event=True)
            if flow is not None:
                yield flow
