"""Generic netlink: the number under which a kernel knows a family of messages."""

from __future__ import annotations

import errno
import struct

from rules.netlink.attributes import REQUEST, DecodeError, attributes, message, text
from rules.netlink.transaction import NetfilterSocket

NETLINK_GENERIC = 16

_CONTROL = 16
"""The one family whose number is known."""
_GET_FAMILY = 3
_FAMILY_ID, _FAMILY_NAME = 1, 2
_HEADER = struct.Struct("=BBH")
_U16 = struct.Struct("=H")


def family_number(netlink: NetfilterSocket, name: str) -> int | None:
    """The number of a family, through a socket of `NETLINK_GENERIC`; None: the kernel has none.

    The kernel loads the module of a family that it doesn't know before it answers.

    Raises:
        NetlinkError: the kernel refused.
        DecodeError: the answer makes no sense.
    """
    request = message(_CONTROL, REQUEST, _HEADER.pack(_GET_FAMILY, 1, 0) + text(_FAMILY_NAME, name))
    try:
        answer = netlink.request(request)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    number = attributes(answer[_HEADER.size :]).get(_FAMILY_ID, b"")
    if len(number) != _U16.size:
        raise DecodeError(f"the number of generic netlink family {name} has {len(number)} bytes")
    return int(_U16.unpack(number)[0])
