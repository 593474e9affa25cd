"""Noticing that another process touched our tables.

The kernel multicasts every change of nftables, our own included: 10 MB for a first sync of 50,000 Services.  A filter
in the kernel lets through only datagrams that were caused by other sockets than ours, and of those a search for the
table's name finds the ones that matter.  After the changes of a transaction comes the number of the new generation,
and with it the process that made it.  Datagrams that are lost (ENOBUFS) may have been any, so they count.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from rules.dataplane import Stranger, Touch
from rules.forwarding import Family
from rules.netlink.attributes import DecodeError, Message, attributes, be32_of, messages, text_of
from rules.netlink.filters import EVERYTHING, JUMP_EQUAL, LOAD_WORD, RETURN, Instruction
from rules.netlink.listening import Listening
from rules.netlink.transaction import SUBSYSTEM_NFTABLES, attributes_of, family_of

_GROUP_NFTABLES = 7
_ROOM = 32 << 20
_PORT_OFFSET = 12
"""Where a netlink header has the port id of the socket that caused the message."""

_NEW_GENERATION = SUBSYSTEM_NFTABLES << 8 | 15
_PROCESS_ID, _PROCESS_NAME = 2, 3


class Monitor:
    """A socket that becomes readable when another process changes nftables; `touched` says whether it was our table.

    It belongs to the network namespace of the thread that made it.
    """

    def __init__(self, table: str, own_ports: Iterable[int]) -> None:
        """Of a table's name and the netlink port ids of the sockets whose changes are our own.

        Raises:
            OSError: the kernel refuses the socket, its group or its filter.
        """
        self._needle = table.encode() + b"\0"
        self._pending: set[Family] = set()
        """Families that a transaction has touched whose end has not been told yet."""
        # What is lost has no author: room for somebody's flush of a large table.
        self._listening = Listening(_ROOM, _GROUP_NFTABLES, _foreign_only(list(own_ports)))

    def fileno(self) -> int:
        """The descriptor, for an event loop."""
        return self._listening.fileno()

    def touched(self) -> frozenset[Touch]:
        """Who may have changed our table since the last call, and in which family."""
        found: set[Touch] = set()
        for data in self._listening.datagrams():
            if not data:  # what was lost may have been about any
                self._pending.update(Family)
            if self._needle in data or self._pending:
                self._look(data, found)
        return frozenset(found)

    def _look(self, data: bytes, found: set[Touch]) -> None:
        """Take note of the families that a datagram is about, and of the process when the transaction ends."""
        try:
            for message in messages(data):
                if message.kind == _NEW_GENERATION:
                    self._settle(_stranger(message), found)
                elif self._needle in message.payload:
                    self._pending.update(family for family in Family if family.af == family_of(message.payload))
        except DecodeError:
            self._pending.update(Family)
            data = b""
        if not data:  # the end of the transaction may be lost as well
            self._settle(None, found)

    def _settle(self, by: Stranger | None, found: set[Touch]) -> None:
        found.update(Touch(family, by) for family in self._pending)
        self._pending.clear()

    def close(self) -> None:
        self._listening.close()


def _stranger(message: Message) -> Stranger | None:
    try:
        found = attributes(attributes_of(message.payload))
        return Stranger(text_of(found, _PROCESS_NAME), be32_of(found, _PROCESS_ID))
    except DecodeError:
        return None


def _foreign_only(ports: list[int]) -> list[Instruction]:
    """A filter that drops what sockets with these port ids caused."""
    # The kernel loads words in network order; the header is in the host's.
    as_loaded = [int.from_bytes(struct.pack("=I", port)) for port in ports]
    checks = [Instruction(JUMP_EQUAL, len(ports) - index, 0, port) for index, port in enumerate(as_loaded)]
    last = [Instruction(RETURN, 0, 0, EVERYTHING), Instruction(RETURN, 0, 0, 0)]
    return [Instruction(LOAD_WORD, 0, 0, _PORT_OFFSET), *checks, *last]
