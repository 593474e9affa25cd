"""Programs of classic BPF for netlink sockets: what a socket need not hear of costs nothing but the kernel's look."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

LOAD_WORD, LOAD_BYTE, LOAD_CONSTANT, LOAD_AT_X, LOAD_X_CONSTANT, X_FROM_A = 0x20, 0x30, 0x00, 0x40, 0x01, 0x07
JUMP_EQUAL, JUMP_IF_ANY, RETURN = 0x15, 0x45, 0x06
EVERYTHING = 0xFFFFFFFF
"""The constant that lets a message through; 0 drops it."""
FIND_ATTRIBUTE = 0xFFFFF000 + 12
"""Loaded as a byte's place, it has the kernel look for the attribute of type X from the place A on: A becomes where
it is, or 0 (SKF_AD_NLATTR)."""

_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")


class Instruction(NamedTuple):
    """One instruction."""

    code: int
    if_true: int
    """Instructions that a jump passes over."""
    if_false: int
    value: int


def attach(target: socket.socket, program: Sequence[Instruction]) -> None:
    """Let through to a socket only what the program does.

    Raises:
        OSError: the kernel refuses the program.
    """
    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count, and a pointer to the instructions, which the kernel copies.
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)
