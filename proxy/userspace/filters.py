"""Classic BPF programs for listening sockets: packets of sources that are not admitted vanish before any handshake.

Theory of operation
-------------------
A program passes a packet through stages: at each, the source must be in one of some prefixes or have come in by one of
some interfaces, else the packet is dropped.  It sees the packet from its transport header on (TCP before the handshake,
UDP before the receive queue), and reaches back to the IP header at SKF_NET_OFF.  The kernel compiles it to machine
code; a prefix costs two instructions per 32-bit word that it determines, and three if it determines part of one.  A
program has at most 4,096 instructions, which is some 1,000 IPv4 prefixes: `None` says that it would be longer.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from rules.forwarding import Family, Prefix

MAX_INSTRUCTIONS = 4096

_ATTACH_FILTER = 26
_DETACH_FILTER = 27
_ATTACH_REUSEPORT = 51  # SO_ATTACH_REUSEPORT_CBPF
_DETACH_REUSEPORT = 68  # SO_DETACH_REUSEPORT_BPF

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_LOAD_BYTE = 0x30  # BPF_LD | BPF_B | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_MULTIPLY = 0x24  # BPF_ALU | BPF_MUL | BPF_K
_SHIFT_RIGHT = 0x74  # BPF_ALU | BPF_RSH | BPF_K
_MODULO = 0x94  # BPF_ALU | BPF_MOD | BPF_K
_ADD_X = 0x0C  # BPF_ALU | BPF_ADD | BPF_X
_TO_X = 0x07  # BPF_MISC | BPF_TAX
_RETURN_A = 0x16  # BPF_RET | BPF_A
_JUMP = 0x05  # BPF_JMP | BPF_JA
_RETURN = 0x06  # BPF_RET | BPF_K

_ANCILLARY = 0xFFFFF000  # SKF_AD_OFF
_INTERFACE = _ANCILLARY + 8  # SKF_AD_IFINDEX
_NETWORK = 0xFFF00000  # SKF_NET_OFF
_SOURCE = {Family.IPV4: _NETWORK + 12, Family.IPV6: _NETWORK + 8}
_WHOLE = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1
"""An odd number near 2**32 divided by the golden ratio, which mixes bits well when multiplied (Knuth)."""

_INSTRUCTION = struct.Struct("=HBBI")


class Stage(NamedTuple):
    """Who passes: sources in a prefix, or by an interface of an index; with neither, nobody."""

    prefixes: tuple[Prefix, ...] = ()
    interfaces: tuple[int, ...] = ()


class Instruction(NamedTuple):
    """As in the kernel's `struct sock_filter`."""

    code: int
    value: int = 0
    if_true: int = 0
    if_false: int = 0


NO_SYN = (
    Instruction(_LOAD_BYTE, 13),
    Instruction(_AND, 0x12),
    Instruction(_EQUAL, 0x02, 0, 1),
    Instruction(_RETURN, 0),
    Instruction(_RETURN, _WHOLE),
)
"""Drops what would open a TCP connection (SYN without ACK), and lets handshakes that have begun go on."""


def assemble(family: Family, stages: Iterable[Stage]) -> list[Instruction] | None:
    """The program that admits what passes all stages; None: it would be too long."""
    program: list[Instruction] = []
    for stage in stages:
        tests = [_interface_test(stage.interfaces)] if stage.interfaces else []
        tests += [_prefix_test(family, prefix) for prefix in stage.prefixes]
        body = [instruction for test in tests for instruction in test]
        body.append(Instruction(_RETURN, 0))
        # What a passed test jumps to is the end of the stage, whose distance is known only now.
        for place, instruction in enumerate(body):
            if instruction.code == _JUMP:
                body[place] = Instruction(_JUMP, len(body) - place - 1)
        program += body
    program.append(Instruction(_RETURN, _WHOLE))
    return program if len(program) <= MAX_INSTRUCTIONS else None


def attach(listener: socket.SocketType, program: Iterable[Instruction]) -> None:
    """Filter what a socket receives, instead of what it filtered before; accepted sockets inherit the filter.

    Raises:
        OSError: the kernel doesn't take the program.
    """
    _attach(listener, _ATTACH_FILTER, program)


def _attach(listener: socket.SocketType, option: int, program: Iterable[Instruction]) -> None:
    code = b"".join(_INSTRUCTION.pack(each.code, each.if_true, each.if_false, each.value) for each in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HP", len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, option, header)


def by_client(family: Family, sockets: int) -> list[Instruction]:
    """The program that spreads clients over a number of sockets by their address alone."""
    program = [Instruction(_LOAD, _SOURCE[family])]
    for place in range(4, family.address_bytes, 4):
        program += [
            Instruction(_MULTIPLY, _GOLDEN),
            Instruction(_TO_X),
            Instruction(_LOAD, _SOURCE[family] + place),
            Instruction(_ADD_X),
        ]
    # The product's upper half depends on all bits of the address.
    return [
        *program,
        Instruction(_MULTIPLY, _GOLDEN),
        Instruction(_SHIFT_RIGHT, 16),
        Instruction(_MODULO, sockets),
        Instruction(_RETURN_A),
    ]


def spread(listener: socket.SocketType, program: Iterable[Instruction] | None) -> None:
    """Have a program choose among the sockets that share a listener's place; None: the kernel does.

    An answer that no socket has, as while a worker is missing, leaves it to the kernel too.

    Raises:
        OSError: the kernel doesn't take the program.
    """
    if program is not None:
        _attach(listener, _ATTACH_REUSEPORT, program)
        return
    try:
        listener.setsockopt(socket.SOL_SOCKET, _DETACH_REUSEPORT, 0)
    except OSError as error:
        # None was there, or the kernel is older than 5.3 and cannot.
        if error.errno not in (errno.ENOENT, errno.ENOPROTOOPT):
            raise


def detach(filtered: socket.SocketType) -> None:
    """Filter no more; no error if it didn't."""
    try:
        filtered.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
    except FileNotFoundError:
        return


def _interface_test(indexes: tuple[int, ...]) -> list[Instruction]:
    tests = [Instruction(_LOAD, _INTERFACE)]
    for index in indexes:
        tests += [Instruction(_EQUAL, index, 0, 1), Instruction(_JUMP)]
    return tests


def _prefix_test(family: Family, prefix: Prefix) -> list[Instruction]:
    """Jumps if the source is in the prefix, and falls through otherwise."""
    tests: list[Instruction] = []
    left = prefix.length
    for place in range(0, family.address_bytes, 4):
        if left <= 0:
            break
        tests.append(Instruction(_LOAD, _SOURCE[family] + place))
        if left < 32:
            tests.append(Instruction(_AND, _WHOLE << (32 - left) & _WHOLE))
        tests.append(Instruction(_EQUAL, int.from_bytes(prefix.address[place : place + 4])))
        left -= 32
    tests.append(Instruction(_JUMP))
    # A word that differs leads behind the jump.
    end = len(tests)
    return [
        each._replace(if_false=end - place - 1) if each.code == _EQUAL else each for place, each in enumerate(tests)
    ]
