"""New connections as connection tracking takes note of them.

An entry is told when its first packet has come through: its two tuples say whom the client addressed, and who was
chosen.  What was refused or dropped has no entry, and is not told.  To listen changes nothing for any packet, and ends
with the socket.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from rules.forwarding import Protocol
from rules.netlink.attributes import DecodeError, messages
from rules.netlink.conntrack import Flow, decode
from rules.netlink.headers import Headers
from rules.netlink.listening import Listening

_GROUP_NEW = 1
_NEW = 1 << 8
_ROOM = 8 << 20
_PORTED = frozenset(map(int, Protocol))


class Passage(NamedTuple):
    """The first packet of a connection, as it came and as it went on."""

    before: Headers
    after: Headers


def listen() -> Listening:
    """A socket that hears of new connections in the network namespace of the calling thread, for `decode_passages`.

    Raises:
        OSError: the kernel refuses it; EPERM without CAP_NET_ADMIN.
    """
    return Listening(_ROOM, _GROUP_NEW)


def decode_passages(datagram: bytes) -> list[Passage]:
    """The new connections in one datagram; what is malformed is left out."""
    found: list[Passage] = []
    with contextlib.suppress(DecodeError):
        for each in messages(datagram):
            if each.kind == _NEW:
                flow = decode(each.payload, 0, len(each.payload), event=True)
                if flow is not None and flow.protocol in _PORTED:
                    found.append(_passage(flow))
    return found


def _passage(flow: Flow) -> Passage:
    protocol = Protocol(flow.protocol)
    return Passage(
        Headers(flow.source, flow.source_port, flow.destination, flow.port, protocol),
        Headers(flow.reply_destination, flow.reply_port, flow.reply_source, flow.reply_source_port, protocol),
    )
