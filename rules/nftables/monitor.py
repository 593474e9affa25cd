"""Noticing that another process touched our tables.

The kernel multicasts every change of nftables, our own included: 10 MB for a first sync of 50,000 Services.  A filter
in the kernel lets through only datagrams that were caused by other sockets than ours, and of those a search for the
table's name finds the ones that matter.  Datagrams that are lost (ENOBUFS) may have been any, so they count.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterable

_NETLINK_NETFILTER = 12
_GROUP_NFTABLES = 7
_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")
_PORT_OFFSET = 12
"""Where a netlink header has the port id of the socket that caused the message."""

# Classic BPF: load a word, return a constant, jump if equal.
_LOAD_WORD, _RETURN, _JUMP_EQUAL = 0x20, 0x06, 0x15
_EVERYTHING = 0xFFFFFFFF


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
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        try:
            _attach(self._socket, _foreign_only(list(own_ports)))
            self._socket.bind((0, 1 << _GROUP_NFTABLES - 1))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor, for an event loop."""
        return self._socket.fileno()

    def touched(self) -> bool:
        """Whether what came in since the last call may have changed our table."""
        found = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found = True
            else:
                found = found or self._needle in data

    def close(self) -> None:
        self._socket.close()


def _foreign_only(ports: list[int]) -> list[tuple[int, int, int, int]]:
    """A filter that drops what sockets with these port ids caused."""
    # The kernel loads words in network order; the header is in the host's.
    as_loaded = [int.from_bytes(struct.pack("=I", port)) for port in ports]
    checks = [(_JUMP_EQUAL, len(ports) - index, 0, port) for index, port in enumerate(as_loaded)]
    return [(_LOAD_WORD, 0, 0, _PORT_OFFSET), *checks, (_RETURN, 0, 0, _EVERYTHING), (_RETURN, 0, 0, 0)]


def _attach(target: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count, and a pointer to the instructions, which the kernel copies.
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)
