"""The tables of legacy iptables as the kernel hands them out: which chains there are, and what FORWARD does by default.

nftables does not show them, and starting `iptables-legacy-save` would create tables that were not there.  The kernel is
asked by getsockopt, as that program asks it, and only for tables that /proc says exist.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import NamedTuple

from rules.forwarding import Family

_GET_INFO, _GET_ENTRIES = 64, 65
_NAME = 32
_INFO = struct.Struct(f"={_NAME}s I 5I 5I 2I")
"""Name, hooks, their first entries, their policies' entries, number of entries, size of all."""
_HEAD = 40
"""Before the entries: name and size, aligned."""
_LEVELS = {Family.IPV4: socket.SOL_IP, Family.IPV6: 41}
_OFFSETS = {Family.IPV4: 88, Family.IPV6: 140}
"""Where an entry says at which offset its target is and the next entry: behind the match on addresses."""
_TARGET = struct.Struct("=H29sB")
_FORWARD = 2
_DROP = -1
"""The verdict as a rule has it: -NF_DROP - 1."""


class LegacyTable(NamedTuple):
    """One table."""

    chains: tuple[str, ...]
    """Those that somebody made."""
    forward_drops: bool
    """Whether it has a chain FORWARD with the policy DROP."""


def read(family: Family, table: str) -> LegacyTable:
    """A table of the network namespace of the calling thread.

    Raises:
        OSError: it cannot be read, or is not there.
    """
    kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    name = table.encode()
    with socket.socket(kind, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as asking:
        info = _get(asking, _LEVELS[family], _GET_INFO, _INFO.pack(name, *[0] * 13))
        size = _INFO.unpack(info)[-1]
        head = struct.pack(f"={_NAME}sI", name, size).ljust(_HEAD, b"\0")
        entries = _get(asking, _LEVELS[family], _GET_ENTRIES, head + bytes(size))
    return decode(family, info, entries[_HEAD:])


def decode(family: Family, info: bytes, entries: bytes) -> LegacyTable:
    """A table from the kernel's two answers.

    Raises:
        OSError: they make no sense.
    """
    _, hooks, *numbers = _INFO.unpack(info)
    policies = numbers[5:10]
    chains: list[str] = []
    drops = False
    place = 0
    try:
        while place < len(entries):
            target, following = struct.unpack_from("=2H", entries, place + _OFFSETS[family])
            _, name, _ = _TARGET.unpack_from(entries, place + target)
            data = place + target + _TARGET.size
            if name.startswith(b"ERROR\0"):
                # What ends a table is an entry of the same kind, with this as its name.
                chains.append(entries[data : data + _NAME].partition(b"\0")[0].decode())
            elif hooks & 1 << _FORWARD and place == policies[_FORWARD]:
                drops = struct.unpack_from("=i", entries, data)[0] == _DROP
            place += max(following, _TARGET.size)
    except (struct.error, UnicodeDecodeError) as error:
        raise OSError(f"a table of legacy iptables cannot be understood: {error}") from None
    return LegacyTable(tuple(chain for chain in chains if chain != "ERROR"), drops)


def _get(asking: socket.socket, level: int, option: int, question: bytes) -> bytes:
    """Ask by getsockopt with a question in the buffer, which `socket.getsockopt` cannot ask."""
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(question, len(question))
    length = ctypes.c_uint32(len(question))
    if library.getsockopt(asking.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
